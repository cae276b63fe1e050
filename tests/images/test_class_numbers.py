"""Masks hold the numbers that are stored, in every format, or are refused with a reason."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image
from support import encoded

from dmjd.images.class_numbers import read_mask
from dmjd.images.stored import UnreadableImage, upright

NUMBERS = np.random.default_rng(0).integers(0, 4, (6, 8)).astype(np.uint8)


def png(values: np.ndarray, bits: int, color: int = 0, chunks: tuple[tuple[bytes, bytes], ...] = ()) -> bytes:
    """A PNG of [H, W] or [H, W, C] values of 1 to 16 bits."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = values.reshape(len(values), -1).astype(">u2")
    each = np.unpackbits(rows.view(np.uint8).reshape(*rows.shape, 2), axis=-1)[..., 16 - bits :]
    packed = b"".join(b"\0" + np.packbits(row).tobytes() for row in each.reshape(len(rows), -1))
    header = struct.pack(">IIBBBBB", values.shape[1], len(values), bits, color, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(packed)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in parts)


def tiff(values: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, metadata=None, **options)
    return file.getvalue()


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_gray_png_of_every_depth(bits):
    numbers = NUMBERS.astype(np.uint16) % min(4, 2**bits) * (257 if bits == 16 else 1)
    assert np.array_equal(read_mask(png(numbers, bits), "x"), numbers)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palette_png_of_every_depth(bits):
    palette = np.random.default_rng(1).integers(0, 256, (2**bits, 3)).astype(np.uint8).tobytes()
    numbers = NUMBERS % min(4, 2**bits)
    for more in ((), ((b"tRNS", b"\0" * 2),)):
        assert np.array_equal(read_mask(png(numbers, bits, 3, ((b"PLTE", palette), *more)), "x"), numbers)


@pytest.mark.parametrize("color", [2, 4, 6])
def test_png_of_16_bits_keeps_small_numbers(color):
    channels = {2: 3, 4: 2, 6: 4}[color]
    values = np.repeat(NUMBERS[..., None], channels, -1)
    assert np.array_equal(read_mask(png(values, 16, color), "x"), NUMBERS)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int8", "int16", "int32", "int64"])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
@pytest.mark.parametrize("order", "<>")
def test_tiff_of_every_type(dtype, photometric, order):
    for options in ({}, {"compression": "zlib"}, {"extratags": [(274, "H", 1, 6, True)]}):
        data = tiff(NUMBERS.astype(dtype), photometric=photometric, byteorder=order, **options)
        expected = upright(NUMBERS, 6) if "extratags" in options else NUMBERS
        assert np.array_equal(read_mask(data, "x"), expected)


def test_palette_tiff_and_orientation_of_png():
    colors = np.random.default_rng(1).integers(0, 65536, (3, 256)).astype(np.uint16)
    assert np.array_equal(read_mask(tiff(NUMBERS, photometric="palette", colormap=colors), "x"), NUMBERS)
    exif = struct.pack(">2sHIHHHIHHI", b"MM", 42, 8, 1, 274, 3, 1, 6, 0, 0)
    assert np.array_equal(read_mask(png(NUMBERS, 8, 0, ((b"eXIf", exif),)), "x"), upright(NUMBERS, 6))


def test_what_is_no_mask_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    float_npy = io.BytesIO()
    np.save(float_npy, NUMBERS.astype(np.float32))
    cases = {
        "it is a FIFO, not a file": tmp_path / "a.png",
        "the file is empty": b"",
        "not an image in a known format": b"%!PS-Adobe-3.0 EPSF-3.0",
        "it is a JPEG": encoded(Image.fromarray(NUMBERS), "JPEG"),
        "it is a WEBP": encoded(Image.fromarray(NUMBERS), "WEBP"),
        "float32": float_npy.getvalue(),
        "outside 0..65535": tiff(NUMBERS.astype(np.int16) - 2, photometric="minisblack"),
        "whose end is missing": float_npy.getvalue()[:-4],
    }
    for message, source in cases.items():
        with pytest.raises(UnreadableImage, match=message):
            read_mask(source, "x")
