"""Masks hold the numbers that are stored, in every format, or are refused with a reason."""

import io
import os

import numpy as np
import pytest
import tifffile
from format_matrix import exif, png_file
from PIL import Image
from support import encoded

from dmjd.images.class_numbers import read_mask
from dmjd.images.stored import UnreadableImage, upright

NUMBERS = np.random.default_rng(0).integers(0, 4, (6, 8)).astype(np.uint8)


def tiff(values: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, metadata=None, **options)
    return file.getvalue()


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_gray_png_of_every_depth(bits):
    numbers = NUMBERS.astype(np.uint16) % min(4, 2**bits) * (257 if bits == 16 else 1)
    assert np.array_equal(read_mask(png_file(numbers, bits), "x"), numbers)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palette_png_of_every_depth(bits):
    palette = np.random.default_rng(1).integers(0, 256, (2**bits, 3)).astype(np.uint8).tobytes()
    numbers = NUMBERS % min(4, 2**bits)
    for more in ((), ((b"tRNS", b"\0" * 2),)):
        assert np.array_equal(read_mask(png_file(numbers, bits, 3, ((b"PLTE", palette), *more)), "x"), numbers)


@pytest.mark.parametrize("color", [2, 4, 6])
def test_png_of_16_bits_keeps_small_numbers(color):
    channels = {2: 3, 4: 2, 6: 4}[color]
    values = np.repeat(NUMBERS[..., None], channels, -1)
    assert np.array_equal(read_mask(png_file(values, 16, color), "x"), NUMBERS)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int8", "int16", "int32", "int64"])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
@pytest.mark.parametrize("order", "<>")
def test_tiff_of_every_type(dtype, photometric, order):
    for options in ({}, {"compression": "zlib"}, {"extratags": [(274, "H", 1, 6, True)]}):
        data = tiff(NUMBERS.astype(dtype), photometric=photometric, byteorder=order, **options)
        expected = upright(NUMBERS, 6) if "extratags" in options else NUMBERS
        assert np.array_equal(read_mask(data, "x"), expected)


def test_palette_tiff_and_orientation_of_png_file():
    colors = np.random.default_rng(1).integers(0, 65536, (3, 256)).astype(np.uint16)
    assert np.array_equal(read_mask(tiff(NUMBERS, photometric="palette", colormap=colors), "x"), NUMBERS)
    assert np.array_equal(read_mask(png_file(NUMBERS, 8, 0, ((b"eXIf", exif(6)),)), "x"), upright(NUMBERS, 6))


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
