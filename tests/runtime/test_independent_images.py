"""Decoding against files written here from the formats' definitions, EXIF's table and the formula of "over".

test_images.py and test_preprocessing.py have the first judge: Pillow itself, by way of transformers.
"""

from __future__ import annotations

import math
import struct
import zlib

import numpy as np
import pytest
from mllama_runtime.images import load_image
from mllama_runtime.preprocessing import rgb_image
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]  # [height, width, channels]
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of PNG's color types


def noise(*shape: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def paeth(left: int, above: int, corner: int) -> int:
    return min((left, above, corner), key=lambda x: abs(left + above - corner - x))


def filtered(pixels: Pixels) -> bytes:
    """PNG's five filters, a row each in turn."""
    height, width, channels = pixels.shape
    rows, written = pixels.reshape(height, width * channels).astype(int).tolist(), bytearray()
    for y, row in enumerate(rows):
        before = rows[y - 1] if y else [0] * len(row)
        written.append(y % 5)
        for x, value in enumerate(row):
            left, corner = (line[x - channels] if x >= channels else 0 for line in (row, before))
            guesses = (0, left, before[x], (left + before[x]) // 2, paeth(left, before[x], corner))
            written.append((value - guesses[y % 5]) % 256)
    return bytes(written)


def png(pixels: Pixels, color_type: int, *more: bytes) -> bytes:
    height, width, _ = pixels.shape
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, color_type, 0, 0, 0))
    return b"".join(
        (b"\x89PNG\r\n\x1a\n", header, *more, chunk(b"IDAT", zlib.compress(filtered(pixels))), chunk(b"IEND", b""))
    )


@pytest.mark.parametrize(("color_type", "mode"), [(0, "L"), (2, "RGB"), (4, "LA"), (6, "RGBA")])
def test_png(color_type: int, mode: str) -> None:
    pixels = noise(11, 7, CHANNELS[color_type])
    image = load_image(png(pixels, color_type))
    assert image.mode == mode
    np.testing.assert_array_equal(np.asarray(image).reshape(pixels.shape), pixels)


def test_png_with_a_palette() -> None:
    places, palette = noise(11, 7, 1, seed=1), noise(256, 3, seed=2)
    image = load_image(png(places, 3, chunk(b"PLTE", palette.tobytes())))
    np.testing.assert_array_equal(np.asarray(rgb_image(image)), palette[places[..., 0]])


def test_bmp() -> None:
    """From the lowest row up, blue first, rows filled up to four bytes."""
    pixels = noise(5, 3, 3, seed=3)
    rows = b"".join(row[:, ::-1].tobytes() + bytes(-9 % 4) for row in pixels[::-1])
    header = struct.pack("<2sIIIIiiHHIIiiII", b"BM", 54 + len(rows), 0, 54, 40, 3, 5, 1, 24, 0, len(rows), 0, 0, 0, 0)
    np.testing.assert_array_equal(np.asarray(load_image(header + rows)), pixels)


def test_gif() -> None:
    """Codes of nine bits; the table is cleared before they would grow."""
    places, palette = noise(20, 15, seed=4), noise(256, 3, seed=5)
    codes = [
        code for i, place in enumerate(places.ravel().tolist()) for code in ([256] if i % 200 == 0 else []) + [place]
    ]
    bits = sum(code << 9 * i for i, code in enumerate([*codes, 257]))
    data = bits.to_bytes((9 * (len(codes) + 1) + 7) // 8, "little")
    blocks = b"".join(bytes([len(part)]) + part for part in (data[i : i + 255] for i in range(0, len(data), 255)))
    screen = struct.pack("<6sHHBBB", b"GIF89a", 15, 20, 0xF7, 0, 0) + palette.tobytes()
    picture = struct.pack("<BHHHHBB", 0x2C, 0, 0, 15, 20, 0, 8)
    image = load_image(screen + picture + blocks + b"\x00;")
    np.testing.assert_array_equal(np.asarray(rgb_image(image)), palette[places])


ZIGZAG = sorted(np.ndindex(8, 8), key=lambda place: (sum(place), place[1 - sum(place) % 2]))  # (v, u)


def jpeg(blocks: NDArray[np.int64]) -> bytes:
    """Baseline JPEG, 8 pixels high, of blocks' coefficients: [blocks, components, 8, 8], none 0 among the first ten.

    Every code has four bits: 0 to 11 for a difference of so many bits; 0 for the end of a block, 1 to 10 likewise.
    """
    count, components = blocks.shape[:2]
    bits, before = "", [0] * components
    for block in blocks.tolist():
        for component, table in enumerate(block):
            values = [table[v][u] for v, u in ZIGZAG[:10]]
            values[0], before[component] = values[0] - before[component], values[0]
            for value in values:
                size = abs(value).bit_length()
                bits += f"{size:04b}" + (f"{value if value > 0 else value + 2**size - 1:0{size}b}" if size else "")
            bits += "0000"
    bits += "1" * (-len(bits) % 8)
    scan = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\x00")
    names = range(1, components + 1)
    frame = struct.pack(">BHHB", 8, 8, 8 * count, components) + b"".join(bytes((name, 0x11, 0)) for name in names)
    codes = bytes((0, 0, 0, 12, *[0] * 12, *range(12)))
    start = bytes((components, *(byte for name in names for byte in (name, 0)), 0, 63, 0))
    jfif = b"JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
    quantization = b"\x00" + b"\x01" * 64
    segments = {0xE0: jfif, 0xDB: quantization, 0xC0: frame, 0xC4: b"\x00" + codes + b"\x10" + codes, 0xDA: start}
    written = b"".join(struct.pack(">BBH", 0xFF, kind, 2 + len(data)) + data for kind, data in segments.items())
    return b"\xff\xd8" + written + scan + b"\xff\xd9"


@pytest.mark.parametrize("components", [1, 3])
def test_jpeg(components: int) -> None:
    """The inverse cosine transform of the standard (T.81, A.3.3) and the colors of JFIF, in float64."""
    rng = np.random.default_rng(10)
    blocks = np.zeros((6, components, 8, 8), np.int64)
    for v, u in ZIGZAG[:10]:
        blocks[:, :, v, u] = rng.integers(1, 250, blocks.shape[:2]) * rng.choice([-1, 1], blocks.shape[:2])
    waves = np.array([[math.cos((2 * x + 1) * u * math.pi / 16) / 2 for u in range(8)] for x in range(8)])
    waves[:, 0] /= math.sqrt(2)
    planes = np.hstack(list(np.moveaxis(waves @ blocks @ waves.T, 1, -1))) + 128  # [8, 48, components]
    planes = planes.clip(0, 255)
    if components == 3:
        blue, red = planes[..., 1] - 128, planes[..., 2] - 128
        shifts = (1.402 * red, -0.344136 * blue - 0.714136 * red, 1.772 * blue)
        planes = planes[..., :1] + np.stack(shifts, axis=-1)
    found = np.asarray(load_image(jpeg(blocks))).reshape(planes.shape)
    assert np.ptp(planes) > 200  # or the test says nothing
    # The decoder rounds each component and then the colors, of which blue takes 1.772 of a component.
    assert np.abs(found - planes.clip(0, 255)).max() < (0.6 if components == 1 else 2.1)


# What EXIF 2.3 says of Orientation: the side of the picture that row 0 is, and that column 0 is.
SIDES = {1: "top left", 2: "top right", 3: "bottom right", 4: "bottom left"} | {
    5: "left top",
    6: "right top",
    7: "right bottom",
    8: "left bottom",
}


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", SIDES)
def test_orientation(orientation: int, order: str) -> None:
    pixels = noise(4, 3, 3, seed=6)
    tiff = struct.pack(
        f"{order}2sHIHHHIHHI", b"II" if order == "<" else b"MM", 42, 8, 1, 0x112, 3, 1, orientation, 0, 0
    )
    found = np.asarray(load_image(png(pixels, 2, chunk(b"eXIf", tiff))))
    row_side, column_side = SIDES[orientation].split()
    assert found.shape[:2] == ((4, 3) if row_side in ("top", "bottom") else (3, 4))
    for row in range(4):
        for column in range(3):
            from_side = {row_side: row, column_side: column}
            y = from_side["top"] if "top" in from_side else found.shape[0] - 1 - from_side["bottom"]
            x = from_side["left"] if "left" in from_side else found.shape[1] - 1 - from_side["right"]
            assert found[y, x].tolist() == pixels[row, column].tolist()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_over_white(mode: str) -> None:
    """alpha * color + (1 - alpha) * 255 (Porter and Duff 1984), rounded, of every alpha and color."""
    color, alpha = (each.astype(np.uint8) for each in np.mgrid[:256, :256])
    bands = [color] * (len(mode) - 1) + [alpha]
    found = np.asarray(rgb_image(Image.merge(mode, [Image.fromarray(band) for band in bands])))
    exact = (alpha.astype(int) * color + (255 - alpha.astype(int)) * 255) / 255
    assert found.shape == (256, 256, 3)
    assert np.abs(found - exact[..., None]).max() < 0.5  # 255 is odd: no value is half way


def test_a_transparent_palette_is_over_white() -> None:
    places, palette, alphas = noise(11, 7, 1, seed=7), noise(256, 3, seed=8), noise(256, seed=9)
    image = load_image(png(places, 3, chunk(b"PLTE", palette.tobytes()), chunk(b"tRNS", alphas.tobytes())))
    exact = 255 - alphas[:, None].astype(int) * (255 - palette.astype(int)) / 255
    assert np.abs(np.asarray(rgb_image(image)) - exact[places[..., 0]]).max() <= 0.5
