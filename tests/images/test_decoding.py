"""Decoding of every format, and error messages for damaged files."""

import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from support import encoded, smooth_image

from dmjd.images.reading import read_image
from dmjd.images.stored import UnreadableImage

pytestmark = pytest.mark.usefixtures("warnings_are_errors")

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG", {"quality": 100, "subsampling": 0}, 3),
    ],
)
def test_every_format_gives_the_same_pixels(kind, options, tolerance):
    image = smooth_image()
    read = read_image(encoded(Image.fromarray(image), kind, **options))
    assert read.dtype == np.uint8
    assert read.flags.c_contiguous
    assert np.abs(read.astype(int) - image).max() <= tolerance


def test_gif_gives_its_first_frame():
    frames = [Image.new("P", (5, 4), value) for value in (0, 1)]
    frames[0].putpalette([250, 10, 20, 0, 0, 0])
    frames[1].putpalette([250, 10, 20, 0, 0, 0])
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (read_image(data) == [250, 10, 20]).all()


def test_one_bit_image_is_black_and_white():
    image = Image.fromarray(np.eye(4, dtype=bool))
    assert (read_image(encoded(image, "PNG"), 1)[..., 0] == np.eye(4) * 255).all()


def test_palette_with_and_without_transparency():
    image = Image.new("P", (2, 1))
    image.putpixel((1, 0), 1)
    image.putpalette([200, 30, 40, 10, 20, 30])
    assert read_image(encoded(image, "PNG")).tolist() == [[[200, 30, 40], [10, 20, 30]]]
    see_through = encoded(image, "PNG", transparency=bytes([255, 0]))
    assert read_image(see_through).tolist() == [[[200, 30, 40], [255, 255, 255]]]
    assert read_image(see_through, 4).tolist() == [[[200, 30, 40, 255], [10, 20, 30, 0]]]


def test_cmyk_jpeg_is_not_inverted():
    image = Image.new("RGB", (16, 16), (200, 60, 40)).convert("CMYK")
    read = read_image(encoded(image, "JPEG", quality=95))
    assert np.abs(read.astype(int) - [200, 60, 40]).max() < 12


def test_sixteen_bit_gray_png_keeps_its_steps():
    values = np.array([[0, 1, 257], [1000, 40000, 65535]], np.uint16)
    read = read_image(encoded(Image.fromarray(values), "PNG"), 1)
    assert read.dtype == np.float32
    np.testing.assert_allclose(read[..., 0], values / 257, rtol=1e-6)
    ranged = read_image(encoded(Image.fromarray(values), "PNG"), 1, value_range=(0, 1000))
    np.testing.assert_allclose(ranged[..., 0], values.clip(0, 1000) * 0.255, rtol=1e-6)


def test_sixteen_bit_color_png_keeps_its_steps():
    values = RNG.integers(0, 65536, (3, 5, 6), dtype=np.uint16)
    np.testing.assert_allclose(read_image(_png16(values)), values.transpose(1, 2, 0) / 257, rtol=1e-6)


def _png16(planes):
    """A 16-bit RGB PNG; Pillow cannot write them."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width = planes.shape[1:]
    rows = planes.transpose(1, 2, 0).astype(">u2")
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_exif_rotation_is_applied_once(orientation, kind):
    image = Image.fromarray(smooth_image(8, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = {
        1: image,
        2: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: image.transpose(Image.Transpose.ROTATE_180),
        4: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: image.transpose(Image.Transpose.TRANSPOSE),
        6: image.transpose(Image.Transpose.ROTATE_270),
        7: image.transpose(Image.Transpose.TRANSVERSE),
        8: image.transpose(Image.Transpose.ROTATE_90),
    }[orientation]
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    read = read_image(encoded(image, kind, exif=exif, **options))
    expected = np.asarray(upright).astype(int)
    assert read.shape == expected.shape
    assert np.abs(read - expected).max() <= (4 if kind == "JPEG" else 0)


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_five_channel_tiff(tmp_path, planar, dtype):
    array = RNG.integers(0, np.iinfo(dtype).max, (7, 9, 5), dtype=dtype)
    stored = array if planar == "contig" else array.transpose(2, 0, 1)
    path = tmp_path / "five.tif"
    tifffile.imwrite(path, stored, planarconfig=planar, photometric="minisblack", compression="zlib")
    np.testing.assert_allclose(read_image(path, 5), array / (np.iinfo(dtype).max / 255), rtol=1e-6)
    with pytest.raises(UnreadableImage, match="5 channels, in_chans is 3"):
        read_image(path)


def test_sixteen_bit_color_tiff_keeps_its_steps(tmp_path):
    array = RNG.integers(0, 65536, (6, 8, 3), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "c.tif", array, photometric="rgb")
    np.testing.assert_allclose(read_image(tmp_path / "c.tif"), array / 257, rtol=1e-6)


def test_gray_tiffs_of_many_types(tmp_path):
    for array in (np.float32([[0, 0.5, 1]]), np.uint16([[0, 32768, 65535]]), np.uint8([[0, 128, 255]])):
        tifffile.imwrite(tmp_path / "g.tif", array)
        top = 1.0 if array.dtype.kind == "f" else np.iinfo(array.dtype).max
        np.testing.assert_allclose(read_image(tmp_path / "g.tif", 1)[..., 0], array * (255 / top), rtol=1e-6)


@pytest.fixture(scope="module")
def unreadable_files(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("unreadable")
    good = encoded(Image.fromarray(RNG.integers(0, 255, (64, 64, 3), dtype=np.uint8)), "JPEG")
    png = encoded(Image.fromarray(RNG.integers(0, 255, (64, 64, 3), dtype=np.uint8)), "PNG")
    contents = {
        "text.jpg": b"this is text",
        "cut.jpg": good[: len(good) // 2],
        "cut.png": png[: len(png) // 2],
        "head.tif": b"II*\0" + bytes(20),
        "head.npy": b"\x93NUMPY\1\0",
        "empty.png": b"",
        "bomb.png": _bomb(),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    np.save(folder / "pickled.npy", np.array([{"code": 1}]), allow_pickle=True)
    (folder / "folder.jpg").mkdir()
    return [folder / name for name in [*contents, "pickled.npy", "folder.jpg", "missing.jpg"]]


def _bomb():
    """A PNG that claims 20,000 x 20,000 pixels."""
    small = encoded(Image.new("1", (8, 8)), "PNG")
    header = small[12:16] + struct.pack(">II", 20_000, 20_000) + small[24:29]
    return small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]


def test_a_file_that_cannot_be_decoded_is_named_in_one_line(unreadable_files, capfd):
    for path in unreadable_files:
        with pytest.raises(UnreadableImage) as caught:
            read_image(path)
        error = pickle.loads(pickle.dumps(caught.value))
        assert error.name == str(path)
        assert error.reason
        assert "\n" not in str(error)
        assert len(error.reason) < 200
    assert capfd.readouterr() == ("", "")


def test_reasons_are_readable(unreadable_files):
    reasons = {}
    for path in unreadable_files:
        with pytest.raises(UnreadableImage) as caught:
            read_image(path)
        reasons[path.name] = caught.value.reason
    assert reasons["empty.png"] == "the file is empty"
    assert reasons["text.jpg"] == "not an image in a known format"
    assert "178,956,970 pixels" in reasons["bomb.png"]
    assert "truncated" in reasons["cut.jpg"]
    assert reasons["missing.jpg"] == "no such file or directory"


def test_large_but_allowed_image_gives_no_warning():
    Image.MAX_IMAGE_PIXELS, before = 100, Image.MAX_IMAGE_PIXELS
    try:
        assert read_image(encoded(Image.fromarray(smooth_image(11, 11)), "PNG")).shape == (11, 11, 3)
    finally:
        Image.MAX_IMAGE_PIXELS = before
