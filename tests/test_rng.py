"""Quality and stability of the counter-based hash behind every random choice."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from dmjd import rng
from dmjd.rng import at_least, hash64, image_keys, uniform

STREAMS = [getattr(rng, name) for name in dir(rng) if name.startswith("STREAM_")]


def bits_of(x: torch.Tensor) -> torch.Tensor:
    """[...] int64 -> [..., 64] of 0 and 1."""
    return (x.unsqueeze(-1) >> torch.arange(64)) & 1


def test_hash_of_one_integer_is_splitmix64():
    """Test vector of the reference implementation (Vigna, splitmix64.c) for the seed 1234567."""
    assert hash64(1234567).item() == 6457827717110365317


def test_hash_values_never_change():
    """Masks, crops and orders of every earlier run depend on these."""
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
    """Chi-square test of each of the eight bytes on successive counters, the worst input for a weak hash."""
    values = hash64(rng.STREAM_MASK, 0, torch.arange(1 << 16))
    for byte in range(8):
        observed = torch.bincount((values >> (8 * byte)) & 255, minlength=256).double()
        statistic = ((observed - 256) ** 2 / 256).sum().item()
        assert chi2.ppf(1e-4, 255) < statistic < chi2.ppf(1 - 1e-4, 255), f"byte {byte}: {statistic}"


@pytest.mark.parametrize("position", [0, 1])
def test_hash_avalanche(position):
    """Flipping any input bit flips every output bit half of the time."""
    n = 4000
    fixed, varied = torch.arange(n), torch.arange(n) * 12345
    order = (lambda x: (x, fixed)) if position == 0 else (lambda x: (fixed, x))
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


@given(st.integers(-(2**63), 2**63 - 1), st.floats(0, 1, exclude_max=True))
def test_integers_compare_like_uniform_numbers(bits, limit):
    x = torch.tensor([bits, int(limit * 2**53) << 11 if limit < 0.5 else bits])
    assert torch.equal(at_least(x, limit), uniform(x) >= limit)


def test_uniform_covers_the_half_open_unit_interval():
    assert uniform(torch.tensor([0, -1])).tolist() == [0.0, 1 - 2.0**-53]
    values = uniform(hash64(3, torch.arange(100_000)))
    assert values.dtype == torch.float64
    assert abs(values.mean() - 0.5) < 5 / math.sqrt(12 * 100_000)
    assert values.var() == pytest.approx(1 / 12, rel=0.02)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 10**30, 10**4000])
def test_seeds_beyond_64_bits_are_refused(seed):
    """They would be cut to 64 bits, so that two seeds give the same results."""
    with pytest.raises(ValueError, match="at most 64 bits"):
        hash64(seed)
    with pytest.raises(ValueError, match="at most 64 bits"):
        image_keys(seed, torch.tensor([0]), torch.tensor([0]))


def test_integers_of_numpy_count_as_pythons():
    assert hash64(np.int64(-3), np.uint64(2**63)) == hash64(-3, 2**63)
    assert torch.equal(hash64(torch.arange(3), np.int8(3)), hash64(torch.arange(3), 3))
