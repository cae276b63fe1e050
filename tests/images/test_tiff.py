"""Every cell of a matrix of TIFF and 16-bit PNG files is read right or refused with its reason."""

import io
import itertools
import os
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image
from support import SHARED

from dmjd.images.class_numbers import read_mask
from dmjd.images.reading import read_image
from dmjd.images.stored import UnreadableImage, upright

RNG = np.random.default_rng(0)
H, W = 6, 9
FAULTS = SHARED / "faults"
RANGES = {"uint32": (0, 4294967295), "int16_signed": (-1000, 1000), "gray_alpha_12bit": (0, 4095)}


def tiff_of(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, metadata=None, **options)
    return file.getvalue()


def values_of(dtype: str, samples: int) -> np.ndarray:
    if dtype.startswith("float"):
        return RNG.random((H, W, samples)).astype(dtype)
    info = np.iinfo(dtype)
    return RNG.integers(info.min, info.max, (H, W, samples), dtype=dtype, endpoint=True)


def scaled(values: np.ndarray) -> tuple[np.ndarray, tuple[float, float] | None]:
    """Expected values on the 0..255 scale, and the range to read them with."""
    kind = values.dtype
    lo, hi = (0, 1) if kind.kind == "f" else (np.iinfo(kind).min, np.iinfo(kind).max)
    natural = kind in (np.uint8, np.uint16) or kind.kind == "f"
    return (values.astype(np.float64) - lo) * 255 / (float(hi) - lo), None if natural else (float(lo), float(hi))


DTYPES = ("uint8", "uint16", "uint32", "int8", "int16", "int32", "float32", "float64")


@pytest.mark.parametrize(("dtype", "order"), itertools.product(DTYPES, "<>"))
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_every_sample_format(dtype, order, compression):
    for samples, planar in ((1, None), (3, "contig"), (3, "separate"), (5, "contig"), (5, "separate")):
        values = values_of(dtype, samples)
        stored = values[..., 0] if samples == 1 else values.transpose(2, 0, 1) if planar == "separate" else values
        photometric = "rgb" if samples == 3 else "minisblack"
        options = {"photometric": photometric, "byteorder": order, "compression": compression}
        data = tiff_of(stored, **options | ({"planarconfig": planar} if planar else {}))
        expected, value_range = scaled(values)
        read = read_image(data, samples, value_range)
        np.testing.assert_allclose(read, expected, atol=1e-3, err_msg=f"{samples} {planar}")


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize(("kind", "name"), [(0, "unspecified"), (1, "assocalpha"), (2, "unassalpha")])
def test_a_band_is_alpha_only_where_the_file_says_so(dtype, kind, name):
    values = values_of(dtype, 4)
    if kind == 1:  # premultiplied: no color is brighter than its alpha
        top = np.iinfo(dtype).max
        values[..., :3] = (values[..., :3].astype(np.float64) * values[..., 3:] / top).astype(dtype)
    data = tiff_of(values, photometric="rgb", extrasamples=[name])
    expected, _ = scaled(values)
    color, alpha = expected[..., :3], expected[..., 3:] / 255
    on_white = {0: color, 1: color + 255 * (1 - alpha), 2: color * alpha + 255 * (1 - alpha)}[kind]
    assert np.abs(read_image(data, 3) - on_white).max() <= (2.1 if dtype == "uint8" else 0.02)
    if kind != 1:
        np.testing.assert_allclose(read_image(data, 4), expected, atol=1e-3)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_white_is_zero(dtype):
    values = values_of(dtype, 1)
    expected, _ = scaled(values)
    np.testing.assert_allclose(
        read_image(tiff_of(values[..., 0], photometric="miniswhite"), 1), 255 - expected, atol=1e-3
    )


def test_cmyk_of_both_depths_agree():
    values = values_of("uint8", 4)
    eight = read_image(tiff_of(values, photometric="separated"), 3)
    sixteen = read_image(tiff_of(values.astype(np.uint16) * 257, photometric="separated"), 3)
    assert np.abs(eight - sixteen).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("dtype", "samples"), [("uint8", 3), ("uint16", 1), ("uint16", 3), ("float32", 5)])
def test_orientation(orientation, dtype, samples):
    values = values_of(dtype, samples)
    stored = values[..., 0] if samples == 1 else values
    tag = [(274, "H", 1, orientation, True)]
    layout = {"photometric": "minisblack"} if samples == 1 else {"photometric": "rgb", "planarconfig": "contig"}
    data = tiff_of(stored, extratags=tag, **layout)
    expected, _ = scaled(upright(values, orientation))
    np.testing.assert_allclose(read_image(data, samples), expected, atol=1e-3)


@pytest.mark.parametrize("channels", [2, 3, 4, 5])
@pytest.mark.parametrize("form", ["imagej", "ome"])
def test_pages_that_are_channels(channels, form, tmp_path):
    values = values_of("uint16", channels)
    file = tmp_path / ("a.ome.tif" if form == "ome" else "a.tif")
    tifffile.imwrite(
        file, values.transpose(2, 0, 1), photometric="minisblack", metadata={"axes": "CYX"}, **{form: True}
    )
    expected, _ = scaled(values)
    np.testing.assert_allclose(read_image(file, channels), expected, atol=1e-3)
    with pytest.raises(UnreadableImage, match=f"it has {channels} channels, in_chans is 7"):
        read_image(file, 7)


@pytest.mark.parametrize("axes", ["ZCYX", "CZYX", "TCYX", "CTZYX"])
def test_channels_of_an_ome_stack_are_those_of_its_first_plane(axes, tmp_path):
    shape = {"C": 3, "Z": 2, "T": 2, "Y": H, "X": W}
    values = RNG.integers(0, 65536, [shape[axis] for axis in axes], dtype=np.uint16)
    file = tmp_path / "a.ome.tif"
    tifffile.imwrite(file, values, photometric="minisblack", metadata={"axes": axes}, ome=True)
    first = values[tuple(slice(None) if axis in "CYX" else 0 for axis in axes)]
    expected, _ = scaled(first.transpose(1, 2, 0))
    np.testing.assert_allclose(read_image(file, 3), expected, atol=1e-3)


def ome(*planes: str, channels: int = 1) -> str:
    data = "".join(f'<TiffData IFD="0"><UUID FileName="{name}">urn:uuid:1</UUID></TiffData>' for name in planes)
    return (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image><Pixels '
        f'DimensionOrder="XYCZT" Type="uint16" SizeX="{W}" SizeY="{H}" SizeC="{channels}" SizeZ="1" SizeT="1">'
        f"{data}</Pixels></Image></OME>"
    )


def test_other_files_of_an_ome_set_are_not_opened(tmp_path):
    values = values_of("uint16", 1)[..., 0]
    os.mkfifo(tmp_path / "other.tif")  # opening it would wait for ever
    file = tmp_path / "a.ome.tif"
    tifffile.imwrite(file, values, description=ome("other.tif"), metadata=None)
    np.testing.assert_allclose(read_image(file, 1), scaled(values[..., None])[0], atol=1e-3)
    tifffile.imwrite(file, values, description=ome("a.ome.tif", "other.tif", channels=2), metadata=None)
    with pytest.raises(UnreadableImage, match="its OME metadata is of 2 planes, the file holds 1"):
        read_image(file, 1)


def test_other_pages_are_other_images():
    """A scanned document, or a stack of time steps."""
    pages = values_of("uint16", 3).transpose(2, 0, 1)
    read = read_image(tiff_of(pages, photometric="minisblack"), 3)
    expected, _ = scaled(pages[0])
    np.testing.assert_allclose(read[..., 1], expected, atol=1e-3)


def test_a_missing_decoder_is_not_a_damaged_file(tmp_path):
    file = tmp_path / "a.tif"
    Image.fromarray(values_of("uint16", 1)[..., 0]).save(file, compression="tiff_lzw")
    expected, _ = scaled(np.asarray(Image.open(file))[..., None])
    np.testing.assert_allclose(read_image(file, 1), expected, atol=1e-3)  # gray needs none
    pytest.importorskip("imagecodecs")
    colors = values_of("uint16", 3)
    expected, _ = scaled(colors)
    for options in ({"compression": "lzw"}, {"compression": "lzw", "predictor": True}, {"compression": "zstd"}):
        np.testing.assert_allclose(read_image(tiff_of(colors, photometric="rgb", **options), 3), expected, atol=1e-3)


def png_of(values: np.ndarray, chunks: bytes = b"") -> bytes:
    """A 16-bit PNG of [H, W, C]."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    h, w, c = values.shape
    header = struct.pack(">IIBBBBB", w, h, 16, {1: 0, 2: 4, 3: 2, 4: 6}[c], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    extra = b"".join(chunk(kind, data) for kind, data in chunks) if chunks else b""
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("orientation", [1, 6, 8])
def test_png_of_16_bits(channels, orientation):
    values = values_of("uint16", channels)
    exif = struct.pack(">2sHIHHHIHHI", b"MM", 42, 8, 1, 274, 3, 1, orientation, 0, 0)
    expected, _ = scaled(upright(values, orientation))
    data = png_of(values, [(b"eXIf", exif)])
    if channels in (1, 3):
        np.testing.assert_allclose(read_image(data, channels), expected, atol=1e-3)
        return
    alpha = expected[..., -1:] / 255
    on_white = expected[..., :-1] * alpha + 255 * (1 - alpha)
    np.testing.assert_allclose(read_image(data, channels - 1), on_white, atol=1e-2)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_of_16_bits_with_a_transparent_color(channels):
    values = values_of("uint16", channels)
    values[2, 3] = 1234
    data = png_of(values, [(b"tRNS", struct.pack(">H", 1234) * channels)])
    read = read_image(data, channels)
    assert (read[2, 3] == 255).all()
    expected, _ = scaled(values)
    np.testing.assert_allclose(
        np.delete(read.reshape(-1, channels), 2 * W + 3, 0),
        np.delete(expected.reshape(-1, channels), 2 * W + 3, 0),
        atol=1e-2,
    )


def test_postscript_named_jpg_is_refused(tmp_path):
    file = tmp_path / "a.jpg"
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(UnreadableImage, match="not an image in a known format"):
        read_image(file)


@pytest.mark.skipif(not FAULTS.exists(), reason="the shared files that go wrong are not here")
def test_files_that_went_wrong():
    for wanted in sorted(FAULTS.glob("*.want.npy")):
        name, expected = wanted.name.removesuffix(".want.npy"), np.load(wanted)
        file = next(file for file in FAULTS.glob(f"{name}.*") if file.suffix != ".npy")
        if name.startswith("mask"):
            assert (read_mask(file, name) == expected).all(), name
            continue
        read = read_image(file, expected.shape[2], RANGES.get(name))
        assert read.shape == expected.shape, name
        assert np.abs(read - expected).max() <= 0.5, name  # one of them is rounded to 8 bits


@pytest.mark.parametrize("bands", [2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_one_channel_of_gray_with_bands_is_the_first(bands, dtype):
    """They are not red, green and blue, which would be mixed."""
    values = np.random.default_rng(0).integers(0, 255, (5, 6, bands)).astype(dtype)
    file = io.BytesIO()
    tifffile.imwrite(file, values, photometric="minisblack", planarconfig="contig")
    scale = 255 / np.iinfo(dtype).max
    np.testing.assert_allclose(read_image(file.getvalue(), 1)[..., 0], values[..., 0] * scale, rtol=1e-6)
