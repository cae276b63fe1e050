"""The depthwise convolution equals PyTorch's, dense and visible, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import grads
from torch import nn

from dmjd.nn import depthwise
from dmjd.nn.depthwise import cell_indices, dense_depthwise, visible_depthwise


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    dim=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_depthwise_gradients_equal_those_of_conv2d(batch, height, width, dim, seed):
    torch.manual_seed(seed)
    conv = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
    x = torch.randn(batch, height, width, dim, requires_grad=True)
    direction = torch.randn(batch, height, width, dim)
    ours = dense_depthwise(conv, x)
    plain = conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    wanted = grads((plain * direction).sum(), x, conv.weight, conv.bias)
    for got, want in zip(grads((ours * direction).sum(), x, conv.weight, conv.bias), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_large_maps_are_taken_in_tiles(monkeypatch):
    """The gradient over four tiles of unequal size equals the gradient over one."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 5, padding=2, groups=4)
    x, direction = torch.randn(2, 11, 13, 4), torch.randn(2, 11, 13, 4)
    whole = grads((dense_depthwise(conv, x) * direction).sum(), conv.weight)[0]
    monkeypatch.setattr(depthwise, "_LARGEST_TILE", 7)
    tiled = grads((dense_depthwise(conv, x) * direction).sum(), conv.weight)[0]
    torch.testing.assert_close(tiled, whole, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows_at_once", [1, 2, 3])
@pytest.mark.parametrize("large_kernels", [True, False])
def test_visible_depthwise_is_the_dense_one_under_a_mask(large_kernels, rows_at_once, monkeypatch):
    monkeypatch.setattr(depthwise, "_CHUNK_BYTES", rows_at_once * 6 * 8 * 6 * 4)
    monkeypatch.setattr(depthwise, "_fast_large_kernels", lambda x: large_kernels)
    torch.manual_seed(0)
    (h, w), s, dim = (3, 4), 2, 6
    conv = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
    ids = torch.stack([torch.randperm(h * w)[:5] for _ in range(3)])  # any order
    cells = cell_indices(ids, (h, w), s)
    x = torch.randn(3, 5, s, s, dim, requires_grad=True)
    y = visible_depthwise(conv, x, cells, (h * s, w * s))
    canvas = torch.zeros(3, h * s, w * s, dim)
    for r in range(3):
        for v, token in enumerate(ids[r].tolist()):
            top, left = token // w * s, token % w * s
            canvas[r, top : top + s, left : left + s] = x[r, v]
    dense = conv(canvas.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    picked = dense.reshape(-1, dim)[cells].view_as(y)
    torch.testing.assert_close(y, picked, rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(y)
    wanted = grads((picked * direction).sum(), x, conv.weight, conv.bias)
    for got, want in zip(grads((y * direction).sum(), x, conv.weight, conv.bias), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_half_precision_depthwise_gradient_is_close_to_float32():
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 16, 5, padding=2, groups=16)
    x, direction = torch.randn(4, 12, 12, 16), torch.randn(4, 12, 12, 16)
    exact = grads((dense_depthwise(conv, x) * direction).sum(), conv.weight)[0]
    half = grads((dense_depthwise(conv, x.bfloat16()).float() * direction).sum(), conv.weight)[0]
    assert (half - exact).abs().max() < 0.02 * exact.abs().max()
