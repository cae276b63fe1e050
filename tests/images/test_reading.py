"""Channels, alpha, value range and array layout of images."""

import resource

import numpy as np
import pytest
from PIL import Image
from support import encoded, smooth_image

from dmjd.images.reading import read_image
from dmjd.images.stored import UnreadableImage

pytestmark = pytest.mark.usefixtures("warnings_are_errors")

RNG = np.random.default_rng(0)


def test_gray_is_repeated_and_color_becomes_luminance():
    gray = smooth_image()[..., 0]
    assert (read_image(encoded(Image.fromarray(gray), "PNG")) == gray[..., None]).all()
    assert (read_image(encoded(Image.fromarray(gray), "PNG"), 1)[..., 0] == gray).all()
    image = Image.fromarray(smooth_image())
    assert (read_image(image, 1)[..., 0] == np.asarray(image.convert("L"))).all()


def test_alpha_is_composited_over_white_or_kept():
    array = np.array([[[100, 50, 0, 255], [100, 50, 0, 0], [100, 50, 0, 51]]], np.uint8)
    data = encoded(Image.fromarray(array), "PNG")
    assert read_image(data).tolist() == [[[100, 50, 0], [255, 255, 255], [224, 214, 204]]]
    assert (read_image(data, 4) == array).all()
    assert read_image(Image.fromarray(array[..., :3]), 4)[0, :, 3].tolist() == [255, 255, 255]
    gray_alpha = Image.fromarray(np.ascontiguousarray(array[..., [0, 3]]))
    assert read_image(encoded(gray_alpha, "PNG"), 1)[0, :, 0].tolist() == [100, 255, 224]


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
        (np.float32([[0, 200]]), "--value-range LO HI"),
        (np.int64([[0, 200]]), "--value-range LO HI"),
        (np.array([["a"]]), "are not pixels"),
        (np.zeros((2, 2, 2, 2), np.uint8), "expected"),
        (np.zeros((0, 4), np.uint8), "the image is empty"),
        (np.zeros((4, 3, 0), np.uint8), "the image is empty"),
    ],
)
def test_arrays_that_are_not_images(array, reason):
    with pytest.raises(UnreadableImage, match=reason):
        read_image(array)


def test_int_array_with_value_range():
    assert read_image(np.int64([[-5, 0, 50, 100, 900]]), 1, (0, 100))[0, :, 0].tolist() == [0, 0, 127.5, 255, 255]


def test_paths_with_spaces_and_unicode(tmp_path):
    path = tmp_path / "ein Bild – 写真 ü.png"
    Image.fromarray(smooth_image()).save(path)
    assert (read_image(path) == smooth_image()).all()
    assert (read_image(str(path)) == smooth_image()).all()


def test_too_many_open_files_do_not_make_an_image_unreadable(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(encoded(Image.fromarray(smooth_image()), "PNG"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            read_image(file)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    read_image(file)
