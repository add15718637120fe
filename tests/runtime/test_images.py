"""Decoding pictures: what is accepted, how it is oriented, and every way in which a picture can be wrong."""

from __future__ import annotations

import io
import os
import pickle
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mllama_runtime.errors import ImageError
from mllama_runtime.images import DEFAULT_MAX_PIXELS, FORMATS, load_image
from PIL import Image, ImageFile
from transformers.image_utils import load_image as reference_load_image

PHOTO = Image.fromarray(
    (np.add.outer(np.arange(60) * 3, np.arange(90))[..., None] * (1, 2, 3) % 256).astype(np.uint8)
)  # 90x60, no two rows or columns alike


@pytest.fixture(autouse=True)
def pillow_is_left_as_it_was() -> Iterator[None]:
    """No Pillow warning comes out, the filters and Pillow's own settings stay."""
    with warnings.catch_warnings(record=True) as leaked:
        warnings.simplefilter("always")
        before = list(warnings.filters), Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
        yield
        assert (list(warnings.filters), Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES) == before
    assert [str(warning.message) for warning in leaked if "PIL" in warning.filename] == []


def encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    fields = Image.Exif()
    fields[0x0112] = orientation
    return fields


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few dozen bytes with sound checksums and no pixels worth the name."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(bytes(100))) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def refusal(source: Any, **options: Any) -> str:
    with pytest.raises(ImageError) as caught:
        load_image(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert "object at 0x" not in message
    return message


# What is accepted


@pytest.mark.parametrize("file_format", [*FORMATS, "MPO"])
def test_a_file_and_its_bytes_decode_to_what_the_reference_reads(file_format: str, tmp_path: Path) -> None:
    path = tmp_path / "ein schönes Bild.dat"  # known by its content, not by its name
    path.write_bytes(encoded(PHOTO, file_format))
    expected = reference_load_image(str(path)).tobytes()
    for source in (path, str(path), path.read_bytes()):
        assert load_image(source).convert("RGB").tobytes() == expected


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_loaded_image_needs_its_file_no_longer(file_format: str, tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(encoded(PHOTO, file_format))
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    image = load_image(path)
    path.unlink()
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before
    assert image.copy().tobytes() == image.tobytes() == pickle.loads(pickle.dumps(image)).tobytes()
    assert image.resize((5, 5)).size == (5, 5)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_as_in_the_reference(orientation: int, file_format: str, tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(encoded(PHOTO, file_format, exif=exif(orientation)))
    image = load_image(path)
    assert image.size == ((90, 60) if orientation < 5 else (60, 90))
    assert image.tobytes() == reference_load_image(str(path)).tobytes()
    assert load_image(path.read_bytes()).tobytes() == image.tobytes()


def test_a_pillow_image_is_taken_as_it_is() -> None:
    image = Image.open(io.BytesIO(encoded(PHOTO, "PNG", exif=exif(6))))
    assert load_image(image) is image
    assert image.size == (90, 60)


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "MPO"])
def test_an_animation_gives_its_first_frame(file_format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if file_format == "WEBP" else {}
    image = load_image(encoded(frames[0], file_format, save_all=True, append_images=frames[1:], **options))
    red, green, blue = image.convert("RGB").getpixel((0, 0))  # type: ignore[misc]
    assert red > 250
    assert max(green, blue) < 5  # MPO is JPEG


def test_the_mode_is_kept_so_that_transparency_survives() -> None:
    assert load_image(encoded(PHOTO.convert("RGBA"), "PNG")).mode == "RGBA"
    assert load_image(encoded(PHOTO.quantize(16), "PNG", transparency=3)).info["transparency"] == 3


@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 3), (1, 1, 3), (3, 3, 3)])
def test_an_array_is_rows_of_pixels(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for source in (array, np.asfortranarray(array), array[::-1][::-1]):
        image = load_image(source)
        assert image.mode == ("L" if array.ndim == 2 else "RGB")
        np.testing.assert_array_equal(np.asarray(image), array)


def test_a_12_megapixel_photograph_passes() -> None:
    assert load_image(encoded(Image.new("L", (4000, 3000)), "PNG")).size == (4000, 3000)


# Damage


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_a_truncated_file_is_refused(file_format: str, share: float, tmp_path: Path) -> None:
    whole = encoded(PHOTO, file_format)
    path = tmp_path / "cut.png"
    path.write_bytes(whole[: int(len(whole) * share)])
    assert refusal(path).startswith(f"{path}: ")
    assert refusal(path.read_bytes()).startswith("image bytes: ")


def test_a_png_cut_anywhere_is_refused() -> None:
    whole = encoded(PHOTO.resize((9, 6)), "PNG")
    for length in range(len(whole) - 12):  # up to the empty chunk that ends it
        refusal(whole[:length])


def test_a_png_with_any_byte_of_its_pixels_or_their_checksum_changed_is_refused() -> None:
    whole = encoded(PHOTO.resize((9, 6)), "PNG")
    start = whole.index(b"IDAT") + 4
    for position in range(start, len(whole) - 12):
        changed = bytearray(whole)
        changed[position] ^= 1
        assert "checksum" in refusal(bytes(changed))


def test_a_png_whose_pixels_are_sound_but_whose_checksum_is_wrong_is_refused() -> None:
    whole = encoded(PHOTO, "PNG")
    broken = whole[:-16] + bytes(4) + whole[-12:]
    Image.open(io.BytesIO(broken)).load()  # decoding alone does not notice
    assert "checksum" in refusal(broken)


def test_random_damage_ends_in_a_picture_or_in_a_refusal() -> None:
    rng = np.random.default_rng(5)
    fields = exif(6)
    fields[0x010E] = "a description longer than four bytes"
    files = [encoded(PHOTO.resize((30, 20)), file_format) for file_format in FORMATS]
    files += [encoded(PHOTO.resize((30, 20)), file_format, exif=fields) for file_format in ("JPEG", "PNG", "WEBP")]
    num_refused = 0
    for _ in range(1500):
        data = bytearray(files[rng.integers(len(files))])
        for position in rng.integers(0, min(len(data), rng.choice([60, len(data)])), 3):
            data[position] = rng.integers(256)
        try:
            load_image(bytes(data))
        except ImageError:
            num_refused += 1
    assert 0 < num_refused < 1500


@pytest.mark.parametrize("content", [b"", b"\x00", b"a picture of a cat\n" * 50, b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
def test_what_is_no_picture_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "notes.png"
    path.write_bytes(content)
    expected = "expected JPEG, PNG, GIF, BMP, WEBP" if content else "the file is empty"
    assert refusal(path).startswith(f"{path}: ")
    assert refusal(path).endswith(expected)
    assert refusal(content).startswith("image bytes: ")


@pytest.mark.parametrize("file_format", ["TIFF", "PPM", "ICO", "TGA", "PDF"])
def test_formats_off_the_list_are_refused(file_format: str) -> None:
    assert "expected JPEG, PNG, GIF, BMP, WEBP" in refusal(encoded(PHOTO, file_format))


def test_a_lazy_pillow_image_that_proves_damaged_is_refused(tmp_path: Path) -> None:
    whole = encoded(PHOTO, "JPEG")
    assert refusal(Image.open(io.BytesIO(whole[: len(whole) // 2]))).startswith("image: the picture is damaged")
    path = tmp_path / "half.jpg"
    path.write_bytes(whole[: len(whole) // 2])
    with Image.open(path) as image:
        assert refusal(image).startswith(f"{path}: the picture is damaged")


# Bombs


@pytest.mark.parametrize(
    "bomb",
    [
        png_claiming(65535, 65535),  # past Pillow's own error
        png_claiming(10000, 10000),  # where Pillow warns
        png_claiming(8001, 8000),  # just past our limit
        b"GIF89a" + struct.pack("<HH", 65535, 65535) + encoded(PHOTO, "GIF")[10:],
        encoded(PHOTO, "BMP")[:18] + struct.pack("<ii", 65535, 65535) + encoded(PHOTO, "BMP")[26:],
        (lambda whole, at: whole[: at + 5] + b"\xff\xff\xff\xff" + whole[at + 9 :])(
            encoded(PHOTO, "JPEG"), encoded(PHOTO, "JPEG").index(b"\xff\xc0")
        ),
    ],
    ids=["png 65535", "png 10000", "png 8001", "gif", "bmp", "jpeg"],
)
def test_bombs_are_refused_by_their_header(bomb: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(_: ImageFile.ImageFile) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    assert "too many pixels" in refusal(bomb)


def test_the_limit_is_the_callers_and_exact() -> None:
    for source in (encoded(PHOTO, "PNG"), PHOTO, np.asarray(PHOTO)):
        assert load_image(source, max_pixels=5400).size == (90, 60)
        assert "expected at most 5399, found 90x60 = 5400" in refusal(source, max_pixels=5399)
    assert 4000 * 3000 < DEFAULT_MAX_PIXELS < 89_478_485  # Pillow's warning stays out of reach


# Sources


def test_names_that_are_no_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder.png").mkdir()
    assert "No such file" in refusal(tmp_path / "absent.png")
    assert "not a regular file" in refusal(tmp_path / "folder.png")
    assert "not a regular file" in refusal(tmp_path / "pipe")
    assert "name too long" in refusal("x" * 5000)
    assert len(refusal("x" * 5000)) < 600
    assert "null" in refusal("a\0b.png")
    assert "the path is empty" in refusal("")
    assert "No such file" in refusal("two\nlines.png")
    assert "regular file" in refusal("/dev/zero")


@pytest.mark.parametrize(
    "url", ["http://localhost/cat.png", "HTTPS://localhost/cat.png", "file:///etc/passwd", "data:image/png;base64,AAAA"]
)
def test_urls_are_never_fetched(url: str) -> None:
    message = refusal(url)
    assert "URLs are never fetched" in message
    assert "pass its path or its bytes" in message


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.bool_),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((), np.uint8),
    ],
    ids=lambda array: f"{array.dtype} {array.shape}",
)
def test_other_arrays_are_refused(array: np.ndarray[Any, Any]) -> None:
    message = refusal(array)
    assert "expected uint8 [height, width, 3] or [height, width]" in message
    assert f"found {array.dtype} {list(array.shape)}" in message


@pytest.mark.parametrize(
    "source",
    [np.zeros((0, 4, 3), np.uint8), np.zeros((4, 0), np.uint8), Image.new("RGB", (0, 4)), Image.new("L", (4, 0))],
    ids=["no rows", "no columns", "no width", "no height"],
)
def test_pictures_without_pixels_are_refused(source: Any) -> None:
    assert "no pixels" in refusal(source)


@pytest.mark.parametrize("source", [None, 7, [1, 2], io.BytesIO(b"")], ids=["None", "int", "list", "stream"])
def test_other_objects_are_refused(source: Any) -> None:
    assert f"found {type(source).__name__}" in refusal(source)


# Warnings


def strange_exif() -> bytes:
    """A sound JPEG whose EXIF block points outside itself, about which Pillow warns."""
    entry = struct.pack("<HHII", 0x010E, 2, 4000, 60000)  # a description of 4000 bytes, far away
    block = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)
    return encoded(PHOTO, "JPEG", exif=block)


def test_pillow_would_have_warned() -> None:
    """The fixture above proves nothing unless these pictures do warn."""
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(io.BytesIO(png_claiming(10000, 10000)))
    with pytest.warns(UserWarning, match="Skipping tag|Truncated"):
        Image.open(io.BytesIO(strange_exif())).getexif()


def test_strange_metadata_is_no_reason_to_warn() -> None:
    assert load_image(strange_exif()).size == (90, 60)


def test_threads_decode_at_once_and_leave_the_filters_alone() -> None:
    good, bad = strange_exif(), encoded(PHOTO, "JPEG")[:500]
    sizes: list[tuple[int, int]] = []

    def work() -> None:
        for _ in range(25):
            sizes.append(load_image(good).size)
            with pytest.raises(ImageError):
                load_image(bad)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sizes == [(90, 60)] * 100
