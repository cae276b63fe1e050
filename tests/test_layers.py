"""The fast forms of layers give what PyTorch's plain ones give, forwards and backwards."""

import os
import resource
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dmjd import depthwise
from dmjd.depthwise import cell_places, dense_depthwise, visible_depthwise
from dmjd.layers import TransformerBlock, attention, mlp

torch.set_num_threads(2)


def grads(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


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
    """A gradient over four tiles of unequal size is that over one."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 5, padding=2, groups=4)
    x, direction = torch.randn(2, 11, 13, 4), torch.randn(2, 11, 13, 4)
    whole = grads((dense_depthwise(conv, x) * direction).sum(), conv.weight)[0]
    monkeypatch.setattr(depthwise, "_LARGEST_TILE", 7)
    tiled = grads((dense_depthwise(conv, x) * direction).sum(), conv.weight)[0]
    torch.testing.assert_close(tiled, whole, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("large_kernels", [True, False])
def test_visible_depthwise_is_the_dense_one_under_a_mask(large_kernels, monkeypatch):
    monkeypatch.setattr(depthwise, "_fast_large_kernels", lambda x: large_kernels)
    torch.manual_seed(0)
    (h, w), s, dim = (3, 4), 2, 6
    conv = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
    ids = torch.stack([torch.randperm(h * w)[:5] for _ in range(3)])  # any order
    places = cell_places(ids, (h, w), s)
    x = torch.randn(3, 5, s, s, dim, requires_grad=True)
    y = visible_depthwise(conv, x, places, (h * s, w * s))
    canvas = torch.zeros(3, h * s, w * s, dim)
    for r in range(3):
        for v, token in enumerate(ids[r].tolist()):
            top, left = token // w * s, token % w * s
            canvas[r, top : top + s, left : left + s] = x[r, v]
    dense = conv(canvas.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    picked = dense.reshape(-1, dim)[places].view_as(y)
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


def test_mlp_gradients_equal_the_plain_ones():
    torch.manual_seed(0)
    fc1, fc2 = nn.Linear(6, 24), nn.Linear(24, 6)
    x, direction = torch.randn(2, 5, 6, requires_grad=True), torch.randn(2, 5, 6)
    parameters = (x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
    ours, plain = mlp(fc1, fc2, x), fc2(F.gelu(fc1(x)))
    torch.testing.assert_close(ours, plain)
    wanted = grads((plain * direction).sum(), *parameters)
    for got, want in zip(grads((ours * direction).sum(), *parameters), wanted, strict=True):
        torch.testing.assert_close(got, want)
    with torch.no_grad():
        torch.testing.assert_close(mlp(fc1, fc2, x), plain)


def test_mlp_keeps_one_hidden_layer_for_the_backward_pass():
    fc1, fc2 = nn.Linear(4, 512), nn.Linear(512, 4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        mlp(fc1, fc2, torch.randn(7, 4, requires_grad=True))
    assert kept.count(torch.Size([7, 512])) == 1


def test_skipped_tokens_are_attended_to_but_not_computed():
    torch.manual_seed(0)
    block = TransformerBlock(16, 4, 2.0)
    x = torch.randn(2, 9, 16, requires_grad=True)
    part, whole = block(x, skip=4), block(x)[:, 4:]
    torch.testing.assert_close(part, whole)
    direction = torch.randn_like(whole)
    wanted = grads((whole * direction).sum(), x, *block.parameters())
    for got, want in zip(grads((part * direction).sum(), x, *block.parameters()), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert wanted[0][:, :4].abs().sum() > 0


@pytest.mark.parametrize("queries", [5, 9])
def test_half_precision_attention_is_close_to_float32(queries):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8) for n in (queries, 9, 9))
    exact = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attention(q, k, v), exact)
    half = attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=0.05, atol=0.03)


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is one of glibc's")
def test_freed_memory_stays_with_the_process():
    """Once memory is the process's, tensors of the same sizes cost no new pages; by default each costs its own."""
    program = """
import resource, sys, torch
from dmjd.devices import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory("cpu")
    assert not keep_freed_memory("cuda")
def make():
    for i in range(20):
        torch.ones((64 << 20) + i % 3 * 1000, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = make()
print(make() - before)
"""
    small_pages = os.environ | {"THP_MEM_ALLOC_ENABLE": "0"}
    found = {}
    for word in ("keep", "default"):
        command = [sys.executable, "-c", program, word]
        found[word] = int(subprocess.run(command, capture_output=True, check=True, env=small_pages).stdout)
    pages = 20 * (64 << 20) / resource.getpagesize()
    assert found["keep"] < pages / 4 < pages / 2 < found["default"]
