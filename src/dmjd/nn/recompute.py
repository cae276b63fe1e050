"""Layers that save little for the backward pass and, on a CPU, stay in the cache.

Most memory of a pre-norm block is its hidden layer and the normalized input of every matrix product. Here norms and
GELU are recomputed in the backward pass, at about 1 % of the cost of the products. On a CPU a few rows are processed at
a time, so that intermediate results between two products never leave the cache.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_CHUNK_BYTES = 1 << 24  # of intermediate results; smaller chunks make the products slower

_MOST_ATTENTION_ELEMENTS = 1 << 27  # a quarter of a gigabyte in half precision


def norm_linear(norm: nn.LayerNorm, linear: nn.Linear, x: Tensor) -> Tensor:
    """linear(norm(x)), [..., D] -> [..., E]; saves only x for the backward pass."""
    if not may_need_gradients():
        return linear(norm(x))
    return _NormLinear.apply(x, norm.weight, norm.bias, norm.eps, linear.weight, linear.bias, _product_type(x))


def norm_mlp(norm: nn.LayerNorm, fc1: nn.Linear, fc2: nn.Linear, x: Tensor, keep_hidden: bool = True) -> Tensor:
    """fc2(gelu(fc1(norm(x)))), [..., D] -> [..., D].

    Args:
        norm, fc1, fc2: the layers.
        x: [..., D].
        keep_hidden: save the output of fc1, the largest activation of a block, for the backward pass; False recomputes
            it, at the cost of a sixth more arithmetic.
    """
    if not may_need_gradients():
        return fc2(F.gelu(fc1(norm(x))))
    parameters = (norm.weight, norm.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
    return _NormMlp.apply(x, *parameters, norm.eps, _product_type(x), keep_hidden)


def may_need_gradients() -> bool:
    """Whether a backward pass may follow.

    False during export: exporters trace with gradients enabled, but support plain operations only, and would make the
    number of rows in a chunk a constant.
    """
    return torch.is_grad_enabled() and not torch.compiler.is_exporting()


def _product_type(x: Tensor) -> torch.dtype:
    """Data type of matrix products on ``x``: autocast's if it is enabled, else that of ``x``."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _chunks(rows: int, width: int, like: Tensor) -> Iterator[slice]:
    """Equal parts of ``rows`` rows of ``width`` entries that fit the cache; all at once on devices other than a CPU."""
    count = -(-rows * width * like.element_size() // _CHUNK_BYTES) if like.device.type == "cpu" else 1
    size = max(1, -(-rows // max(1, count)))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


class _NormGradient:
    """Recomputes the norm of some rows, and sums its gradients over the chunks."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, need_x: bool) -> None:
        self.x, self.weight, self.bias, self.eps, self.need_x = x, weight, bias, eps, need_x
        self.grad_x = torch.empty_like(x) if need_x else None
        self.grad_weight, self.grad_bias = torch.zeros_like(weight), torch.zeros_like(bias)

    def forward(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Normalized rows."""
        self._rows = rows
        y, self._mean, self._rstd = torch.native_layer_norm(
            self.x[rows], self.weight.shape, self.weight, self.bias, self.eps
        )
        return y.to(dtype)

    def backward(self, grad: Tensor) -> None:
        """Add the gradients of the rows last normalized, from the gradient of their output."""
        x = self.x[self._rows]
        grads = torch.ops.aten.native_layer_norm_backward(
            grad.to(x.dtype),
            x,
            self.weight.shape,
            self._mean,
            self._rstd,
            self.weight,
            self.bias,
            [self.need_x, True, True],
        )
        if self.grad_x is not None:
            self.grad_x[self._rows] = grads[0]
        self.grad_weight += grads[1]
        self.grad_bias += grads[2]


class _NormLinear(torch.autograd.Function):
    """linear(norm(x)); the backward pass recomputes the norm."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, nw: Tensor, nb: Tensor, eps: float, weight: Tensor, bias: Tensor, dtype: torch.dtype
    ) -> Tensor:
        ctx.eps, w = eps, weight.to(dtype)
        ctx.save_for_backward(x, nw, nb, w)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(F.layer_norm(x, nw.shape, nw, nb, eps).to(dtype), w, bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, nw, nb, w = ctx.saved_tensors
        rows, grad = x.flatten(0, -2), grad.flatten(0, -2)
        norm = _NormGradient(rows, nw, nb, ctx.eps, ctx.needs_input_grad[0])
        grad_w = None
        for part in _chunks(len(rows), sum(w.shape), grad):
            g = grad[part]
            grad_w = _plus_product(grad_w, g.t(), norm.forward(part, w.dtype), nw.dtype)
            norm.backward(g @ w)
        grad_x = None if norm.grad_x is None else norm.grad_x.view_as(x)
        return grad_x, norm.grad_weight, norm.grad_bias, None, grad_w, grad.sum(0, dtype=nw.dtype), None


class _NormMlp(torch.autograd.Function):
    """fc2(gelu(fc1(norm(x)))); the backward pass recomputes norm and GELU, and fc1 unless it was saved."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        nw: Tensor,
        nb: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        eps: float,
        dtype: torch.dtype,
        keep_hidden: bool,
    ) -> Tensor:
        w1, b1, w2, b2 = (p.to(dtype) for p in (w1, b1, w2, b2))
        rows = x.flatten(0, -2)
        out = torch.empty(len(rows), len(b2), dtype=dtype, device=x.device)
        hidden = torch.empty(len(rows), len(b1), dtype=dtype, device=x.device) if keep_hidden else None
        with torch.autocast(x.device.type, enabled=False):
            for part in _chunks(len(rows), len(b1), w1):
                h = torch.addmm(
                    b1,
                    F.layer_norm(rows[part], nw.shape, nw, nb, eps).to(dtype),
                    w1.t(),
                    out=None if hidden is None else hidden[part],
                )
                torch.addmm(b2, F.gelu(h), w2.t(), out=out[part])
        ctx.eps = eps
        ctx.save_for_backward(x, nw, nb, w1, b1, w2, hidden)
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, nw, nb, w1, b1, w2, hidden = ctx.saved_tensors
        rows, grad = x.flatten(0, -2), grad.flatten(0, -2)
        norm = _NormGradient(rows, nw, nb, ctx.eps, ctx.needs_input_grad[0])
        grad_w1 = grad_w2 = None
        grad_b1 = torch.zeros_like(b1, dtype=nw.dtype)
        for part in _chunks(len(rows), len(b1), w1):
            g, y = grad[part], norm.forward(part, w1.dtype)
            h = torch.addmm(b1, y, w1.t()) if hidden is None else hidden[part]
            grad_w2 = _plus_product(grad_w2, g.t(), F.gelu(h), nw.dtype)
            grad_h = torch.ops.aten.gelu_backward(g @ w2, h)
            del h
            grad_w1 = _plus_product(grad_w1, grad_h.t(), y, nw.dtype)
            grad_b1 += grad_h.sum(0, dtype=nw.dtype)
            norm.backward(grad_h @ w1)
        grad_x = None if norm.grad_x is None else norm.grad_x.view_as(x)
        grad_b2 = grad.sum(0, dtype=nw.dtype)
        return grad_x, norm.grad_weight, norm.grad_bias, grad_w1, grad_b1, grad_w2, grad_b2, None, None, None


def _plus_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """total + a @ b, or a @ b without a total, in ``dtype``; ``total`` is overwritten."""
    if total is None:
        return (a @ b).to(dtype)
    return total.addmm_(a, b) if a.dtype == dtype else total.add_(a @ b)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention: q [B, heads, N, d], k and v [B, heads, T, d] -> [B, heads, N, d].

    PyTorch's fused attention, except in half precision on a CPU: there its backward pass takes three to ten times as
    long as plain matrix products, which are used unless the attention matrix is large. Their scores are rounded to half
    precision before the softmax.
    """
    elements = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    if q.device.type != "cpu" or q.dtype == torch.float32 or elements > _MOST_ATTENTION_ELEMENTS:
        return F.scaled_dot_product_attention(q, k, v)
    if not may_need_gradients():
        return _weights(q, k) @ v
    return _PlainAttention.apply(q, k, v)


def _weights(q: Tensor, k: Tensor) -> Tensor:
    """Attention matrix [B, heads, N, T]."""
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)


class _PlainAttention(torch.autograd.Function):
    """Attention by matrix products; saves its inputs and the attention matrix, but no rearranged copies of them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = _weights(q, k)
        ctx.save_for_backward(q, k, v, weights)
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
        return out.copy_(weights @ v)  # in the memory layout that the projection needs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v, weights = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        grad_v = weights.transpose(-2, -1) @ grad
        scores = torch._softmax_backward_data(grad @ v.transpose(-2, -1), weights, -1, q.dtype)
        return (scores @ k).mul_(scale), (scores.transpose(-2, -1) @ q).mul_(scale), grad_v
