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

from dmjd.nn import depthwise
from dmjd.nn import recompute as kernels
from dmjd.nn.depthwise import cell_indices, dense_depthwise, visible_depthwise
from dmjd.nn.layers import ConvBlock, TransformerBlock, set_checkpointing
from dmjd.nn.recompute import attention, norm_linear, norm_mlp

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


@pytest.mark.parametrize("rows_at_once", [1, 2, 3])
@pytest.mark.parametrize("large_kernels", [True, False])
def test_visible_depthwise_is_the_dense_one_under_a_mask(large_kernels, rows_at_once, monkeypatch):
    monkeypatch.setattr(depthwise, "_CHUNK_BYTES", rows_at_once * 6 * 8 * 6 * 4)
    monkeypatch.setattr(depthwise, "_fast_large_kernels", lambda x: large_kernels)
    torch.manual_seed(0)
    (h, w), s, dim = (3, 4), 2, 6
    conv = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
    ids = torch.stack([torch.randperm(h * w)[:5] for _ in range(3)])  # any order
    places = cell_indices(ids, (h, w), s)
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


def layers_and_input(dtype=torch.float32):
    torch.manual_seed(0)
    norm, fc1, fc2 = nn.LayerNorm(6, eps=1e-6), nn.Linear(6, 24), nn.Linear(24, 6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm, fc1, fc2, torch.randn(3, 5, 6, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("keep_hidden", [True, False])
@pytest.mark.parametrize("chunk_bytes", [1 << 24, 4 * 24 * 4])  # all at once; four rows at a time, three in the last
def test_norm_and_mlp_give_what_plain_layers_give(keep_hidden, chunk_bytes, monkeypatch):
    monkeypatch.setattr(kernels, "_CHUNK_BYTES", chunk_bytes)
    norm, fc1, fc2, x = layers_and_input()
    parameters = (x, *norm.parameters(), *fc1.parameters(), *fc2.parameters())
    ours, plain = norm_mlp(norm, fc1, fc2, x, keep_hidden), fc2(F.gelu(fc1(norm(x))))
    torch.testing.assert_close(ours, plain)
    direction = torch.randn_like(plain)
    wanted = grads((plain * direction).sum(), *parameters)
    for got, want in zip(grads((ours * direction).sum(), *parameters), wanted, strict=True):
        torch.testing.assert_close(got, want)
    with torch.no_grad():
        torch.testing.assert_close(norm_mlp(norm, fc1, fc2, x), plain)


@pytest.mark.parametrize("chunk_bytes", [1 << 24, 4 * 30 * 4])
def test_norm_and_linear_give_what_plain_layers_give(chunk_bytes, monkeypatch):
    monkeypatch.setattr(kernels, "_CHUNK_BYTES", chunk_bytes)
    norm, linear, _, x = layers_and_input()
    parameters = (x, *norm.parameters(), *linear.parameters())
    ours, plain = norm_linear(norm, linear, x), linear(norm(x))
    torch.testing.assert_close(ours, plain)
    direction = torch.randn_like(plain)
    wanted = grads((plain * direction).sum(), *parameters)
    for got, want in zip(grads((ours * direction).sum(), *parameters), wanted, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_mlp_follow_autocast(dtype):
    """Types of outputs and gradients are those of plain layers; values within the rounding of bfloat16."""
    norm, fc1, fc2, x = layers_and_input(dtype)
    parameters = (x, *norm.parameters(), *fc1.parameters(), *fc2.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = norm_mlp(norm, fc1, fc2, x), fc2(F.gelu(fc1(norm(x))))
        linear = norm_linear(norm, fc1, x)
        assert linear.dtype == fc1(norm(x)).dtype
    assert ours.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(ours, plain, rtol=0.05, atol=0.02)
    wanted = grads(plain.float().square().sum(), *parameters)
    for got, want in zip(grads(ours.float().square().sum(), *parameters), wanted, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.03 * want.abs().max().item())


def test_frozen_input_needs_no_gradient():
    norm, fc1, fc2, x = layers_and_input()
    loss = norm_mlp(norm, fc1, fc2, x.detach()).sum() + norm_linear(norm, fc1, x.detach()).sum()
    wanted = torch.autograd.grad(fc2(F.gelu(fc1(norm(x)))).sum() + fc1(norm(x)).sum(), norm.weight)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, norm.weight)[0], wanted)


def bytes_kept(block, *inputs):
    """What a block keeps for the backward pass besides parameters and its input."""
    known = {t.untyped_storage().data_ptr() for t in (*block.parameters(), *inputs) if isinstance(t, torch.Tensor)}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = block(*inputs)
    assert out.requires_grad
    return sum(storage.nbytes() for address, storage in kept.items() if address not in known)


def test_a_transformer_block_keeps_qkv_attention_and_one_hidden_layer():
    torch.manual_seed(0)
    rows, D = 4 * 64, 32
    block, x = TransformerBlock(D, 4, 4.0), torch.randn(4, 64, D, requires_grad=True)
    unit = rows * D * 4
    kept = bytes_kept(block, x)
    assert kept <= (3 + 1 + 1 + 4) * unit + rows * 4 * 8  # qkv, its attention, the sum after it, the hidden layer
    set_checkpointing(block, True)
    assert bytes_kept(block, x) <= 1.5 * unit


@pytest.mark.parametrize("kind", ["transformer", "convolution"])
def test_checkpointing_changes_no_gradient(kind):
    torch.manual_seed(0)
    if kind == "transformer":
        block, x, rest = TransformerBlock(16, 4, 2.0), torch.randn(2, 9, 16, requires_grad=True), (3,)
    else:
        block, x, rest = ConvBlock(16, 2.0), torch.randn(2, 9, 7, 16, requires_grad=True), (dense_depthwise,)
    direction, found = None, []
    for checkpointing in (False, True):
        set_checkpointing(block, checkpointing)
        out = block(x, *rest)
        direction = torch.randn_like(out) if direction is None else direction
        found.append(grads((out * direction).sum(), x, *block.parameters()))
    for plain, thrifty in zip(*found, strict=True):
        torch.testing.assert_close(thrifty, plain)


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
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (queries, 9, 9))
    exact = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attention(q, k, v), exact)
    half = attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=0.05, atol=0.03)
    direction = torch.randn_like(exact)
    wanted = grads((exact * direction).sum(), q, k, v)
    for got, want in zip(grads((half * direction).sum(), q, k, v), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.06)
    with torch.no_grad():
        torch.testing.assert_close(attention(q.bfloat16(), k.bfloat16(), v.bfloat16()), half)


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is one of glibc's")
def test_freed_memory_stays_with_the_process():
    """Once memory is the process's, tensors of the same sizes cost no new pages; by default each costs its own."""
    program = """
import resource, sys, torch
from dmjd.engine.device import keep_freed_memory
if sys.argv[1] != "default":
    assert keep_freed_memory("cpu")
    assert not keep_freed_memory("cuda")
if sys.argv[1] == "keep small":
    assert keep_freed_memory("cpu", up_to=1 << 21)
def make():
    for i in range(20):
        torch.ones((64 << 20) + i % 3 * 1000, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = make()
print(make() - before)
"""
    small_pages = os.environ | {"THP_MEM_ALLOC_ENABLE": "0"}
    found = {}
    for word in ("keep", "keep small", "default"):
        command = [sys.executable, "-c", program, word]
        found[word] = int(subprocess.run(command, capture_output=True, check=True, env=small_pages).stdout)
    pages = 20 * (64 << 20) / resource.getpagesize()
    assert found["keep"] < pages / 4 < pages / 2 < min(found["default"], found["keep small"])
