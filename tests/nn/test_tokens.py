"""Patches, positions, gathering, and the quality of the counter-based hash that every random choice rests on."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from dmjd import rng
from dmjd.nn.tokens import gather_tokens, gather_views, patchify, sincos_positions, unpatchify
from dmjd.rng import hash64, image_keys, uniform

STREAMS = [getattr(rng, name) for name in dir(rng) if name.startswith("STREAM_")]
any_int64 = st.integers(-(2**63), 2**63 - 1)


def bits_of(x: torch.Tensor) -> torch.Tensor:
    """[...] int64 -> [..., 64] of 0 and 1."""
    return (x.unsqueeze(-1) >> torch.arange(64)) & 1


def test_hash_of_one_integer_is_splitmix64():
    """Test vector of the reference implementation (Vigna, splitmix64.c) for the seed 1234567."""
    assert hash64(1234567).item() == 6457827717110365317


def test_hash_values_never_change():
    """Masks, crops and orders of every earlier run hang on these."""
    expected = [5333494879278683184, -1682474248906643037]
    assert hash64(rng.STREAM_MASK, torch.tensor([0, -1]), 3, torch.tensor(7)).tolist() == expected


@given(st.lists(st.integers(-(2**63), 2**64 - 1), min_size=1, max_size=5), st.data())
def test_integer_and_tensor_paths_agree(parts, data):
    expected = hash64(*parts)
    assert expected.dtype == torch.int64
    signed = [part - 2**64 if part >= 2**63 else part for part in parts]
    mixed = [torch.tensor([s]) if data.draw(st.booleans()) else p for p, s in zip(parts, signed, strict=True)]
    assert hash64(*mixed).flatten().tolist() == [expected.item()]


def test_narrow_integer_tensors_hash_like_wide_ones():
    wide = torch.arange(-5, 5)
    assert torch.equal(hash64(1, wide.to(torch.int32), 2), hash64(1, wide, 2))


def test_hash_broadcasts_and_depends_on_order():
    a, b = torch.arange(3).unsqueeze(1), torch.arange(4)
    table = hash64(1, a, b)
    assert table.shape == (3, 4)
    assert table[2, 3] == hash64(1, 2, 3)
    assert table[1, 2] != table[2, 1]


def test_hash_is_uniform_in_every_byte():
    """Successive counters, the worst input for a weak hash: a chi-square test on each of the eight bytes."""
    values = hash64(rng.STREAM_MASK, 0, torch.arange(1 << 16))
    for byte in range(8):
        observed = torch.bincount((values >> (8 * byte)) & 255, minlength=256).double()
        statistic = ((observed - 256) ** 2 / 256).sum().item()
        assert chi2.ppf(1e-4, 255) < statistic < chi2.ppf(1 - 1e-4, 255), f"byte {byte}: {statistic}"


@pytest.mark.parametrize("place", [0, 1])
def test_hash_avalanche(place):
    """Flipping any input bit flips every output bit half of the time."""
    n = 4000
    fixed, varied = torch.arange(n), torch.arange(n) * 12345
    order = (lambda x: (x, fixed)) if place == 0 else (lambda x: (fixed, x))
    before = hash64(*order(varied))  # n
    flipped = varied.unsqueeze(1) ^ (torch.ones(64, dtype=torch.int64) << torch.arange(64))  # n, 64
    fixed = fixed.unsqueeze(1)
    changed = bits_of(hash64(*order(flipped)) ^ before.unsqueeze(1)).double().mean(0)  # 64 in, 64 out
    assert (changed - 0.5).abs().max() < 5.5 * 0.5 / math.sqrt(n)


def test_no_collisions_within_and_across_streams():
    assert len(set(STREAMS)) == len(STREAMS) >= 7
    index = torch.arange(100_000)
    values = torch.cat([hash64(stream, 0, index) for stream in STREAMS] + [image_keys(1, torch.tensor(0), index)])
    assert values.unique().numel() == values.numel()


def test_image_keys_differ_by_seed_epoch_and_index():
    index = torch.arange(50)
    keys = torch.cat([image_keys(s, torch.tensor(e), index) for s in range(5) for e in range(5)])
    assert keys.unique().numel() == 5 * 5 * 50


def test_uniform_covers_the_half_open_unit_interval():
    assert uniform(torch.tensor([0, -1])).tolist() == [0.0, 1 - 2.0**-53]
    values = uniform(hash64(3, torch.arange(100_000)))
    assert values.dtype == torch.float64
    assert abs(values.mean() - 0.5) < 5 / math.sqrt(12 * 100_000)
    assert values.var() == pytest.approx(1 / 12, rel=0.02)


@given(
    st.integers(1, 3), st.sampled_from([1, 2, 3, 5]), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), any_int64
)
def test_patchify_round_trip(B, C, h, w, P, seed):
    images = torch.randn(B, C, h * P, w * P, generator=torch.Generator().manual_seed(seed))
    patches = patchify(images, P)
    assert patches.shape == (B, h * w, P * P * C)
    assert torch.equal(unpatchify(patches, (h, w), P), images)


def test_patchify_order_is_row_column_channel():
    images = torch.arange(2 * 5 * 4 * 6).view(2, 5, 4, 6)
    patches = patchify(images, 2)  # grid 2 x 3
    for n in range(6):
        r, c = divmod(n, 3)
        block = images[1, :, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2]
        expected = [block[ch, i, j].item() for i in range(2) for j in range(2) for ch in range(5)]
        assert patches[1, n].tolist() == expected


def test_patchify_errors_name_the_sizes():
    with pytest.raises(ValueError, match="30 x 32 pixels is not divisible into patches of 16 x 16"):
        patchify(torch.zeros(1, 3, 30, 32), 16)
    with pytest.raises(ValueError, match="6 patches of 12 values do not form a 2 x 2 grid"):
        unpatchify(torch.zeros(1, 6, 12), (2, 2), 2)
    with pytest.raises(ValueError, match="13 values"):
        unpatchify(torch.zeros(1, 4, 13), (2, 2), 2)


@pytest.mark.parametrize(
    ("dim", "grid", "prefix"), [(4, (1, 1), 0), (16, (3, 5), 0), (192, (14, 9), 1), (8, (2, 7), 3)]
)
def test_sincos_table_is_the_float64_formula_rounded_once(dim, grid, prefix):
    table = sincos_positions(dim, grid, prefix)
    assert table.dtype == torch.float32
    assert table.shape == (1, prefix + grid[0] * grid[1], dim)
    assert not table[0, :prefix].any()
    quarter = dim // 4
    rows = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            entries = []
            for place in (column, row):
                angles = [place / 10000.0 ** (i / quarter) for i in range(quarter)]
                entries += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            rows.append(entries)
    expected = torch.tensor(rows, dtype=torch.float64)
    # One float32 rounding of a float64 value: half a unit in the last place, far below what float32 angles would give.
    assert (table[0, prefix:].double() - expected).abs().max() <= 2.0**-25 + 1e-13


def test_sincos_needs_a_width_divisible_by_4():
    with pytest.raises(ValueError, match="divisible by 4, got 10"):
        sincos_positions(10, (2, 2))


def test_gathering_by_id():
    x = torch.randn(2, 5, 3)
    ids = torch.tensor([[4, 0], [1, 1], [2, 3], [0, 4]])  # two views of two images, view-major
    assert torch.equal(gather_tokens(x, ids[:2]), torch.stack([x[0, [4, 0]], x[1, [1, 1]]]))
    expected = torch.stack([x[0, [4, 0]], x[1, [1, 1]], x[0, [2, 3]], x[1, [0, 4]]])
    assert torch.equal(gather_views(x, ids), expected)
