"""Layers that save little for the backward pass equal PyTorch's plain layers, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from support import grads
from torch import nn

from dmjd.nn import recompute
from dmjd.nn.recompute import attention, norm_linear, norm_mlp


def layers_and_input(dtype=torch.float32):
    torch.manual_seed(0)
    norm, fc1, fc2 = nn.LayerNorm(6, eps=1e-6), nn.Linear(6, 24), nn.Linear(24, 6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm, fc1, fc2, torch.randn(3, 5, 6, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("keep_hidden", [True, False])
@pytest.mark.parametrize("chunk_bytes", [1 << 24, 4 * 24 * 4])  # all at once; four rows at a time, three in the last
def test_norm_and_mlp_give_what_plain_layers_give(keep_hidden, chunk_bytes, monkeypatch):
    monkeypatch.setattr(recompute, "_CHUNK_BYTES", chunk_bytes)
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
    monkeypatch.setattr(recompute, "_CHUNK_BYTES", chunk_bytes)
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
    wanted = grads(fc2(F.gelu(fc1(norm(x)))).sum() + fc1(norm(x)).sum(), norm.weight)[0]
    torch.testing.assert_close(grads(loss, norm.weight)[0], wanted)


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


def test_private_names_of_torch():
    """Tested with torch 2.14. A failure means that torch has changed them."""
    for name in ("_softmax_backward_data", "native_layer_norm"):
        assert callable(getattr(torch, name)), torch.__version__
    for name in ("native_layer_norm_backward", "gelu_backward", "convolution_backward"):
        assert callable(getattr(torch.ops.aten, name)), torch.__version__
    assert torch.ops.mkldnn._is_mkldnn_bf16_supported() in (True, False)
