import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from dmjd.data.transforms import crop_boxes, crop_resize, flips

KEYS = torch.arange(20_000) * 7919


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=20),
    st.floats(0.01, 1).flatmap(lambda lo: st.tuples(st.just(lo), st.floats(lo, 1))),
    st.integers(-(2**63), 2**63 - 30),
)
def test_boxes_are_whole_and_inside_the_image(sizes, scale, first_key):
    sides = torch.tensor(sizes)
    boxes = crop_boxes(torch.arange(len(sizes)) + first_key, sides, scale)
    assert boxes.dtype == torch.float64
    assert torch.equal(boxes, boxes.round())
    top, left, height, width = boxes.unbind(1)
    assert (height >= 1).all()
    assert (width >= 1).all()
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= sides[:, 0]).all()
    assert (left + width <= sides[:, 1]).all()


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(12)), st.integers(1, 11))
def test_a_box_depends_on_its_key_only(order, cut):
    keys, sides = KEYS[:12], torch.randint(10, 300, (12, 2), generator=torch.Generator().manual_seed(0))
    boxes = crop_boxes(keys, sides)
    assert torch.equal(crop_boxes(keys[order], sides[order]), boxes[order])
    assert torch.equal(torch.cat([crop_boxes(keys[:cut], sides[:cut]), crop_boxes(keys[cut:], sides[cut:])]), boxes)


@pytest.mark.parametrize(("height", "width"), [(48, 64), (200, 100), (30, 200)])
def test_same_distribution_as_torchvision(height, width):
    torch.manual_seed(0)
    crop, n = RandomResizedCrop(8, scale=(0.5, 1.0)), 3000
    image = torch.empty(3, height, width)
    theirs = torch.tensor([crop.get_params(image, crop.scale, crop.ratio) for _ in range(n)]).double()
    ours = crop_boxes(KEYS[:n], torch.tensor([[height, width]]).expand(n, 2))
    for column in range(4):
        a, b = (np.sort(x[:, column].numpy()) for x in (theirs, ours))
        grid = np.unique(np.concatenate([a, b]))
        distance = np.abs(np.searchsorted(a, grid, "right") - np.searchsorted(b, grid, "right")).max() / n
        assert distance < 0.05  # Kolmogorov-Smirnov distance; larger by chance once in a thousand times


def test_if_no_crop_fits_the_center_is_taken():
    boxes = crop_boxes(KEYS[:1], torch.tensor([[10, 1000]]))
    assert boxes.tolist() == [[0, 493, 10, 13]]
    assert crop_boxes(KEYS[:1], torch.tensor([[1000, 10]])).tolist() == [[493, 0, 13, 10]]


def test_half_of_the_flips_are_true_and_independent_of_the_crop():
    mirrored = flips(KEYS)
    assert abs(mirrored.double().mean() - 0.5) < 0.015
    left = crop_boxes(KEYS, torch.tensor([[64, 64]]).expand(len(KEYS), 2))[:, 1]
    assert abs(left[mirrored].mean() - left[~mirrored].mean()) < 0.3


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_crop_resize_keeps_type_and_mirrors(channels, dtype):
    image = np.random.default_rng(0).integers(0, 256, (20, 30, channels)).astype(dtype)
    plain = crop_resize(image, (2, 3, 15, 20), (8, 9))
    assert plain.shape == (channels, 8, 9)
    assert plain.numpy().dtype == dtype
    assert torch.equal(crop_resize(image, (2, 3, 15, 20), (8, 9), flip=True), plain.flip(-1))


def test_crop_of_the_whole_image_at_its_size_is_the_image():
    image = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    assert (crop_resize(image, (0, 0, 12, 10), (12, 10)).permute(1, 2, 0).numpy() == image).all()
