"""Pixel tiles against transformers' own processor: values, aspect ratio ids, masks, canvases, settings."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
from hypothesis import given, settings
from hypothesis import strategies as st
from mllama_runtime.errors import BundleError, CheckpointError, ImageError
from mllama_runtime.images import load_image
from mllama_runtime.preprocessing import (
    ImageTiles,
    PreprocessorConfig,
    preprocess,
    rgb_image,
    size_on_canvas,
    supported_aspect_ratios,
    tiled_canvas,
)
from PIL import Image
from transformers.image_utils import load_image as reference_load_image
from transformers.models.mllama import image_processing_pil_mllama as reference

# The values of the published checkpoints, at the sizes of Instruct, base and the miniature.
PUBLISHED = PreprocessorConfig(
    image_size=560,
    max_num_tiles=4,
    image_mean=(0.48145466, 0.4578275, 0.40821073),
    image_std=(0.26862954, 0.26130258, 0.27577711),
    rescale_factor=0.00392156862745098,
    resample=2,
)
INSTRUCT, BASE, MINIATURE = (dataclasses.replace(PUBLISHED, image_size=size) for size in (560, 448, 56))

PHOTOGRAPHS = sorted(
    path for path in (Path(skimage.__file__).parent / "data").iterdir() if path.suffix in {".png", ".jpg", ".gif"}
)
MODES = ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA", "RGBX", "RGBa")
MODES_OF_16_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
CHANNELS = {"1": 1, "L": 1, "P": 1, "I": 4, "F": 4, "LA": 2, "PA": 2, "RGB": 3, "YCbCr": 3, "LAB": 3, "HSV": 3}


def noise(rng: np.random.Generator, width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A picture of random bytes; 16-bit, I and F get values below, within and above 0..255."""
    if mode == "F":
        return Image.fromarray(rng.uniform(-50, 400, (height, width)).astype(np.float32))
    if mode == "I":
        return Image.fromarray(rng.integers(-50, 400, (height, width), dtype=np.int32))
    if mode in MODES_OF_16_BITS:
        return Image.frombytes(mode, (width, height), rng.bytes(2 * width * height))
    if mode == "1":
        return Image.fromarray(rng.integers(0, 2, (height, width), dtype=np.uint8) * 255).convert("1")
    image = Image.frombytes(mode, (width, height), rng.bytes(width * height * CHANNELS.get(mode, 4)))
    if mode in {"P", "PA"}:
        image.putpalette(rng.bytes(768))
    return image


def decoded(image: Image.Image, file_format: str, **options: Any) -> Image.Image:
    """The picture after a trip through a file."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return load_image(buffer.getvalue())


def transparent_pictures(rng: np.random.Generator) -> Iterator[tuple[str, Image.Image]]:
    yield "P, one transparent index", decoded(noise(rng, 41, 30, "P"), "PNG", transparency=7)
    yield "P, alpha by index", decoded(noise(rng, 41, 30, "P"), "PNG", transparency=bytes(range(256)))
    yield "P, RGBA palette", decoded(noise(rng, 41, 30, "RGBA").quantize(16), "PNG")
    yield "L, transparent level", decoded(noise(rng, 41, 30, "L"), "PNG", transparency=7)
    yield "1, transparent black", decoded(noise(rng, 41, 30, "1"), "PNG", transparency=0)
    yield "RGB, transparent colour", decoded(Image.new("RGB", (41, 30), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    yield "I;16, transparent level", decoded(noise(rng, 41, 30, "I;16"), "PNG", transparency=9)
    yield "GIF, transparent index", decoded(noise(rng, 41, 30, "P"), "GIF", transparency=3)
    yield "WebP, alpha", decoded(noise(rng, 41, 30, "RGBA"), "WEBP", lossless=True)
    yield "RGBA, opaque", decoded(noise(rng, 41, 30).convert("RGBA"), "PNG")
    yield "P, palette of RGBA", noise(rng, 41, 30, "RGBA").quantize(16)


def pictures() -> Iterator[tuple[str, Image.Image, PreprocessorConfig]]:
    """Every picture that must come out as the reference's, with a name for the report."""
    rng = np.random.default_rng(20)
    for path in PHOTOGRAPHS:
        yield path.name, load_image(path), MINIATURE
        if path.stem in {"astronaut", "coffee", "chelsea", "rocket", "logo", "page", "camera"}:
            yield f"{path.name} at 448", load_image(path), BASE
            yield f"{path.name} at 560", load_image(path), INSTRUCT
    for config in (MINIATURE, BASE, INSTRUCT):
        size = config.image_size
        for width, height in ((1, 1), (1, 2), (1, 10000), (10000, 1), (3, 9000), (size, size), (2 * size + 1, size)):
            yield f"{width}x{height} at {size}", noise(rng, width, height), config
    yield "4000x3000 at 560", noise(rng, 4000, 3000), INSTRUCT
    yield "3000x4000 at 448", noise(rng, 3000, 4000), BASE
    for mode in MODES + MODES_OF_16_BITS:
        for width, height in ((61, 47), (1, 1), (130, 30)):
            yield f"{mode} {width}x{height}", noise(rng, width, height, mode), MINIATURE
        yield f"{mode} at 448", noise(rng, 500, 90, mode), BASE
    for name, image in transparent_pictures(rng):
        yield name, image, MINIATURE
        yield f"{name} at 448", image, BASE
    for index in range(150):
        width, height = (int(limit ** rng.uniform()) for limit in (4000, 3000))
        yield f"random {index}: {width}x{height}", noise(rng, width, height), MINIATURE
    for index in range(12):
        width, height = (int(limit ** rng.uniform(0.3, 1)) for limit in (4000, 3000))
        yield f"random {index}: {width}x{height} at full size", noise(rng, width, height), (BASE, INSTRUCT)[index % 2]


def reference_tiles(image: Image.Image, config: PreprocessorConfig) -> Any:
    processor = reference.MllamaImageProcessorPil(**config.to_dict())
    return processor(image, return_tensors="np")


def difference(tiles: ImageTiles, expected: Any) -> float:
    """The largest absolute difference of pixel values, after everything else was found equal."""
    assert tiles.aspect_ratio_id == expected["aspect_ratio_ids"][0, 0]
    assert tiles.num_tiles == expected["num_tiles"][0][0]
    np.testing.assert_array_equal(tiles.aspect_ratio_mask, expected["aspect_ratio_mask"][0, 0], strict=True)
    assert tiles.pixel_values.dtype == expected["pixel_values"].dtype == np.float32
    assert tiles.pixel_values.shape == expected["pixel_values"][0, 0].shape
    return float(np.abs(tiles.pixel_values - expected["pixel_values"][0, 0]).max())


def test_pictures_equal_the_reference_bit_for_bit() -> None:
    differences = {
        f"{name} ({image.mode})": difference(preprocess(image, config), reference_tiles(image, config))
        for name, image, config in pictures()
    }
    assert len(differences) >= 300
    # The bar is 1e-6; the same roundings in the same order leave nothing.
    assert {name: found for name, found in differences.items() if not found <= 0.0} == {}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotated_photograph_equals_the_references_path_from_the_file(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.jpg"
    noise(np.random.default_rng(orientation), 90, 40).save(path, exif=exif)
    expected = reference_tiles(reference_load_image(str(path)), MINIATURE)
    assert difference(preprocess(load_image(path), MINIATURE), expected) == 0.0


@pytest.mark.parametrize("shape", [(30, 100, 3), (100, 30, 3), (5, 5, 3), (30, 100)])
def test_an_array_equals_the_reference(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    colour = array if array.ndim == 3 else np.stack([array] * 3, axis=-1)  # the reference takes no grey array
    processor = reference.MllamaImageProcessorPil(**MINIATURE.to_dict())
    expected = processor(colour, input_data_format="channels_last", return_tensors="np")
    assert difference(preprocess(load_image(array), MINIATURE), expected) == 0.0


@pytest.mark.parametrize(
    "changes",
    [
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 0.007, "image_mean": (0.0, 0.5, 1.0), "image_std": (1.0, 0.5, 2.0)},
        *({"resample": resample} for resample in range(6)),
        *({"max_num_tiles": max_num_tiles} for max_num_tiles in (1, 2, 3, 6)),
    ],
    ids=str,
)
def test_settings_are_honoured_as_in_the_reference(changes: dict[str, Any]) -> None:
    config = dataclasses.replace(MINIATURE, **changes)
    for image in (load_image(PHOTOGRAPHS[0]), noise(np.random.default_rng(2), 200, 30)):
        assert difference(preprocess(image, config), reference_tiles(image, config)) == 0.0


def test_transparency_is_laid_over_white() -> None:
    assert rgb_image(Image.new("RGBA", (2, 2), (10, 20, 30, 0))).getpixel((0, 0)) == (255, 255, 255)


def test_an_rgb_picture_is_not_copied() -> None:
    image = Image.new("RGB", (2, 2))
    assert rgb_image(image) is image


def test_premultiplied_grey_on_which_the_reference_crashes_is_taken_as_la() -> None:
    image = noise(np.random.default_rng(3), 20, 20, "LA")
    premultiplied = image.convert("La")
    with pytest.raises(ValueError, match="conversion from La"):
        reference_tiles(premultiplied, MINIATURE)
    assert (
        difference(preprocess(premultiplied, MINIATURE), reference_tiles(premultiplied.convert("LA"), MINIATURE)) == 0
    )


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("RGB", (0, 5)), "no pixels"),
        (Image.new("RGB", (5, 0)), "no pixels"),
    ],
)
def test_pictures_without_pixels_are_refused(image: Image.Image, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        preprocess(image, MINIATURE)


def test_a_transparency_that_means_nothing_is_refused() -> None:
    image = Image.new("L", (5, 5))
    image.info["transparency"] = b"\x00\x80"  # bytes belong to palettes; the reference crashes
    with pytest.raises(ImageError, match="image of mode L: cannot be converted to RGB"):
        preprocess(image, MINIATURE)


# Canvases


@pytest.mark.parametrize("max_num_tiles", range(1, 9))
def test_canvases_are_counted_as_in_the_reference(max_num_tiles: int) -> None:
    assert list(supported_aspect_ratios(max_num_tiles)) == reference.get_all_supported_aspect_ratios(max_num_tiles)


sides = st.integers(1, 20_000) | st.integers(1, 80).flatmap(lambda n: st.integers(max(1, 56 * n - 2), 56 * n + 2))


@given(height=sides, width=sides, image_size=st.sampled_from([56, 448, 560]), max_num_tiles=st.integers(1, 6))
@settings(max_examples=2000, deadline=None, derandomize=True, database=None)
def test_every_size_gets_the_references_canvas(height: int, width: int, image_size: int, max_num_tiles: int) -> None:
    canvas = tiled_canvas(height, width, image_size, max_num_tiles)
    canvas_pixels = canvas[0] * image_size, canvas[1] * image_size
    assert canvas_pixels == reference.get_optimal_tiled_canvas(height, width, max_num_tiles, image_size)
    expected = reference.get_image_size_fit_to_canvas(height, width, *canvas_pixels, image_size)
    assert size_on_canvas(height, width, *canvas, image_size) == expected


# Keys


def test_equal_pictures_share_a_key_and_different_ones_do_not() -> None:
    values = np.random.default_rng(4).bytes(3000)
    opaque = Image.frombytes("P", (100, 30), values)
    opaque.putpalette(bytes(range(256)) * 3)
    recoloured, transparent = opaque.copy(), opaque.copy()
    recoloured.putpalette(bytes(range(256))[::-1] * 3)
    transparent.info["transparency"] = values[0]
    grey = Image.frombytes("L", (100, 30), values)
    images = [
        opaque,
        recoloured,
        transparent,
        grey,
        grey.convert("RGB"),
        Image.frombytes("L", (30, 100), values),
        *(Image.new("L", size) for size in ((30, 100), (100, 30), (30, 101))),
    ]
    keys = [preprocess(image, MINIATURE).key for image in images]
    assert len(set(keys)) == len(images)
    assert [preprocess(image.copy(), MINIATURE).key for image in images] == keys
    assert all(len(key) == 64 and int(key, 16) for key in keys)


@pytest.mark.parametrize(
    "changes",
    [
        {"image_size": 57},
        {"max_num_tiles": 5},
        {"image_mean": (0.5, 0.5, 0.5)},
        {"image_std": (0.5, 0.5, 0.5)},
        {"rescale_factor": 0.5},
        {"resample": 3},
        {"do_rescale": False},
        {"do_normalize": False},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_setting_changes_the_fingerprint_and_the_key(changes: dict[str, Any]) -> None:
    changed = dataclasses.replace(MINIATURE, **changes)
    image = Image.new("RGB", (9, 9))  # black: its tiles change with few of the settings
    assert changed.fingerprint != MINIATURE.fingerprint
    assert preprocess(image, changed).key != preprocess(image, MINIATURE).key


# The settings' file


def test_settings_survive_a_round_trip_through_json() -> None:
    for config in (INSTRUCT, dataclasses.replace(BASE, do_rescale=False, resample=3, image_mean=(0.0, 1.0, 2.0))):
        assert PreprocessorConfig.from_dict(json.loads(json.dumps(config.to_dict())), "x") == config


def test_what_the_reference_saves_is_read(tmp_path: Path) -> None:
    reference.MllamaImageProcessorPil(**BASE.to_dict()).save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    assert PreprocessorConfig.from_dict(json.loads(path.read_text()), path) == BASE


def test_absent_and_null_switches_are_on_as_in_the_reference() -> None:
    settings_dict = {key: value for key, value in BASE.to_dict().items() if not key.startswith("do_")}
    assert PreprocessorConfig.from_dict(settings_dict | {"do_rescale": None}, "x") == BASE


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("size", None, "a height and a width that are equal"),
        ("size", 560, "a height and a width that are equal"),
        ("size", {"shortest_edge": 560}, "a whole number"),
        ("size", {"height": 560, "width": 448}, "a height and a width that are equal"),
        ("size", {"height": 0, "width": 0}, "from 1 to 2048"),
        ("size", {"height": 10**9, "width": 10**9}, "from 1 to 2048"),
        ("size", {"height": 560.0, "width": 560.0}, "a whole number"),
        ("max_image_tiles", 0, "from 1 to 16"),
        ("max_image_tiles", -4, "from 1 to 16"),
        ("max_image_tiles", True, "a whole number"),
        ("max_image_tiles", "4", "a whole number"),
        ("image_mean", 0.5, "three numbers"),
        ("image_mean", [0.5, 0.5], "three numbers"),
        ("image_mean", [0.5, 0.5, float("nan")], "numbers from"),
        ("image_std", [0.5, 0.5, 0.0], "numbers from 1e-06"),
        ("image_std", [0.5, 0.5, -1], "numbers from"),
        ("rescale_factor", float("inf"), "numbers from"),
        ("rescale_factor", "1/255", "numbers from"),
        ("resample", 6, "from 0 to 5"),
        ("resample", "bilinear", "from 0 to 5"),
        ("do_rescale", 1, "true or false"),
        ("do_normalize", "yes", "true or false"),
        ("do_resize", False, "true"),
        ("do_pad", False, "true"),
        ("do_convert_rgb", False, "true"),
    ],
)
def test_a_wrong_setting_is_named(key: str, value: object, expected: str) -> None:
    with pytest.raises(BundleError) as caught:
        PreprocessorConfig.from_dict(INSTRUCT.to_dict() | {key: value}, "bundle/preprocessor.json")
    assert str(caught.value).startswith("bundle/preprocessor.json: wrong preprocessor setting `")
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    "key", ["size", "max_image_tiles", "image_mean", "image_std", "rescale_factor", "resample"], ids=str
)
def test_a_missing_setting_is_named(key: str) -> None:
    settings_dict = INSTRUCT.to_dict()
    del settings_dict[key]
    with pytest.raises(CheckpointError, match=f"x.json: wrong preprocessor setting `{key}`: .*found nothing"):
        PreprocessorConfig.from_dict(settings_dict, "x.json", CheckpointError)


def test_a_file_that_is_no_object_is_refused() -> None:
    with pytest.raises(BundleError, match="not a JSON object"):
        PreprocessorConfig.from_dict([1, 2], "x.json")  # type: ignore[arg-type]
