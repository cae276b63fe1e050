"""Preprocessing: any image, any number of images, errors, JSON."""

import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support import smooth_image

from dmjd.images.preprocess import IMAGENET_MEAN, Preprocess
from dmjd.images.resampling import center_box
from dmjd.images.stored import UnreadableImage

pytestmark = pytest.mark.usefixtures("warnings_are_errors")


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
    """uint8 images are normalized in chunks."""
    raw = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    preprocess = Preprocess(shape[-2:], 3, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    assert torch.equal(preprocess.normalize(raw), preprocess.normalize(raw.float()))


def test_preprocess_takes_any_image_and_normalizes(tmp_path):
    preprocess = Preprocess((8, 8))
    image = smooth_image(16, 24)
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


@pytest.mark.parametrize(("former", "name"), [("normalise", "normalize"), ("denormalise", "denormalize")])
def test_former_names_are_errors_with_the_new_names(former, name):
    preprocess = Preprocess((8, 8))
    with pytest.raises(AttributeError, match=rf"no attribute '{former}'; it was renamed to '{name}'"):
        getattr(preprocess, former)
    with pytest.raises(AttributeError, match=r"no attribute 'nonsense'$"):
        _ = preprocess.nonsense
    assert pickle.loads(pickle.dumps(preprocess)) == preprocess


def test_an_empty_batch():
    assert Preprocess((8, 16), 3)([]).shape == (0, 3, 8, 16)


@pytest.mark.parametrize("method", ["normalize", "denormalize"])
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.ones(2, 4, 8, 8), r"images must be \[..., 3, H, W\], got \[2, 4, 8, 8\]"),
        (torch.ones(8, 8), r"images must be \[..., 3, H, W\], got \[8, 8\]"),
        (np.ones((2, 3, 8, 8)), r"images must be a \[..., C, H, W\] tensor, got ndarray"),
    ],
)
def test_what_is_no_batch_of_images(method, images, message):
    with pytest.raises(ValueError, match=message):
        getattr(Preprocess((8, 8)), method)(images)


@pytest.mark.parametrize("image", [None, 3, [None]])
def test_what_is_no_image(image):
    with pytest.raises(TypeError, match="an image is a path, bytes, a binary file, a PIL image or an array, not"):
        Preprocess((8, 8))(image)
