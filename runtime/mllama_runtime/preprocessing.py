"""From a decoded picture to the tiles the vision graph takes, with numpy and Pillow alone.

Follows `transformers.MllamaImageProcessorPil` bit for bit: `mllama_runtime.images` comes before, the session after.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NoReturn

import numpy as np
import numpy.typing as npt
from PIL import Image

from mllama_runtime.config import VisionConfig
from mllama_runtime.errors import BundleError, ImageError, InputError
from mllama_runtime.images import image_key

# About four times what any published checkpoint has; one picture's tiles then stay under a gigabyte.
MAX_IMAGE_SIZE = 2048
MAX_NUM_TILES = 16


@dataclass(frozen=True, slots=True)
class PreprocessorConfig:
    """What a checkpoint's `preprocessor_config.json` says about pictures."""

    image_size: int  # pixels, the side of one square tile
    max_num_tiles: int
    image_mean: tuple[float, float, float]  # of the rescaled values, per channel
    image_std: tuple[float, float, float]
    rescale_factor: float
    resample: int  # a PIL.Image.Resampling value
    do_rescale: bool = True
    do_normalize: bool = True

    @classmethod
    def from_dict(
        cls, mapping: Mapping[str, object], where: object, error: type[InputError] = BundleError
    ) -> PreprocessorConfig:
        """Read the Hugging Face form, which `to_dict` writes. Keys that the reference ignores are ignored.

        Args:
            mapping: the parsed JSON object.
            where: the file it came from, for messages.
            error: what to raise when a field is missing or wrong.
        """
        if not isinstance(mapping, Mapping):
            raise error("not a JSON object", where=where, found=type(mapping).__name__)
        fields = _Fields(mapping, where, error)
        for key in ("do_resize", "do_pad", "do_convert_rgb"):  # the reference itself refuses or crashes without
            if not fields.flag(key):
                fields.fail(key, "true")
        return cls(
            image_size=fields.tile_side("size"),
            max_num_tiles=fields.integer("max_image_tiles", 1, MAX_NUM_TILES),
            image_mean=fields.channels("image_mean", -1e6, 1e6),
            image_std=fields.channels("image_std", 1e-6, 1e6),
            rescale_factor=fields.number("rescale_factor", 1e-9, 1e6),
            resample=fields.integer("resample", 0, 5),
            do_rescale=fields.flag("do_rescale"),
            do_normalize=fields.flag("do_normalize"),
        )

    def to_dict(self) -> dict[str, object]:
        """The Hugging Face form, ready for JSON; transformers reads it too."""
        return {
            "image_processor_type": "MllamaImageProcessor",
            "size": {"height": self.image_size, "width": self.image_size},
            "max_image_tiles": self.max_num_tiles,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
            "rescale_factor": self.rescale_factor,
            "resample": self.resample,
            "do_resize": True,
            "do_pad": True,
            "do_convert_rgb": True,
            "do_rescale": self.do_rescale,
            "do_normalize": self.do_normalize,
        }

    def fingerprint(self) -> str:
        """64 hexadecimal digits that change with any setting."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class ImageTiles:
    """One picture, ready for the vision graph.

    Notation: T = max_num_tiles, S = image_size.
    """

    pixel_values: npt.NDArray[np.float32]  # [T, 3, S, S]; tiles from num_tiles on are zero
    aspect_ratio_id: int  # 1 + the canvas's place in supported_aspect_ratios; 0 means no picture
    aspect_ratio_mask: npt.NDArray[np.int64]  # [T], 1 for a tile of the canvas
    num_tiles: int
    key: str  # from image_key


def blank_tiles(vision: VisionConfig, num_tiles: int | None = None) -> ImageTiles:
    """Make a picture with nothing on it, on a canvas of so many tiles, by default the most."""
    sizes = [high * wide for high, wide in vision.supported_aspect_ratios]
    number = num_tiles or max(sizes)
    shape = (vision.max_num_tiles, vision.num_channels, vision.image_size, vision.image_size)
    return ImageTiles(
        pixel_values=np.zeros(shape, np.float32),
        aspect_ratio_id=sizes.index(number) + 1,
        aspect_ratio_mask=(np.arange(vision.max_num_tiles) < number).astype(np.int64),
        num_tiles=number,
        key="blank",
    )


def preprocess(image: Image.Image, config: PreprocessorConfig) -> ImageTiles:
    """Convert to RGB, fit to a canvas of tiles, rescale, normalise, and cut into tiles, row by row.

    Raises:
        ImageError: as `rgb_image`.
    """
    size = config.image_size
    rgb = rgb_image(image)
    tiles_high, tiles_wide = tiled_canvas(rgb.height, rgb.width, config.image_size, config.max_num_tiles)
    height, width = size_on_canvas(rgb.height, rgb.width, tiles_high, tiles_wide, config.image_size)
    canvas = np.zeros((tiles_high * size, tiles_wide * size, 3), np.uint8)
    canvas[:height, :width] = np.asarray(rgb.resize((width, height), config.resample))

    num_tiles = tiles_high * tiles_wide
    pixel_values = np.zeros((config.max_num_tiles, 3, size, size), np.float32)
    blocks = canvas.reshape(tiles_high, size, tiles_wide, size, 3)
    values = _channel_values(config)
    for tile in range(num_tiles):
        row, column = divmod(tile, tiles_wide)
        for channel in range(3):
            levels = blocks[row, :, column, :, channel]  # [S, S]
            # "clip" clips nothing here; it lets numpy write straight into `out`.
            np.take(values[channel], levels, out=pixel_values[tile, channel], mode="clip")

    return ImageTiles(
        pixel_values=pixel_values,
        aspect_ratio_id=supported_aspect_ratios(config.max_num_tiles).index((tiles_high, tiles_wide)) + 1,
        aspect_ratio_mask=(np.arange(config.max_num_tiles) < num_tiles).astype(np.int64),
        num_tiles=num_tiles,
        key=image_key(image, canvas, config.fingerprint()),
    )


def rgb_image(image: Image.Image) -> Image.Image:
    """The picture in mode RGB, laid over white where it is transparent; an RGB picture comes back itself.

    Modes convert as Pillow converts them, which is the reference's way: I;16, I and F are clipped to 0..255 and not
    scaled, and LAB passes for transparent because it has a band named A. Mode La, on which the reference crashes, is
    taken for the LA it stands for.

    Raises:
        ImageError: the picture has no pixels, cannot be decoded, or has no conversion to RGB.
    """
    if min(image.size) < 1:
        raise ImageError("the picture has no pixels", where="image", found=f"{image.width}x{image.height}")
    try:
        if image.mode == "La":
            image = image.convert("LA")
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            rgba = image if image.mode == "RGBA" else image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba).convert("RGB")
        return image if image.mode == "RGB" else image.convert("RGB")
    except (OSError, TypeError, ValueError) as error:
        raise ImageError("cannot be converted to RGB", where=f"image of mode {image.mode}", found=error) from error


@lru_cache
def supported_aspect_ratios(max_num_tiles: int) -> tuple[tuple[int, int], ...]:
    """Every canvas as (tiles high, tiles wide), in the order that aspect ratio ids count from 1."""
    counts = range(1, max_num_tiles + 1)
    return tuple((high, wide) for high in counts for wide in counts if high * wide <= max_num_tiles)


def tiled_canvas(height: int, width: int, image_size: int, max_num_tiles: int) -> tuple[int, int]:
    """The canvas, as (tiles high, tiles wide), for a picture of height x width pixels.

    The one that enlarges the picture least; if every canvas is too small, the one that shrinks it least. Among equals
    the first, which always has the fewest tiles: if a later (c, d) with fewer equals (a, b), an earlier (a, d) does.
    """
    scales = {
        (high, wide): min(high * image_size / height, wide * image_size / width)
        for high, wide in supported_aspect_ratios(max_num_tiles)
    }
    best = min((scale for scale in scales.values() if scale >= 1), default=max(scales.values()))
    return next(canvas for canvas, scale in scales.items() if scale == best)


def size_on_canvas(height: int, width: int, tiles_high: int, tiles_wide: int, image_size: int) -> tuple[int, int]:
    """The (height, width) in pixels to which a picture is resized, its aspect ratio kept down to one pixel.

    The longer side (measured against the canvas) gets no longer than the canvas and no shorter than a tile.
    """
    target_height = min(max(height, image_size), tiles_high * image_size)
    target_width = min(max(width, image_size), tiles_wide * image_size)
    scale_height, scale_width = target_height / height, target_width / width
    if scale_width < scale_height:
        return min(math.floor(height * scale_width) or 1, target_height), target_width
    return target_height, min(math.floor(width * scale_height) or 1, target_width)


def _channel_values(config: PreprocessorConfig) -> npt.NDArray[np.float32]:
    """The graph's value for each of a channel's 256 levels: float32 [3, 256].

    Rounds where the reference does: the rescaled level once, from float64, then each step in float32.
    """
    levels = np.arange(256, dtype=np.float64)
    values = (levels * config.rescale_factor if config.do_rescale else levels).astype(np.float32)
    if not config.do_normalize:
        return np.stack([values] * 3)
    mean = np.array(config.image_mean, np.float32)[:, None]
    std = np.array(config.image_std, np.float32)[:, None]
    normalized: npt.NDArray[np.float32] = (values - mean) / std
    return normalized


@dataclass(frozen=True, slots=True)
class _Fields:
    """Typed access to a JSON object, with one kind of complaint."""

    mapping: Mapping[str, object]
    where: object
    error: type[InputError]

    def fail(self, key: str, expected: str) -> NoReturn:
        found = json.dumps(self.mapping.get(key), default=str) if key in self.mapping else "nothing"
        raise self.error(f"wrong preprocessor setting `{key}`", where=self.where, expected=expected, found=found)

    def flag(self, key: str) -> bool:
        """True when the key is absent or null: the reference's default for all of them."""
        value = self.mapping.get(key)
        if value is None:
            return True
        if not isinstance(value, bool):
            self.fail(key, "true or false")
        return value

    def integer(self, key: str, low: int, high: int) -> int:
        value = self.mapping.get(key)
        if type(value) is not int or not low <= value <= high:
            self.fail(key, f"a whole number from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float) -> float:
        return self._within(key, self.mapping.get(key), low, high)

    def channels(self, key: str, low: float, high: float) -> tuple[float, float, float]:
        values = self.mapping.get(key)
        if not isinstance(values, list | tuple) or len(values) != 3:
            self.fail(key, "three numbers, one for each of red, green and blue")
        red, green, blue = (self._within(key, value, low, high) for value in values)
        return red, green, blue

    def tile_side(self, key: str) -> int:
        size = self.mapping.get(key)
        if not isinstance(size, Mapping) or size.get("height") != size.get("width"):
            self.fail(key, "a height and a width that are equal")
        return _Fields(size, self.where, self.error).integer("height", 1, MAX_IMAGE_SIZE)

    def _within(self, key: str, value: object, low: float, high: float) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            self.fail(key, f"numbers from {low:g} to {high:g}")
        return float(value)
