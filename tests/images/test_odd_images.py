"""Images that few programs write: the right pixels, or a reason."""

import ast
import io
import os
import stat
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from format_matrix import exif
from PIL import Image
from support import encoded, smooth_image

import dmjd
from dmjd.images.class_numbers import read_mask
from dmjd.images.preprocess import Preprocess
from dmjd.images.reading import read_image
from dmjd.images.stored import MAX_PIXELS, UnreadableImage, upright

COLORS = smooth_image(24, 32)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_read(kind):
    frames = [Image.new("RGB", (24, 24), (value,) * 3) for value in (0, 255, 128)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert (read_image(data) == 0).all()


def test_cmyk_jpeg_with_adobe_marker():
    """Photoshop and Pillow store the inks inverted and say so in a marker."""
    cmyk = Image.fromarray(COLORS).convert("CMYK")
    data = encoded(cmyk, "JPEG", quality=100, subsampling=0)
    assert b"Adobe" in data[:200]
    assert np.abs(read_image(data).astype(int) - COLORS).max() <= 12  # black ink and compression


@pytest.mark.parametrize("orientation", [3, 6, 8])
@pytest.mark.parametrize("kind", ["WEBP", "JPEG", "PNG"])
def test_exif_orientation(kind, orientation):
    options = {"lossless": True} if kind == "WEBP" else {"quality": 98, "subsampling": 0} if kind == "JPEG" else {}
    marker = b"Exif\0\0" if kind != "PNG" else b""
    data = encoded(Image.fromarray(COLORS), kind, exif=marker + exif(orientation), **options)
    assert np.abs(read_image(data).astype(int) - upright(COLORS, orientation)).max() <= (6 if kind == "JPEG" else 0)


def test_palette_with_transparency_and_one_bit():
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    data = encoded(palette, "PNG", transparency=1)
    assert (read_image(data) == 255).all()  # over white
    assert (read_image(data, 4) == (200, 100, 50, 0)).all()
    bits = np.eye(8, dtype=bool)
    for kind in ("PNG", "BMP", "TIFF", "GIF"):
        assert np.array_equal(read_image(encoded(Image.fromarray(bits), kind), 1)[..., 0], bits * 255), kind


def bomb(height: int, width: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    good = encoded(Image.new("L", (4, 4)), "PNG")
    return good[:12] + header + struct.pack(">I", zlib.crc32(header)) + good[33:]


@pytest.mark.parametrize("size", [(100_000, 100_000), (2**30, 2**30), (1, MAX_PIXELS + 1)])
def test_headers_that_promise_too_many_pixels(size):
    for read in (read_image, lambda data: read_mask(data, "x")):
        with pytest.raises(UnreadableImage, match=r"pixels|not an image"):
            read(bomb(*size))


@pytest.mark.parametrize("shape", [(4, 4, 3), (99_999, 99_999, 3), (2**40, 2**40)])
def test_arrays_that_promise_more_than_the_file_holds(tmp_path, shape):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    (tmp_path / "a.npy").write_bytes(file.getvalue() + b"1" * 40)
    for source in (tmp_path / "a.npy", (tmp_path / "a.npy").read_bytes()):
        with pytest.raises(UnreadableImage, match="whose end is missing"):
            read_image(source)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_cut_files_are_unreadable(kind):
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3)).astype(np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    for length in (0, 1, 9, 40, len(data) // 2):
        with pytest.raises(UnreadableImage):
            read_image(data[:length])


def test_no_program_is_started(tmp_path, monkeypatch):
    """Pillow would give PostScript to a program called gs, whatever the name of the file is."""
    program, marker = tmp_path / "bin" / "gs", tmp_path / "started"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {marker}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    file = tmp_path / "a.jpg"
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
    for read in (read_image, lambda path: read_mask(path, "x")):
        with pytest.raises(UnreadableImage, match="not an image in a known format"):
            read(file)
    assert not marker.exists()


def test_every_opening_names_its_formats():
    package = Path(dmjd.__file__).parent
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Image.open", "PIL.Image.open"):
                assert "formats" in {keyword.arg for keyword in node.keywords}, f"{file}:{node.lineno}"


def test_binary_files_are_images(tmp_path):
    data = encoded(Image.fromarray(COLORS), "PNG")
    (tmp_path / "a.png").write_bytes(data)
    preprocess, file = Preprocess((16, 16)), io.BytesIO(data)
    file.read()  # as after writing it
    expected = preprocess(tmp_path / "a.png")
    with (tmp_path / "a.png").open("rb") as opened:
        for image in (file, opened, [io.BytesIO(data)], bytearray(data)):
            assert torch.equal(preprocess(image), expected)
    assert np.array_equal(read_image(file), COLORS)
    for wrong in (3, None, torch.zeros(3, 4, 4), [3.0]):
        with pytest.raises(TypeError, match=r"an image is a path|not iterable"):
            preprocess(wrong)
