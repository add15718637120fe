"""From what a caller has (a file, bytes, an array, a Pillow image) to a decoded Pillow image.

The edge where hostile bytes enter: whatever is wrong with a picture is an `ImageError` here.
`mllama_runtime.preprocessing` takes the image on to pixel tiles.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from mllama_runtime.errors import ImageError, ResourceError

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[np.uint8]

# WEBP comes last: Pillow loads all its plugins to find it. TIFF stays out: libtiff writes to stderr past every handler.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP")
DEFAULT_MAX_PIXELS = 64_000_000
URL_PREFIXES = ("http:", "https:", "ftp:", "file:", "data:")


def load_image(source: ImageSource, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Decode a picture.

    A file (`str` or path) or `bytes`: JPEG, PNG, GIF, BMP or WebP, known by content and not by name. The first
    frame is taken, the EXIF orientation applied, and the mode kept, so that transparency reaches `preprocess`.
    URLs are never fetched.

    A Pillow image is taken as it is, EXIF orientation included, as transformers' processor does; only its pixels are
    loaded. An array is uint8 [height, width, 3] in RGB or uint8 [height, width] in grey.

    Args:
        max_pixels: the largest width * height accepted, checked before anything is decoded. Pillow's own limit
            (`PIL.Image.MAX_IMAGE_PIXELS`) holds beside it.

    Raises:
        ImageError: the picture is missing, damaged, too large or of an unsupported kind.
        ResourceError: there is not enough memory to decode it.
    """
    if isinstance(source, Image.Image):
        where = getattr(source, "filename", None) or "image"
        _check_size(source.size, where, max_pixels)
        with _decoding(where):
            source.load()
        return source
    if isinstance(source, np.ndarray):
        return _image_from_array(source, max_pixels)
    if isinstance(source, bytes):
        return _image_from_stream(io.BytesIO(source), "image bytes", max_pixels)
    if isinstance(source, str | os.PathLike):
        return _image_from_file(os.fspath(source), max_pixels)
    raise ImageError(
        "not a picture",
        where="image",
        expected="a path, bytes, a Pillow image or an array",
        found=type(source).__name__,
    )


def image_key(image: Image.Image, canvas: npt.NDArray[np.uint8], processor_fingerprint: str) -> str:
    """The name of a picture in a cache of vision features, as 64 hexadecimal digits.

    It covers all that the vision graph sees, the canvas ([height, width, 3] after colour conversion, resizing and
    padding: palette and transparency are in it) and the processor's settings, beside the picture's own mode and size.
    The full-size pixels stay out: hashing them takes longer than resizing them, and cannot change the answer.
    """
    header = json.dumps([processor_fingerprint, image.mode, image.size, canvas.shape])
    digest = hashlib.sha256(header.encode())
    digest.update(np.ascontiguousarray(canvas).data)
    return digest.hexdigest()


def _image_from_array(array: npt.NDArray[np.uint8], max_pixels: int) -> Image.Image:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        raise ImageError(
            "wrong kind of array",
            where="image array",
            expected="uint8 [height, width, 3] or [height, width]",
            found=f"{array.dtype} {list(array.shape)}",
        )
    _check_size((array.shape[1], array.shape[0]), "image array", max_pixels)
    return Image.fromarray(array)


def _image_from_file(name: str, max_pixels: int) -> Image.Image:
    if name.lower().startswith(URL_PREFIXES):
        raise ImageError(
            "URLs are never fetched", where=name[:80], hint="download the picture and pass its path or its bytes"
        )
    with _open_file(name) as stream:
        return _image_from_stream(stream, name, max_pixels)


def _open_file(name: str) -> BinaryIO:
    if not name:
        raise ImageError("the path is empty", where="image")
    try:
        if not stat.S_ISREG(Path(name).stat().st_mode):  # opening a pipe would wait for ever
            raise ImageError("not a regular file", where=name, hint="pass the path of one picture")
        return Path(name).open("rb")
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = getattr(error, "strerror", error)
        raise ImageError(f"cannot be read ({reason})", where=name[:400]) from error


def _image_from_stream(stream: BinaryIO, where: str, max_pixels: int) -> Image.Image:
    with _decoding(where):
        if not stream.read(1):
            raise ImageError("the file is empty", where=where)
        image = Image.open(stream, formats=FORMATS)
        _check_size(image.size, where, max_pixels)
        image.verify()  # reads every PNG checksum, which decoding skips, and leaves the image unusable
        image = Image.open(stream, formats=FORMATS)
        ImageOps.exif_transpose(image, in_place=True)  # decodes first
    return image


def _check_size(size: tuple[int, int], where: str, max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError("the picture has no pixels", where=where, found=f"{width}x{height}")
    if width * height > max_pixels:
        raise ImageError(
            "too many pixels",
            where=where,
            expected=f"at most {max_pixels}",
            found=f"{width}x{height} = {width * height}",
            hint="scale the picture down",
        )


@contextmanager
def _decoding(where: str) -> Iterator[None]:
    """Run Pillow on bytes nobody vouches for: no warning comes out, and no exception but our own."""
    try:
        with _pillow_is_quiet:
            yield
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        expected = ", ".join(FORMATS)
        raise ImageError("not a picture, or its header is damaged", where=where, expected=expected) from error
    except Image.DecompressionBombError as error:
        raise ImageError("too many pixels", where=where, found=error, hint="scale the picture down") from error
    except MemoryError as error:
        raise ResourceError("not enough memory to decode the picture", where=where) from error
    except Exception as error:  # Pillow's parsers let almost any built-in exception out of damaged files
        raise ImageError(
            "the picture is damaged or truncated", where=where, found=str(error) or type(error).__name__
        ) from error


class _PillowIsQuiet:
    """Silences the warnings Pillow gives about strange files, while any thread decodes.

    Warning filters belong to the process, and two overlapping `catch_warnings` in two threads restore each other's
    state: so the first decoder in installs one, and the last one out removes it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_decoders = 0
        self._filters = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._num_decoders == 0:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
            self._num_decoders += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num_decoders -= 1
            if self._num_decoders == 0:
                self._filters.__exit__(None, None, None)


_pillow_is_quiet = _PillowIsQuiet()
