"""The 5 x 5 depthwise convolution of ConvViT and its gradient, on dense or visible channels-last maps.

A *dense* map is [B, H, W, D]; a *visible* map is [R, V, s, s, D]: for each of R rows V visible tokens of s x s cells.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dmjd.nn.recompute import may_need_gradients

# Largest side of the convolution kernels that the fast CPU routine was measured with.
_LARGEST_TILE = 64

_CHUNK_BYTES = 1 << 24  # size of the dense map of a chunk of rows

# Queried on import: torch.compile cannot trace these calls, so each would break the graph.
_CPU_HAS_AVX = torch.backends.cpu.get_cpu_capability().startswith("AVX")
_CPU_HAS_BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()


def dense_depthwise(conv: nn.Conv2d, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Depthwise convolution of a dense map [B, H, W, D]; ``mask`` [B, H, W] bool sets cells to zero (True = masked)."""
    if mask is not None:
        x = x.masked_fill(mask.unsqueeze(-1), 0.0)
    if not may_need_gradients():
        return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    weight, bias = _parameters(conv, x)
    return _Depthwise.apply(x, weight, bias, None, x.shape[1:3])


def visible_depthwise(conv: nn.Conv2d, x: Tensor, cells: Tensor, size: tuple[int, int]) -> Tensor:
    """Depthwise convolution of a visible map: of the dense map with zeros in masked cells, at the visible cells only.

    Args:
        conv: the depthwise convolution.
        x: [R, V, s, s, D].
        cells: [R * V * s * s] int64 from :func:`cell_indices`.
        size: (h * s, w * s) of the map.

    Returns:
        [R, V, s, s, D].
    """
    weight, bias = _parameters(conv, x)
    return _Depthwise.apply(x, weight, bias, cells, size)


def cell_indices(ids: Tensor, grid: tuple[int, int], cells: int) -> Tensor:
    """Indices of the cells of visible tokens in the flattened dense maps [R * h*s * w*s].

    Args:
        ids: [R, V] int64 raster ids of tokens.
        grid: (h, w) tokens.
        cells: s, cells per token side.

    Returns:
        [R * V * s * s] int64, in the order of a visible map.
    """
    (h, w), s = grid, cells
    rows = torch.arange(ids.shape[0], device=ids.device).view(-1, 1, 1, 1) * (h * s * w * s)
    i = torch.arange(s, device=ids.device)
    row, column = (ids // w)[..., None, None] * s + i[:, None], (ids % w)[..., None, None] * s + i  # R, V, s, 1 or s
    return (rows + row * (w * s) + column).flatten()


def _parameters(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias in the data type of ``x``, which autocast has already chosen."""
    assert conv.bias is not None
    return conv.weight.to(x.dtype), conv.bias.to(x.dtype)


class _Depthwise(torch.autograd.Function):
    """The convolution; it saves only the visible values for the backward pass, never the dense map.

    On a CPU it works on a few rows at a time, so that the dense map of the whole batch never exists.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, cells: Tensor | None, size: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(x, weight, cells)
        ctx.size = size
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        for rows in _row_chunks(x, size):
            at = _cells_of(cells, rows, x.shape[0], size)
            out[rows] = _gather(_convolve(_scatter(x[rows], at, size), weight, bias), at, x[rows].shape)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight, cells = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_x = torch.empty_like(x) if need_x else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        for rows in _row_chunks(x, ctx.size):
            at = _cells_of(cells, rows, x.shape[0], ctx.size)
            grad_map = _scatter(grad[rows], at, ctx.size)
            if grad_x is not None:  # the transposed convolution is a convolution with the flipped kernel
                grad_x[rows] = _gather(_convolve(grad_map, weight.flip(-2, -1), None), at, x[rows].shape)
            if grad_weight is not None:
                grad_weight += _weight_gradient(_scatter(x[rows], at, ctx.size), grad_map, weight)
        grad_bias = grad.flatten(0, -2).sum(0) if need_bias else None
        return grad_x, None if grad_weight is None else grad_weight.to(weight.dtype), grad_bias, None, None


def _row_chunks(x: Tensor, size: tuple[int, int]) -> Iterator[slice]:
    """Equal parts of the rows whose dense maps fit the cache; all rows at once on devices other than a CPU."""
    R = x.shape[0]
    bytes_of_row = math.prod(size) * x.shape[-1] * x.element_size()
    count = min(R, -(-R * bytes_of_row // _CHUNK_BYTES)) if x.device.type == "cpu" else 1
    step = -(-R // max(1, count))
    return (slice(start, min(start + step, R)) for start in range(0, R, max(1, step)))


def _cells_of(cells: Tensor | None, rows: slice, count: int, size: tuple[int, int]) -> Tensor | None:
    """Cell indices of the chunk ``rows`` of ``count`` rows, relative to its first row."""
    if cells is None or rows.stop - rows.start == count:
        return cells
    return cells.view(count, -1)[rows].flatten() - rows.start * math.prod(size)


def _scatter(x: Tensor, cells: Tensor | None, size: tuple[int, int]) -> Tensor:
    """Visible or dense map -> dense map [B, H, W, D]."""
    if cells is None:
        return x
    R, D = x.shape[0], x.shape[-1]
    return x.new_zeros(R * math.prod(size), D).index_copy_(0, cells, x.reshape(-1, D)).view(R, *size, D)


def _gather(x: Tensor, cells: Tensor | None, shape: torch.Size) -> Tensor:
    """Inverse of :func:`_scatter`."""
    return x if cells is None else x.reshape(-1, x.shape[-1]).index_select(0, cells).view(shape)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[-1])
    return y.permute(0, 2, 3, 1)


def _weight_gradient(x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """Gradient [D, 1, k, k] of the kernel in float32, from dense maps [B, H, W, D] of values and output gradients.

    PyTorch's gradient of a 5 x 5 kernel takes ten times as long as the convolution on a CPU. The gradient is a
    correlation of values with output gradients, so the fast convolution computes it with the gradient map of each image
    and channel as the kernel.
    """
    B, H, W, D = x.shape
    k = weight.shape[-1]
    if not _fast_large_kernels(x):
        sides = ([1, 1], [k // 2, k // 2], [1, 1], False, [0, 0], D, [False, True, False])
        nchw = (grad.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2))
        return torch.ops.aten.convolution_backward(*nchw, weight, None, *sides)[1].float()
    padded = F.pad(x.permute(0, 3, 1, 2), (k // 2,) * 4)  # B, D, H + k - 1, W + k - 1
    grad = grad.permute(0, 3, 1, 2)  # B, D, H, W
    total = torch.zeros(D, k, k, dtype=torch.float32, device=x.device)
    for top in range(0, H, _LARGEST_TILE):
        for left in range(0, W, _LARGEST_TILE):
            kernel = grad[:, :, top : top + _LARGEST_TILE, left : left + _LARGEST_TILE]
            h, w = kernel.shape[2:]
            values = padded[:, :, top : top + h + k - 1, left : left + w + k - 1]
            part = F.conv2d(values.reshape(1, B * D, h + k - 1, w + k - 1), kernel.reshape(-1, 1, h, w), groups=B * D)
            total += part.view(B, D, k, k).sum(0, dtype=torch.float32)
    return total.unsqueeze(1)


def _fast_large_kernels(x: Tensor) -> bool:
    """Whether depthwise convolutions with large kernels are fast: on CPUs with AVX."""
    if x.device.type != "cpu" or not _CPU_HAS_AVX:
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and _CPU_HAS_BF16)
