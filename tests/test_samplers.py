"""The mask samplers: draws, counts, ratios and errors."""

import pytest
import torch

from dmjd.masking import (
    SAMPLERS,
    ComplementaryMasks,
    DisjointMasks,
    IndependentMasks,
    Masks,
    MaskSampler,
    disjoint_masks,
)
from dmjd.rng import image_keys

KEYS = image_keys(0, torch.tensor(0), torch.arange(50))


def same(a: Masks, b: Masks) -> bool:
    return all(torch.equal(getattr(a, field), getattr(b, field)) for field in ("visible", "masked", "mask"))


@pytest.mark.parametrize("p", [None, 0.8])
@pytest.mark.parametrize("block_size", [1, 2, None])
def test_samplers_draw_what_the_function_draws(p, block_size):
    keys, grid = KEYS[:5], (6, 8)
    sampler = DisjointMasks(3, 0.5, p, block_size)
    assert same(sampler.draw(keys, grid), disjoint_masks(5, grid, 3, 0.5, p, block_size, keys=keys))
    masks = IndependentMasks(3, 0.5, block_size).draw(keys, grid)
    assert same(masks, disjoint_masks(5, grid, 3, 0.5, None, block_size, disjoint=False, keys=keys))


@pytest.mark.parametrize(
    "sampler", [DisjointMasks(), DisjointMasks(3, 0.5, 0.7, 1), IndependentMasks(), ComplementaryMasks()]
)
def test_counts_are_those_of_the_draw(sampler):
    masks = sampler.draw(KEYS, (4, 4))
    V, M, U = sampler.counts((4, 4))
    union = masks.mask.any(0).sum(-1)
    assert (len(masks.visible), masks.visible.shape[-1], masks.masked.shape[-1]) == (sampler.num_views, V, M)
    assert bool((union <= U).all())
    if not isinstance(sampler, IndependentMasks):
        assert bool((union == U).all())


@pytest.mark.parametrize(
    ("K", "grid", "block_size"), [(2, (3, 4), 1), (3, (3, 5), 1), (4, (14, 14), 1), (4, (8, 8), 2)]
)
def test_complementary_visible_sets_partition_the_image(K, grid, block_size):
    sampler = ComplementaryMasks(K, block_size=block_size)
    masks = sampler.draw(KEYS[:20], grid)
    assert bool(((~masks.mask).sum(0) == 1).all())
    assert sampler.mask_ratio == 1 - 1 / K


@pytest.mark.parametrize(
    ("sampler", "p"),
    [
        (DisjointMasks(2, 0.6), 1.0),
        (DisjointMasks(2, 0.3), 0.6),
        (DisjointMasks(2, 0.6, 0.9), 0.9),
        (IndependentMasks(2, 0.6), 0.84),
        (ComplementaryMasks(4), 1.0),
    ],
)
def test_requested_prediction_ratio(sampler, p):
    assert sampler.pred_ratio == pytest.approx(p)


def test_samplers_by_name():
    assert set(SAMPLERS) == {"disjoint", "independent", "complementary"}
    assert all(issubclass(cls, MaskSampler) for cls in SAMPLERS.values())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DisjointMasks(num_views=0), "num_views must be at least 1, got 0"),
        (lambda: DisjointMasks(num_views=2.5), "num_views must be int, got 2.5"),
        (lambda: DisjointMasks(block_size=0), "block_size must be at least 1, got 0"),
        (lambda: DisjointMasks(mask_ratio=1.0), "mask_ratio must lie between 0 and 1"),
        (lambda: DisjointMasks(pred_ratio=0.5), r"pred_ratio must lie in \[0.6, 1\]"),
        (lambda: IndependentMasks(mask_ratio=0.0), "mask_ratio must lie between 0 and 1"),
        (lambda: ComplementaryMasks(1), "at least 2, got 1"),
        (lambda: ComplementaryMasks(4, 0.6), "complementary masks of 4 views have mask_ratio 0.75"),
        (lambda: ComplementaryMasks(4).counts((3, 3)), "num_views 4 does not divide the 9 blocks of 1 x 1 tokens"),
        (lambda: DisjointMasks(block_size=4).counts((14, 14)), "block_size 4 does not divide"),
    ],
)
def test_sampler_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
