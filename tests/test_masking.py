"""Invariants of the masks over the whole range of settings and at the edges of floating point."""

import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from dmjd.masking import Masks, disjoint_masks, mask_counts, num_decoded, resolve_block_size
from dmjd.rng import image_keys


def keys_of(n: int, seed: int = 0) -> torch.Tensor:
    return image_keys(seed, torch.tensor(0), torch.arange(n))


def floor_with_tolerance(value: Fraction) -> int:
    return math.floor(value + Fraction(1, 10**6))


@st.composite
def ratios_of(draw, num_units: int) -> float:
    """Any mask ratio, with those at or next to a whole number of units."""
    whole = draw(st.integers(0, num_units)) / num_units
    edge = draw(
        st.sampled_from([whole, 1 - whole, whole + 1e-9, whole - 1e-9, math.nextafter(whole, 0), 1 - (1 - whole)])
    )
    return draw(st.sampled_from([edge, draw(st.floats(0.0, 1.0, exclude_min=True, exclude_max=True))]))


@st.composite
def cases(draw):
    block = draw(st.integers(1, 3))
    h, w = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    K = draw(st.integers(1, 6))
    c = draw(ratios_of(h * w))
    assume(0 < c < 1)
    top = min(1.0, K * c)
    between = c + draw(st.floats(0, 1)) * (top - c)
    p = draw(st.sampled_from([None, c, top, between, top + 5e-7, c - 5e-7, round(between * h * w) / (h * w)]))
    assume(p is None or c - 1e-6 <= p <= top + 1e-6)
    return (h * block, w * block), block, K, c, p


@settings(max_examples=300, deadline=None)
@given(cases(), st.integers(-(2**63), 2**63 - 1))
def test_invariants(case, seed):
    grid, block, K, c, p = case
    N, cells = grid[0] * grid[1] // block**2, block**2
    V = floor_with_tolerance(N * (1 - Fraction(c)))
    M = N - V
    keys = torch.tensor([seed, seed ^ 1, 0])
    if V == 0 or M == 0:
        with pytest.raises(ValueError, match="leaves none of the"):
            disjoint_masks(3, grid, K, c, p, block, keys=keys)
        return
    U = min(N, K * M) if p is None else max(M, min(floor_with_tolerance(N * Fraction(p)), K * M, N))
    masks = disjoint_masks(3, grid, K, c, p, block, keys=keys)
    assert masks.visible.dtype == masks.masked.dtype == torch.int64
    assert masks.visible.shape == (K, 3, V * cells)
    assert masks.masked.shape == (K, 3, M * cells)
    assert masks.mask.shape == (K, 3, N * cells)
    assert masks.mask.dtype == torch.bool
    assert (masks.visible.diff() > 0).all()  # sorted and distinct
    assert (masks.masked.diff() > 0).all()
    assert torch.equal(masks.mask, torch.zeros_like(masks.mask).scatter(-1, masks.masked, True))
    assert not masks.mask.gather(-1, masks.visible).any()
    assert (masks.mask.sum(-1) == M * cells).all()
    counts = masks.mask.sum(0)  # B, tokens: views that mask it
    assert ((counts > 0).sum(-1) == U * cells).all()
    for row in counts:
        inside = row[row > 0]
        assert inside.max() - inside.min() <= 1
    blocks = masks.mask.view(K, 3, grid[0] // block, block, grid[1] // block, block)
    assert torch.equal(blocks, blocks[:, :, :, :1, :, :1].expand_as(blocks))  # a block is masked as one
    if K == 2 and U == N:
        union_of_visible = (~masks.mask).sum(0)
        assert union_of_visible.max() <= 1, "the visible sets of the two views must be disjoint"


@pytest.mark.parametrize("c", [0.5, 0.6, 0.75, 0.9])
def test_two_views_at_p_1_see_disjoint_sets(c):
    masks = disjoint_masks(64, (14, 14), 2, c, 1.0, keys=keys_of(64))
    assert (~masks.mask).sum(0).max() == 1


def test_ratios_that_are_whole_numbers_of_units_never_lose_one():
    """k / N as a float times N is often slightly below k, e.g. 49 * 0.6."""
    for N in range(2, 260):
        for k in range(1, N):
            assert mask_counts(N, 1, k / N)[:2] == (N - k, k)
            assert mask_counts(N, 1, 1 - k / N)[:2] == (k, N - k)


def test_pred_ratios_that_are_whole_numbers_of_units_are_met():
    for N in (10, 49, 64, 196):
        for k in range(1, N):
            for U in range(k, min(N, 3 * k) + 1):
                assert mask_counts(N, 3, k / N, U / N) == (N - k, k, U)


def test_the_published_setting():
    """14 x 14 tokens in 2 x 2 blocks at c = 0.6: 19 blocks visible, 30 masked, all 49 in the union."""
    assert mask_counts(49, 2, 0.6, 1.0) == (19, 30, 49)
    masks = disjoint_masks(5, (14, 14), 2, 0.6, 1.0, block_size=2, keys=keys_of(5))
    assert masks.visible.shape == (2, 5, 76)
    assert masks.masked.shape == (2, 5, 120)
    assert masks.mask.any(0).all()


@pytest.mark.parametrize(("c", "p"), [(0.6, 1.0), (0.6, 0.8), (0.3, 0.6), (0.3, 0.3), (0.75, 0.9), (0.25, 0.4)])
def test_the_published_rule_for_two_views(c, p):
    """View 2 masks U - M of the units that view 1 left visible, the rest among those it masked, both uniformly."""
    B, N = 6000, 12
    V, M, U = mask_counts(N, 2, c, p)
    first, second = disjoint_masks(B, (3, 4), 2, c, p, keys=keys_of(B)).mask
    assert ((second & ~first).sum(-1) == U - M).all()
    assert ((second & first).sum(-1) == 2 * M - U).all()
    for pool, share in ((~first, (U - M) / V), (first, (2 * M - U) / M)):
        observed = (second & pool).sum(0) / pool.sum(0)  # N: how often each unit of the pool was taken
        assert (observed - share).abs().max() <= 5 * math.sqrt(share * (1 - share) / pool.sum(0).min())


@pytest.mark.parametrize(
    ("K", "c", "p", "disjoint"),
    [
        (1, 0.5, None, True),
        (2, 0.6, 1.0, True),
        (3, 0.4, 0.7, True),
        (4, 0.75, 0.8, True),
        (5, 0.2, None, True),
        (3, 0.6, None, False),
    ],
)
def test_every_unit_is_equally_likely_in_every_view(K, c, p, disjoint):
    """Chi-square per view; drawing M of N without replacement shrinks its variance to q (1 - q) N / (N - 1)."""
    B, N = 8000, 20
    masks = disjoint_masks(B, (4, 5), K, c, p, disjoint=disjoint, keys=keys_of(B))
    q = mask_counts(N, K, c, p)[1] / N
    for view in masks.mask:
        deviation = view.sum(0).double() - B * q
        statistic = (deviation**2).sum().item() / (B * q * (1 - q)) * (N - 1) / N
        assert chi2.ppf(1e-5, N - 1) < statistic < chi2.ppf(1 - 1e-5, N - 1)


def test_every_pair_of_units_is_equally_likely():
    B, N = 8000, 12
    mask = disjoint_masks(B, (3, 4), 1, 0.5, keys=keys_of(B)).mask[0].double()
    together = (mask.T @ mask / B)[~torch.eye(N, dtype=torch.bool)]
    q = 6 * 5 / (12 * 11)
    assert (together - q).abs().max() < 5 * math.sqrt(q * (1 - q) / B)


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("disjoint", [True, False])
def test_masks_of_an_image_do_not_depend_on_its_batch(block, disjoint):
    keys = keys_of(9)
    arguments = {"grid": (6, 8), "num_views": 3, "mask_ratio": 0.55, "block_size": block, "disjoint": disjoint}
    together = disjoint_masks(9, keys=keys, **arguments)
    shuffled = disjoint_masks(9, keys=keys.flip(0), **arguments)
    assert torch.equal(shuffled.visible, together.visible.flip(1))
    for i in range(9):
        alone = disjoint_masks(1, keys=keys[i : i + 1], **arguments)
        assert torch.equal(alone.visible[:, 0], together.visible[:, i])
        assert torch.equal(alone.masked[:, 0], together.masked[:, i])


def test_masks_of_a_key_never_change():
    """Runs of earlier versions must resume with the same masks."""
    masks = disjoint_masks(1, (4, 4), 2, 0.6, keys=torch.tensor([20230]))
    assert masks.visible[:, 0].tolist() == [[0, 5, 8, 11, 12, 14], [1, 2, 3, 4, 9, 13]]


@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.5, 0.99])
def test_a_subset_of_the_masked_tokens_is_drawn_for_every_view(ratio):
    """A sorted subset of the masked tokens, every token equally likely, a function of each view's mask alone."""
    B, N = 4000, 30
    masks = disjoint_masks(B, (5, 6), 2, 0.6, keys=keys_of(B))
    subset = masks.subset_masked(ratio)
    assert torch.equal(subset.visible, masks.visible)
    assert torch.equal(subset.mask, masks.mask)
    assert subset.masked.shape[-1] == round(18 * ratio) == num_decoded(18, ratio)
    assert bool((subset.masked.diff(dim=-1) > 0).all())
    assert bool(masks.mask.gather(-1, subset.masked).all())
    counts = torch.zeros(2, N).scatter_add_(1, subset.masked.flatten(1), torch.ones(2, subset.masked[0].numel()))
    q = subset.masked.shape[-1] / N
    assert (counts / B - q).abs().max() < 5 * math.sqrt(q * (1 - q) / B)
    alone = disjoint_masks(1, (5, 6), 2, 0.6, keys=keys_of(B)[7:8]).subset_masked(ratio)
    assert torch.equal(alone.masked[:, 0], subset.masked[:, 7])


def test_the_whole_subset_is_the_same_and_one_token_is_always_left():
    masks = disjoint_masks(3, (4, 4), 2, 0.6, keys=keys_of(3))
    assert torch.equal(masks.subset_masked(1.0).masked, masks.masked)
    assert masks.subset_masked(0.001).masked.shape == (2, 3, 1)


def test_images_and_views_differ():
    masks = disjoint_masks(200, (8, 8), 2, 0.5, 0.5, keys=keys_of(200))  # p = c: both views mask the same set
    assert torch.equal(masks.mask[0], masks.mask[1])
    assert masks.mask[0].unique(dim=0).shape[0] == 200
    free = disjoint_masks(200, (8, 8), 2, 0.5, disjoint=False, keys=keys_of(200))
    assert (free.mask[0] != free.mask[1]).any(-1).all()


def test_generators_make_masks_repeatable():
    def draw(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.stack([disjoint_masks(4, generator=generator).visible for _ in range(2)])

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1)[0], draw(1)[1])
    assert not torch.equal(draw(1), draw(2))
    torch.manual_seed(7)
    first = disjoint_masks(4).visible
    torch.manual_seed(7)
    assert torch.equal(first, disjoint_masks(4).visible)
    assert not torch.equal(first, disjoint_masks(4).visible)


def test_independent_views_overlap_by_chance():
    B, N, K, c = 4000, 40, 3, 0.6
    mask = disjoint_masks(B, (5, 8), K, c, disjoint=False, keys=keys_of(B)).mask
    assert (mask.sum(-1) == 24).all()
    assert mask.any(0).double().mean() == pytest.approx(1 - (1 - c) ** K, abs=0.003)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (mask[a] & mask[b]).sum(-1).double().mean() == pytest.approx(24 * 24 / N, abs=0.15)


@pytest.mark.parametrize(
    ("grid", "given", "expected"),
    [((14, 14), None, 2), ((4, 6), None, 2), ((7, 7), None, 1), ((4, 7), None, 1), ((9, 6), 3, 3), ((1, 1), None, 1)],
)
def test_block_size_none_means_two_if_it_divides(grid, given, expected):
    assert resolve_block_size(grid, given) == expected


def test_block_size_none_in_the_draw():
    masks = disjoint_masks(3, (6, 4), 1, 0.5, block_size=None, keys=keys_of(3))
    expected = disjoint_masks(3, (6, 4), 1, 0.5, block_size=2, keys=keys_of(3))
    assert torch.equal(masks.visible, expected.visible)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -1.0, 1.5, float("nan"), float("inf")])
def test_mask_ratio_out_of_range(ratio):
    with pytest.raises(ValueError, match="mask_ratio must lie between 0 and 1"):
        disjoint_masks(2, mask_ratio=ratio)


@pytest.mark.parametrize("num_units", [2, 3, 7, 49, 196, 12544])
def test_the_bounds_an_error_names_are_allowed(num_units):
    with pytest.raises(ValueError, match=r"none of the .* units visible") as caught:
        mask_counts(num_units, 1, 1 - 1e-9)
    low, high = (float(x) for x in re.search(r"\[(\S+), (\S+)\]", str(caught.value)).groups())
    for bound in (low, high):
        V, M, _ = mask_counts(num_units, 1, bound)
        assert V > 0
        assert M > 0


@settings(deadline=None)
@given(st.floats(0.05, 0.95), st.integers(1, 5))
def test_the_range_an_error_names_for_pred_ratio_is_allowed(c, K):
    with pytest.raises(ValueError, match="pred_ratio must lie in") as caught:
        mask_counts(196, K, c, 1.1)
    for bound in re.search(r"\[(\S+), (\S+)\]", str(caught.value)).groups():
        mask_counts(196, K, c, float(bound))


@pytest.mark.parametrize("p", [0.59, 1.01, -1.0, 0.0, float("nan")])
def test_pred_ratio_out_of_range(p):
    with pytest.raises(ValueError, match=r"pred_ratio must lie in \[0.6, 1\]"):
        disjoint_masks(2, mask_ratio=0.6, pred_ratio=p)


def test_pred_ratio_cannot_exceed_all_views_together():
    with pytest.raises(ValueError, match=r"\[0.3, 0.6\]"):
        disjoint_masks(2, num_views=2, mask_ratio=0.3, pred_ratio=0.7)


def test_other_settings_out_of_range():
    with pytest.raises(ValueError, match="num_views must be at least 1, got 0"):
        disjoint_masks(2, num_views=0)
    with pytest.raises(
        ValueError, match=r"block_size 4 does not divide the 14 x 14 token grid; choose one of \[1, 2, 7, 14\]"
    ):
        disjoint_masks(2, block_size=4)
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        disjoint_masks(2, block_size=0)
    with pytest.raises(ValueError, match="none of the 1 masking units visible; use smaller blocks"):
        disjoint_masks(2, block_size=14)
    with pytest.raises(ValueError, match="grid must be at least 1, got 0"):
        disjoint_masks(2, grid=(0, 4))
    with pytest.raises(ValueError, match="batch_size must be at least 0, got -1"):
        disjoint_masks(-1)
    for wrong in (
        *({"num_views": value} for value in (True, 2.0, "2", 10**9)),
        *({"mask_ratio": value} for value in ("0.5", True, float("nan"), 10**400)),
        *({"pred_ratio": value} for value in ("0.5", True)),
        *({"block_size": value} for value in (True, 1.0, "1")),
        *({"grid": value} for value in ((14.0, 14), (True, 14), ("1", 1))),
    ):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must"):
            disjoint_masks(2, **wrong)
    with pytest.raises(ValueError, match="batch_size must be at most"):
        disjoint_masks(10**12)
    with pytest.raises(ValueError, match="no meaning with disjoint=False"):
        disjoint_masks(2, disjoint=False, pred_ratio=0.9)
    with pytest.raises(ValueError, match=r"keys must be \[2\] int64, got \[3\]"):
        disjoint_masks(2, keys=keys_of(3))
    with pytest.raises(ValueError, match=r"torch\.float32"):
        disjoint_masks(2, keys=torch.zeros(2))
    with pytest.raises(ValueError, match="keys or a generator, not both"):
        disjoint_masks(2, keys=keys_of(2), generator=torch.Generator())


def test_an_empty_batch_is_allowed():
    assert disjoint_masks(0, keys=keys_of(0)).visible.shape == (2, 0, 78)


def test_from_visible_keeps_the_callers_order():
    visible = torch.tensor([[[3, 0], [5, 1]], [[2, 4], [0, 5]]], dtype=torch.int32)
    masks = Masks.from_visible(visible, num_tokens=6)
    assert torch.equal(masks.visible, visible.long())
    assert masks.masked.tolist() == [[[1, 2, 4, 5], [0, 2, 3, 4]], [[0, 1, 3, 5], [1, 2, 3, 4]]]
    assert masks.mask[0, 0].tolist() == [False, True, True, False, True, True]
    single = Masks.from_visible(visible[0], num_tokens=6)
    assert torch.equal(single.mask, masks.mask[:1])


@settings(deadline=None)
@given(st.integers(2, 20), st.integers(1, 4), st.integers(0, 2**32))
def test_from_visible_agrees_with_the_draw(num_tokens, K, seed):
    drawn = disjoint_masks(2, (1, num_tokens), K, 0.5, keys=keys_of(2, seed))
    again = Masks.from_visible(drawn.visible, num_tokens)
    for field in ("visible", "masked", "mask"):
        assert torch.equal(getattr(again, field), getattr(drawn, field))


@pytest.mark.parametrize(
    ("visible", "message"),
    [
        (torch.tensor([[0, 6]]), r"must lie in 0\.\.5, got 0\.\.6"),
        (torch.tensor([[-1, 2]]), r"must lie in 0\.\.5, got -1\.\.2"),
        (torch.tensor([[1, 1]]), "distinct"),
        (torch.zeros(1, 0).long(), "between 1 and 5 of 6 tokens must be visible, got 0"),
        (torch.arange(6).unsqueeze(0), "between 1 and 5 of 6 tokens must be visible, got 6"),
        (torch.arange(3), r"\[K, B, V\] or \[B, V\]"),
        (torch.zeros(0, 2, 3).long(), "K >= 1"),
    ],
)
def test_from_visible_refuses_invalid_ids(visible, message):
    with pytest.raises(ValueError, match=message):
        Masks.from_visible(visible, num_tokens=6)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("disjoint", [True, False])
def test_the_same_masks_on_cuda(disjoint):
    keys = keys_of(512)
    arguments = {"grid": (14, 14), "num_views": 3, "mask_ratio": 0.6, "disjoint": disjoint}
    cpu, cuda = (disjoint_masks(512, keys=keys, device=device, **arguments) for device in ("cpu", "cuda"))
    assert cuda.visible.is_cuda
    assert torch.equal(cuda.visible.cpu(), cpu.visible)
    assert torch.equal(cuda.mask.cpu(), cpu.mask)


def test_numbers_of_numpy_count_as_pythons():
    keys = torch.arange(3)
    settings = {"num_views": 2, "mask_ratio": 0.5, "pred_ratio": 1.0, "block_size": 2}
    of_numpy = {name: np.asarray(value)[()] for name, value in settings.items()}
    plain, other = (disjoint_masks(n, (4, 4), keys=keys, **s) for n, s in ((3, settings), (np.int64(3), of_numpy)))
    assert torch.equal(plain.mask, other.mask)


@pytest.mark.parametrize(
    ("name", "value"),
    [("grid", None), ("grid", 3), ("keys", 0), ("keys", "abc"), ("keys", []), ("generator", 0), ("disjoint", "no")],
)
def test_arguments_of_other_types_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        disjoint_masks(2, **{"grid": (4, 4)} | {name: value})


@pytest.mark.parametrize("visible", [torch.tensor([[1.5]]), torch.tensor([[math.nan]]), torch.tensor([[True]]), [[1]]])
def test_visible_ids_are_integers(visible):
    with pytest.raises(ValueError, match="visible must be a tensor of integers, got"):
        Masks.from_visible(visible, 4)


@pytest.mark.parametrize("ratio", [math.nan, 0, -0.5, 1.5])
def test_a_subset_that_is_no_share(ratio):
    with pytest.raises(ValueError, match=r"ratio must lie in \(0, 1\], got"):
        disjoint_masks(1, (4, 4)).subset_masked(ratio)
