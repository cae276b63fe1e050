"""Pixels that mean nothing: which they are in each format, and what becomes of them until the encoder."""

import io

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dmjd.images.invalid import (
    InvalidPixels,
    invalid_pixels,
    mark_invalid,
    valid_pixels,
    valid_share,
    valid_tokens,
)
from dmjd.images.preprocess import Preprocess
from dmjd.images.reading import read_image
from dmjd.images.resampling import resample, resize_box
from dmjd.images.stored import UnreadableImage

NAN = np.float32(np.nan)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tiff(array: np.ndarray, nodata: str | None = None, **options) -> bytes:
    file = io.BytesIO()
    tags = [] if nodata is None else [(42113, "s", 0, nodata, True)]
    tifffile.imwrite(file, array, extratags=tags, **options)
    return file.getvalue()


def as_npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def rgba(alpha: list[int]) -> Image.Image:
    """One row of pixels (100, 150, 200), with these values of alpha."""
    return Image.fromarray(np.array([[[100, 150, 200, a] for a in alpha]], np.uint8))


def test_transparent_pixels_are_invalid_and_others_keep_their_color():
    found = read_image(encoded(rgba([0, 1, 255]), "PNG"), 3, invalid=InvalidPixels(alpha=True))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [[[NAN] * 3, [100, 150, 200], [100, 150, 200]]])
    four = read_image(encoded(rgba([0, 128]), "PNG"), 4, invalid=InvalidPixels(alpha=True))
    np.testing.assert_array_equal(four, [[[NAN] * 4, [100, 150, 200, 128]]])
    gray = read_image(encoded(rgba([0, 255]).convert("LA"), "PNG"), 1, invalid=InvalidPixels(alpha=True))
    assert np.isnan(gray[0, 0, 0])
    assert gray[0, 1, 0] == 141
    assert (read_image(encoded(rgba([0]), "PNG"), 3) == 255).all(), "white, where it is off"


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "GIF"])
def test_every_format_with_alpha(kind):
    image = rgba([0, 255, 255, 255])
    options = {"lossless": True} if kind == "WEBP" else {}
    found = read_image(encoded(image, kind, **options), 3, invalid=InvalidPixels(alpha=True))
    assert np.isnan(found).all(axis=2).tolist() == [[True, False, False, False]]


def test_alpha_of_16_bit_pngs_and_of_a_color_that_is_transparent(tmp_path):
    import torchvision

    values = torch.full((4, 1, 2), 65535, dtype=torch.uint16)
    values[3, 0, 0] = 0
    values[0, 0, 1] = 13107
    try:
        data = bytes(torchvision.io.encode_png(values).numpy())
    except RuntimeError:
        data = None  # this build writes 8 bits only
    if data is not None:
        found = read_image(data, 3, invalid=InvalidPixels(alpha=True))
        np.testing.assert_array_equal(found, [[[NAN] * 3, [51, 255, 255]]])
    gray = Image.fromarray(np.array([[7, 8]], np.uint8))
    found = read_image(encoded(gray, "PNG", transparency=7), 1, invalid=InvalidPixels(alpha=True))
    np.testing.assert_array_equal(found, [[[NAN], [8]]])


def test_alpha_without_an_alpha_channel_makes_nothing_invalid():
    image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    found = read_image(encoded(image, "PNG"), 3, invalid=InvalidPixels(alpha=True))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.asarray(image))


def test_values_that_are_not_finite_in_float_images():
    array = np.array([[[0.5, np.nan, 1.0], [np.inf, 0.0, -np.inf]]], np.float32)
    with pytest.raises(UnreadableImage, match="not finite: --nodata auto takes them as invalid"):
        read_image(array, 3)
    for data in (array, as_npy(array), tiff(array, photometric="rgb")):
        found = read_image(data, 3, invalid=InvalidPixels())
        np.testing.assert_array_equal(found, [[[127.5, NAN, 255], [NAN, 0, NAN]]])


def test_the_value_of_a_geotiff_in_five_channels():
    array = np.full((4, 3, 5), 0.2, np.float32)
    array[0] = -9999
    array[1, 0, 2] = -9999  # one band alone
    data = tiff(array, "-9999 ", photometric="minisblack", planarconfig="contig")
    with pytest.raises(UnreadableImage, match=r"outside 0\.\.1: .*; of these -9999 means no data: --nodata auto"):
        read_image(data, 5)
    expected = np.where(array == -9999, NAN, np.float32(51))
    np.testing.assert_allclose(read_image(data, 5, invalid=InvalidPixels()), expected, rtol=1e-6)
    # Another value counts besides that of the file.
    both = np.where(array[..., :1] == -9999, NAN, expected)
    array[3] = -1
    data = tiff(array, "-9999", photometric="minisblack", planarconfig="contig")
    both[3] = NAN
    both[1, 0] = [51, 51, NAN, 51, 51]
    np.testing.assert_allclose(read_image(data, 5, invalid=InvalidPixels(-1.0)), both, rtol=1e-6)


@pytest.mark.parametrize("text", ["-3.4028234663852886e+38", "-3.40282347e+38"])
def test_the_usual_value_of_float_tiffs(text):
    array = np.array([[np.finfo(np.float32).min, 0.5]], np.float32)
    found = read_image(tiff(array, text), 1, invalid=InvalidPixels())
    np.testing.assert_array_equal(found[..., 0], [[NAN, 127.5]])


def test_a_tag_that_is_no_number_counts_for_nothing():
    array = np.array([[3, 4]], np.uint8)
    assert read_image(tiff(array, "none"), 1, invalid=InvalidPixels()).dtype == np.uint8


def test_a_drone_image_with_five_bands_and_alpha():
    array = np.full((1, 2, 6), 6553, np.uint16)
    array[..., 5] = [0, 65535]
    data = tiff(array, photometric="minisblack", planarconfig="contig", extrasamples=[0, 0, 0, 0, 2])
    with pytest.raises(UnreadableImage, match="6 channels, in_chans is 5"):
        read_image(data, 5)
    found = read_image(data, 5, invalid=InvalidPixels(alpha=True))
    np.testing.assert_allclose(found, [[[NAN] * 5, [25.498] * 5]], atol=1e-3)
    assert read_image(data, 6).shape == (1, 2, 6)


def test_a_value_of_16_bits_is_one_of_each_channel_and_of_8_bits_one_of_all():
    sixteen = np.array([[[0, 0, 0], [0, 65535, 65535]]], np.uint16)
    found = read_image(sixteen, 3, invalid=InvalidPixels(0.0))
    np.testing.assert_array_equal(found, [[[NAN] * 3, [NAN, 255, 255]]])
    eight = np.array([[[0, 0, 0], [0, 9, 9]]], np.uint8)
    found = read_image(eight, 3, invalid=InvalidPixels(0.0))
    np.testing.assert_array_equal(found, [[[NAN] * 3, [0, 9, 9]]])


def test_a_jpeg_with_black_corners():
    array = np.full((32, 32, 3), 200, np.uint8)
    array[:16, :16] = 0
    data = encoded(Image.fromarray(array), "JPEG", quality=100)
    found = read_image(data, 3, invalid=InvalidPixels(0.0))
    np.testing.assert_array_equal(np.isnan(found).all(axis=2), (array == 0).all(axis=2))
    assert read_image(data, 3, invalid=InvalidPixels()).dtype == np.uint8


def test_signed_integers_only_need_a_range_for_what_is_valid():
    array = np.array([[-9999, 0, 1000]], np.int16)
    found = read_image(tiff(array), 1, (0, 1000), invalid=InvalidPixels(-9999.0))
    np.testing.assert_array_equal(found[..., 0], [[NAN, 0, 255]])


@pytest.mark.parametrize("value", [-9999.0, 0.5, 1e300, float("nan")])
def test_a_value_that_the_type_does_not_have_makes_nothing_invalid(value):
    array = np.array([[0, 1, 255]], np.uint8)
    assert read_image(array, 1, invalid=InvalidPixels(value)).dtype == np.uint8


def test_an_image_without_a_valid_pixel_is_unreadable():
    for array in (np.full((4, 4, 3), np.nan, np.float32), np.zeros((4, 4, 3), np.uint8)):
        with pytest.raises(UnreadableImage, match="none of its pixels is valid"):
            read_image(array, 3, invalid=InvalidPixels(0.0))


def test_a_fill_takes_the_place_of_nan():
    array = np.array([[[0.5, np.nan, 1.0]]], np.float32)
    found = read_image(array, 3, invalid=InvalidPixels(fill=(1.0, 2.0, 3.0)))
    np.testing.assert_array_equal(found, [[[127.5, 2, 255]]])


def test_settings_are_off_by_default():
    assert invalid_pixels(None, "white") is None
    assert invalid_pixels("auto", "white") == InvalidPixels(None, False)
    assert invalid_pixels("-9999", "invalid") == InvalidPixels(-9999.0, True)


# Resizing


def test_halving_by_hand():
    """A column of 8 values to 4: what is mostly invalid stays so, and the rest keeps its value."""
    image = np.array([[100, 100, 100, 100, NAN, NAN, NAN, NAN]], np.float32).T[..., None]
    found = resize_box(image, (0, 0, 8, 1), (4, 1))[0, :, 0]
    np.testing.assert_allclose(found, [100, 100, NAN, NAN], rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(2, 24), st.integers(2, 24)),
    st.tuples(st.integers(1, 30), st.integers(1, 30)),
    st.floats(0.05, 0.95),
    st.integers(0, 2**32 - 1),
)
def test_resizing_never_sees_what_is_invalid(size, out, share, seed):
    rng = np.random.default_rng(seed)
    image = rng.uniform(20, 235, (*size, 2)).astype(np.float32)
    hole = rng.random((*size, 2)) < share
    hole[0, 0] = False
    holed = np.where(hole, NAN, image)
    box = (0, 0, *size)
    found = resize_box(holed, box, out)
    valid = torch.from_numpy(~hole).permute(2, 0, 1)
    weight = resample(valid[None] * 1024.0, torch.tensor([box]), out)[0] / 1024
    if size == out:
        assert torch.equal(found.isnan(), ~valid)
        return
    assert torch.equal(found.isnan(), weight < 0.5)
    for channel in range(2):
        known = found[channel][found[channel].isfinite() & (weight[channel] != 1)]
        inside = image[..., channel][~hole[..., channel]]
        assert (known >= inside.min()).all()
        assert (known <= inside.max()).all()
    constant = resize_box(np.where(hole, NAN, np.float32(77)), box, out)
    assert torch.equal(constant.isnan(), found.isnan())
    torch.testing.assert_close(constant.nan_to_num(77), torch.full_like(constant, 77), rtol=0, atol=1e-3)


def test_far_from_what_is_invalid_resizing_is_as_ever():
    image = np.random.default_rng(0).uniform(0, 255, (20, 40, 3)).astype(np.float32)
    holed = image.copy()
    holed[:, :10] = np.nan
    box, size = (1, 0, 17, 40), (11, 16)
    found, whole = resize_box(holed, box, size), resize_box(image, box, size)
    assert torch.equal(found[..., 7:], whole[..., 7:])  # 2.5 pixels wide, and a kernel of 5 to each side
    assert found[..., :4].isnan().all()


def test_fit_and_normalize_make_invalid_pixels_the_mean():
    preprocess = Preprocess((2, 2), 1, (0.4,), (0.2,), nodata="auto")
    image = np.array([[np.nan, 0.4], [0.6, 0.2]], np.float32)
    normalized = preprocess(image)
    torch.testing.assert_close(normalized[0, 0], torch.tensor([[0.0, 0.0], [1.0, -1.0]]))
    assert valid_pixels(normalized)[0, 0].tolist() == [[False, True], [True, True]], "a valid mean is not invalid"
    raw = preprocess.raw(image)
    torch.testing.assert_close(preprocess.filled(raw)[0, 0], torch.tensor([[102.0, 102.0], [153.0, 51.0]]))
    assert torch.equal(preprocess.normalize(preprocess.filled(raw)), normalized)
    assert preprocess.filling == InvalidPixels(fill=(102.0,))


def test_the_settings_are_part_of_the_preprocessing():
    on = Preprocess((8, 8), 1, (0.5,), (0.2,), nodata=-9999, alpha="invalid")  # type: ignore[arg-type]
    assert on.to_dict()["nodata"] == "-9999"
    assert Preprocess.from_dict(on.to_dict()) == on
    off = Preprocess((8, 8))
    assert set(off.to_dict()) == {"img_size", "in_chans", "mean", "std", "value_range"}
    assert Preprocess.from_dict(off.to_dict()) == off
    for wrong in ({"nodata": "abc"}, {"alpha": "black"}):
        with pytest.raises(ValueError, match=r"nodata must be auto|alpha must be one of"):
            Preprocess((8, 8), **wrong)


def test_marks_and_tokens():
    x = torch.tensor([0.0, float("nan"), -1e-9, 3.0, -0.0])
    marked = mark_invalid(x)
    assert marked.tolist() == [0.0, 0.0, pytest.approx(-1e-9), 3.0, 0.0]
    assert valid_pixels(marked).tolist() == [True, False, True, True, True]
    preprocess = Preprocess((2, 2), 1, (0.0,), (1.0,), nodata="auto")  # stored values may be -0.0, too
    assert valid_pixels(preprocess(np.array([[-0.0, 0.0], [0.5, np.nan]], np.float32))).sum() == 3
    valid = torch.ones(1, 3, 4, 8, dtype=torch.bool)
    valid[0, :, :2, :4] = False  # half of the first token, of 4 x 4 pixels
    assert valid_tokens(valid, 4).tolist() == [[True, True]]
    valid[0, 0, 2, 0] = False
    assert valid_tokens(valid, 4).tolist() == [[False, True]]


def test_share_of_boxes():
    image = np.ones((4, 6, 2), np.float32)
    image[:2] = np.nan
    image[3, 5, 0] = np.nan
    boxes = np.array([[0, 0, 4, 6], [2, 0, 2, 6], [0, 1, 2, 2], [3, 5, 1, 1], [1, 0, 2, 3]], np.float64)
    by_hand = [np.isfinite(image[t : t + h, x : x + w]).mean() for t, x, h, w in boxes.astype(int)]
    np.testing.assert_allclose(valid_share(image, boxes), by_hand)
    assert by_hand[0] == 23 / 48
