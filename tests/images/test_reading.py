import io
import json
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dmjd.images.decoding import UnreadableImage
from dmjd.images.preprocess import IMAGENET_MEAN, Preprocess
from dmjd.images.reading import read_image
from dmjd.images.resampling import center_box, resample, resize_box

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _no_warning_escapes():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def colors(height=12, width=16, channels=3):
    """A smooth image, which JPEG keeps nearly as it is."""
    rows, columns = np.mgrid[0:height, 0:width].astype(float)
    planes = [rows * 10 + 20 * c + columns * (4 + c) for c in range(channels)]
    return np.stack(planes, -1).clip(0, 255).astype(np.uint8)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


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
    image = colors()
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


def test_gray_is_repeated_and_color_becomes_luminance():
    gray = colors()[..., 0]
    assert (read_image(encoded(Image.fromarray(gray), "PNG")) == gray[..., None]).all()
    assert (read_image(encoded(Image.fromarray(gray), "PNG"), 1)[..., 0] == gray).all()
    image = Image.fromarray(colors())
    assert (read_image(image, 1)[..., 0] == np.asarray(image.convert("L"))).all()


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


def test_alpha_is_composited_over_white_or_kept():
    array = np.array([[[100, 50, 0, 255], [100, 50, 0, 0], [100, 50, 0, 51]]], np.uint8)
    data = encoded(Image.fromarray(array), "PNG")
    assert read_image(data).tolist() == [[[100, 50, 0], [255, 255, 255], [224, 214, 204]]]
    assert (read_image(data, 4) == array).all()
    assert read_image(Image.fromarray(array[..., :3]), 4)[0, :, 3].tolist() == [255, 255, 255]
    gray_alpha = Image.fromarray(np.ascontiguousarray(array[..., [0, 3]]))
    assert read_image(encoded(gray_alpha, "PNG"), 1)[0, :, 0].tolist() == [100, 255, 224]


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
    """A 16-bit RGB PNG by hand: Pillow writes none."""
    import struct
    import zlib

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
    image = Image.fromarray(colors(8, 16))
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


@pytest.mark.parametrize("shape", [(6, 8, 5), (5, 6, 8)])
def test_npy_layouts(tmp_path, shape):
    array = RNG.random(shape, dtype=np.float32)
    np.save(tmp_path / "a.npy", array)
    last = array if shape[2] == 5 else array.transpose(1, 2, 0)
    np.testing.assert_allclose(read_image(tmp_path / "a.npy", 5), last * 255, rtol=1e-6)


def test_gray_array_of_three_rows_is_not_taken_for_three_channels():
    assert read_image(np.arange(24, dtype=np.uint8).reshape(3, 8)).shape == (3, 8, 3)


def test_npy_gray_and_big_endian(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[0, 65535]], ">u2"))
    assert read_image(tmp_path / "a.npy").tolist() == [[[0, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.float32([[0, np.nan]]), "not finite"),
        (np.float32([[0, 200]]), "value_range"),
        (np.int64([[0, 200]]), "value_range"),
        (np.array([["a"]]), "no pixels"),
        (np.zeros((2, 2, 2, 2), np.uint8), "expected"),
        (np.zeros((0, 4), np.uint8), "nothing to see"),
    ],
)
def test_arrays_that_are_no_images(array, reason):
    with pytest.raises(UnreadableImage, match=reason):
        read_image(array)


def test_int_array_with_value_range():
    assert read_image(np.int64([[-5, 0, 50, 100, 900]]), 1, (0, 100))[0, :, 0].tolist() == [0, 0, 127.5, 255, 255]


def bad_files(folder: Path):
    good = encoded(Image.fromarray(RNG.integers(0, 255, (64, 64, 3), dtype=np.uint8)), "JPEG")
    png = encoded(Image.fromarray(RNG.integers(0, 255, (64, 64, 3), dtype=np.uint8)), "PNG")
    contents = {
        "text.jpg": b"these are words",
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
    return encoded(Image.new("1", (20_000, 20_000)), "PNG", compress_level=9)


def test_every_bad_file_is_a_bad_image_with_one_line(tmp_path, capfd):
    for path in bad_files(tmp_path):
        with pytest.raises(UnreadableImage) as caught:
            read_image(path)
        error = pickle.loads(pickle.dumps(caught.value))
        assert error.name == str(path)
        assert error.reason
        assert "\n" not in str(error)
        assert len(error.reason) < 200
    assert capfd.readouterr() == ("", "")


def test_reasons_are_readable(tmp_path):
    reasons = {}
    for path in bad_files(tmp_path):
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
        assert read_image(encoded(Image.fromarray(colors(11, 11)), "PNG")).shape == (11, 11, 3)
    finally:
        Image.MAX_IMAGE_PIXELS = before


def test_paths_with_spaces_and_unicode(tmp_path):
    path = tmp_path / "ein Bild – 写真 ü.png"
    Image.fromarray(colors()).save(path)
    assert (read_image(path) == colors()).all()
    assert (read_image(str(path)) == colors()).all()


boxes_in = st.tuples(st.integers(1, 40), st.integers(1, 40)).flatmap(
    lambda side: st.tuples(
        st.just(side),
        st.integers(1, side[0]).flatmap(lambda h: st.tuples(st.integers(0, side[0] - h), st.just(h))),
        st.integers(1, side[1]).flatmap(lambda w: st.tuples(st.integers(0, side[1] - w), st.just(w))),
    )
)


@settings(max_examples=100, deadline=None)
@given(boxes_in, st.tuples(st.integers(1, 50), st.integers(1, 50)), st.booleans(), st.integers(0, 2**32 - 1))
def test_resample_is_pillows_bicubic(box, size, flip, seed):
    (H, W), (top, height), (left, width) = box
    # Overshoot is cut off between the two passes, whose order depends on Pillow's version: leave room for it.
    image = np.random.default_rng(seed).integers(70, 186, (H, W, 3), dtype=np.uint8)
    pil = Image.fromarray(image).resize(
        size[::-1], Image.Resampling.BICUBIC, box=(left, top, left + width, top + height)
    )
    expected = np.asarray(pil).transpose(2, 0, 1).astype(int)
    boxes = torch.tensor([[top, left, height, width]])
    ours = resample(torch.from_numpy(image).permute(2, 0, 1)[None], boxes, size, torch.tensor([flip]))[0]
    assert ours.dtype == torch.uint8
    # Pillow rounds to bytes between its passes: half a level, which the second pass's weights can raise a little.
    difference = np.abs(ours.numpy() - (expected[..., ::-1] if flip else expected))
    assert difference.max() <= 2
    assert (difference > 1).mean() < 0.02


def test_resample_of_floats_is_the_unrounded_uint8():
    image = torch.randint(60, 190, (4, 5, 30, 40), dtype=torch.uint8)
    boxes = torch.tensor([[0, 0, 30, 40], [3, 4, 20, 20], [1.5, 2.25, 10.5, 7.75], [29, 39, 1, 1]])
    a, b = resample(image, boxes, (17, 13)), resample(image.float(), boxes, (17, 13))
    assert b.dtype == torch.float32
    assert (a - b).abs().max() < 1.5


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_resample_does_not_depend_on_the_rest_of_the_batch_or_on_chosen_precision(dtype):
    images = (torch.rand(37, 3, 48, 40) * 255).to(dtype)
    boxes = torch.tensor([[2, 3, 40, 30]]).repeat(37, 1)
    whole = resample(images, boxes, (32, 24))
    parts = torch.cat([resample(images[i : i + 5], boxes[i : i + 5], (32, 24)) for i in range(0, 37, 5)])
    assert torch.equal(whole, parts)
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(whole, resample(images, boxes, (32, 24)))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(chosen)


def test_plain_images_stay_plain():
    for value in (0, 1, 254, 255):
        image = torch.full((1, 1, 999, 700), value, dtype=torch.uint8)
        assert (resample(image, torch.tensor([[0, 0, 999, 700]]), (7, 5)) == value).all()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_resample_gives_the_same_bits_on_cuda(dtype):
    images = (torch.rand(64, 3, 96, 80) * 255).to(dtype)
    boxes = torch.tensor([[2, 3, 80, 70]]).repeat(64, 1)
    flips = torch.arange(64) % 2 == 0
    on_cuda = resample(images.cuda(), boxes, (32, 32), flips)
    assert torch.equal(resample(images, boxes, (32, 32), flips), on_cuda.cpu())


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
def test_resize_box_treats_channels_alike(channels):
    image = RNG.integers(0, 256, (20, 30, channels), dtype=np.uint8)
    together = resize_box(image, (2, 3, 15, 20), (11, 12))
    apart = torch.cat([resize_box(image[..., [c]], (2, 3, 15, 20), (11, 12)) for c in range(channels)])
    assert together.shape == (channels, 11, 12)
    assert (together.int() - apart.int()).abs().max() <= 1


def test_center_box_fills_the_shorter_side():
    assert center_box(100, 200, (50, 50)) == (0, 50, 100, 100)
    assert center_box(200, 100, (20, 40)) == (75, 0, 50, 100)


@settings(max_examples=200, deadline=None)
@given(*[st.integers(1, 999)] * 2, *[st.integers(1, 60)] * 2)
def test_preprocess_fits_any_image(height, width, h, w):
    preprocess = Preprocess((h, w), 1, (0.5,), (0.5,))
    assert (preprocess.fit(np.full((height, width, 1), 7, np.uint8)) == 7).all()
    top, left, box_height, box_width = center_box(height, width, (h, w))
    assert top >= 0
    assert left >= 0
    assert top + box_height <= height
    assert left + box_width <= width


@pytest.mark.parametrize("shape", [(5, 3, 32, 32), (3, 16, 16), (0, 3, 8, 8), (2, 2, 3, 8, 8), (3, 3, 300, 300)])
def test_bytes_are_normalized_to_the_bits_of_floats(shape):
    """Bytes are normalized in parts."""
    raw = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    preprocess = Preprocess(shape[-2:], 3, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    assert torch.equal(preprocess.normalize(raw), preprocess.normalize(raw.float()))


def test_preprocess_takes_any_image_and_normalizes(tmp_path):
    preprocess = Preprocess((8, 8))
    image = colors(16, 24)
    Image.fromarray(image).save(tmp_path / "p.png")
    images = [tmp_path / "p.png", str(tmp_path / "p.png"), image, Image.fromarray(image)]
    batch = preprocess(images)
    assert batch.shape == (4, 3, 8, 8)
    assert batch.dtype == torch.float32
    assert all(torch.equal(batch[0], one) for one in batch)
    assert torch.equal(preprocess(image), batch[:1])
    raw = preprocess.raw(image)
    assert torch.equal(preprocess.normalize(raw), batch[:1])
    assert torch.equal(preprocess.normalize(raw.to(torch.uint8)), batch[:1])
    torch.testing.assert_close(preprocess.denormalize(batch[:1]), raw, rtol=0, atol=1e-3)
    expected = (raw[0, 0] / 255 - IMAGENET_MEAN[0]) / 0.229
    torch.testing.assert_close(batch[0, 0], expected)


def test_preprocess_survives_json():
    preprocess = Preprocess((4, 6), 2, (0.1, 0.2), (0.3, 0.4), (0.0, 4095.0))
    assert Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict()))) == preprocess


@pytest.mark.parametrize(
    "wrong", [{"in_chans": 2}, {"std": (0.1, 0.0, 0.1)}, {"value_range": (3, 3)}, {"mean": (0.5,)}]
)
def test_preprocess_refuses_what_does_not_fit(wrong):
    with pytest.raises(ValueError, match=r"channels|std|value_range"):
        Preprocess((8, 8), **wrong)


def test_preprocess_names_the_bad_image(tmp_path):
    with pytest.raises(UnreadableImage, match=r"missing\.png: no such file"):
        Preprocess((8, 8))(tmp_path / "missing.png")
