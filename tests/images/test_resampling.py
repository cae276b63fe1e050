"""Bicubic resizing equals Pillow's and does not depend on the batch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dmjd.images.resampling import center_box, resample, resize_box

RNG = np.random.default_rng(0)


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
    # Overshoot is clipped between the two passes, whose order depends on Pillow's version, so avoid it.
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
