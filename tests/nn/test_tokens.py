"""Patches, positions, gathering by id."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmjd.nn.tokens import gather_tokens, gather_views, patchify, sincos_positions, unpatchify


@given(
    st.integers(1, 3),
    st.sampled_from([1, 2, 3, 5]),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 2**32),
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
            for position in (column, row):
                angles = [position / 10000.0 ** (i / quarter) for i in range(quarter)]
                entries += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            rows.append(entries)
    expected = torch.tensor(rows, dtype=torch.float64)
    # One float32 rounding of a float64 value: half a unit in the last place, far less than with float32 angles.
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
