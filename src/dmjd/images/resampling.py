"""Bicubic crop-and-resize: batches with exact sums, single images with Pillow."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from dmjd.images.invalid import LEAST_VALID, has_invalid

_WEIGHT_UNIT = 1024.0  # weights are summed as this, because sums are rounded to multiples of 2^-16


def resample(images: Tensor, boxes: Tensor, size: tuple[int, int], flips: Tensor | None = None) -> Tensor:
    """Crop one box of each image and resize it, bicubic (a = -0.5) with antialiasing, as Pillow does.

    Columns are resized by one matrix product per image, rows by weighted sums of the few that contribute. Weights are
    multiples of 2^-15, so every sum is exact (uint8 in float32; floats, rounded to multiples of 2^-16, in float64). The
    result for an image does not depend on the device, the number of threads or the rest of the batch.

    Args:
        images: [B, C, H, W] uint8 or float32 on the 0..255 scale.
        boxes: [B, 4] (top, left, height, width) in pixels, may be fractional.
        size: (h, w) of the result.
        flips: [B] bool, which results to flip horizontally; None: none.

    Returns:
        [B, C, h, w], data type of ``images``. uint8 is rounded and clamped, also between the two passes.
    """
    eight_bit = images.dtype == torch.uint8
    dtype, round_ = (torch.float32, _round_to_byte) if eight_bit else (torch.float64, _round_to_step)
    boxes = boxes.to(device=images.device, dtype=torch.float64)
    # Slices: the host would wait for a GPU that an index list is copied to.
    columns, which = _bicubic_taps(boxes[:, 1::2], images.shape[3], size[1])
    matrices = columns.dense(images.shape[3], dtype)  # U, w, W
    if flips is not None:
        which = which + flips.to(which) * len(matrices)
        matrices = torch.cat([matrices, matrices.flip(1)])
    with _exact_products(images.device):
        x = round_(images.to(dtype).flatten(1, 2) @ matrices.index_select(0, which).transpose(1, 2))  # B, C*H, w
    rows, which = _bicubic_taps(boxes[:, 0::2], images.shape[2], size[0])
    pixel, weight = rows.pixel.index_select(0, which), rows.weight.to(dtype).index_select(0, which)
    x = _sum_rows(x.unflatten(1, images.shape[1:3]), pixel, weight)
    # The conversion to uint8 truncates, so adding 0.5 rounds without another pass.
    return x.add_(0.5).clamp_(0, 255).to(torch.uint8) if eight_bit else round_(x).to(images.dtype)


def _round_to_byte(x: Tensor) -> Tensor:
    """Round to integers 0..255, in place."""
    return x.add_(0.5).floor_().clamp_(0, 255)


def _round_to_step(x: Tensor) -> Tensor:
    """Round to multiples of 2^-16, in place."""
    return x.mul_(2.0**16).round_().mul_(2.0**-16)


def _sum_rows(x: Tensor, pixel: Tensor, weight: Tensor) -> Tensor:
    """Weighted sums of rows: [B, C, H, w], ``pixel`` and ``weight`` [B, h, taps] -> [B, C, h, w]."""
    B, C, H, w = x.shape
    first = torch.arange(0, B * C * H, H, dtype=pixel.dtype, device=x.device).view(B, C, 1, 1)
    rows = (pixel[:, None] + first).flatten(0, 2)  # B*C*h, taps
    weights = weight[:, None].expand(B, C, -1, -1).flatten(0, 2)
    return functional.embedding_bag(rows, x.view(-1, w), per_sample_weights=weights, mode="sum").view(B, C, -1, w)


class _Taps(NamedTuple):
    """Input pixels of each output pixel of a resized line, and their weights: both [U, num_out, taps]."""

    pixel: Tensor  # int32
    weight: Tensor  # float64

    def dense(self, num_in: int, dtype: torch.dtype) -> Tensor:
        """The same as matrices [U, num_out, num_in]."""
        zeros = torch.zeros(*self.pixel.shape[:2], num_in, dtype=dtype, device=self.pixel.device)
        return zeros.scatter_add_(-1, self.pixel.long(), self.weight.to(dtype))


def _bicubic_taps(spans: Tensor, num_in: int, num_out: int) -> tuple[_Taps, Tensor]:
    """Weights for resizing ``spans`` [B, 2] (start, length): multiples of 2^-15 that sum to 1 for every output pixel.

    Returns:
        Taps of the distinct spans, and [B] int64, the index of each span among them.
    """
    if spans.device.type == "cpu":  # small images have few distinct spans; on a GPU this would block the host
        spans, which = _distinct(spans)
    else:
        which = torch.arange(len(spans), device=spans.device)
    start, length = spans.view(-1, 2, 1, 1).unbind(1)  # U, 1, 1 each
    scale = length / num_out
    width = scale.clamp(min=1)  # antialiasing: the kernel is at least as wide as an output pixel
    center = start + (torch.arange(num_out, dtype=torch.float64, device=start.device).view(1, -1, 1) + 0.5) * scale
    # The largest number of taps of a kernel: a box is never longer than the image.
    taps = torch.arange(math.ceil(4 * max(1.0, num_in / num_out)), device=start.device)
    pixel = (center - 2 * width + 0.5).floor() + taps  # U, out, taps
    t = ((pixel + 0.5 - center) / width).abs_()
    inner = (1.5 * t - 2.5) * t * t + 1
    outer = ((-0.5 * t + 2.5) * t - 4) * t + 2
    weights = torch.where(t < 1, inner, torch.where(t < 2, outer, 0))
    weights = torch.where((pixel >= 0) & (pixel < num_in), weights, 0)
    weights = (weights / weights.sum(-1, keepdim=True) * 2**15).round_()
    # The largest weight takes the rounding error, so that the sum is 1 and uniform areas keep their value.
    weights.scatter_add_(-1, weights.argmax(-1, keepdim=True), 2**15 - weights.sum(-1, keepdim=True))
    return _Taps(pixel.int().clamp_(0, num_in - 1), weights.mul_(2.0**-15)), which


def _distinct(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 2] float64 on the CPU -> distinct rows [U, 2], and [B] int64, the index of each row among them.

    NumPy sorts the rows as complex numbers. ``torch.unique`` would take a quarter of the time of a small batch.
    """
    numbers = np.ascontiguousarray(pairs.numpy()).view(np.complex128).ravel()
    unique, which = np.unique(numbers, return_inverse=True)
    return torch.from_numpy(unique.view(np.float64).reshape(-1, 2)), torch.from_numpy(which)


@contextlib.contextmanager
def _exact_products(device: torch.device) -> Iterator[None]:
    """Full float32 precision of matrix products, even if training has enabled autocast or TF32."""
    backend: Any = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    chosen = backend.fp32_precision
    backend.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        backend.fp32_precision = chosen


def resize_box(image: np.ndarray, box: Sequence[float], size: tuple[int, int]) -> Tensor:
    """Crop a box of one image and resize it.

    Args:
        image: [H, W, C] uint8 or float32, values on the 0..255 scale.
        box: (top, left, height, width) in pixels, may be fractional.
        size: (h, w) of the result.

    Returns:
        [C, h, w], data type of ``image``. uint8 with 1, 3 or 4 channels is resized by Pillow, the rest by
        :func:`resample`. They agree within one level, rarely two, except for overshoot beyond 0..255 at hard edges,
        which versions of Pillow clip at different times. Where the image has NaN, see :func:`_resample_valid`.
    """
    top, left, height, width = (float(x) for x in box)
    if image.shape[:2] == tuple(size) == (height, width):  # bicubic resizing would change nothing
        return torch.from_numpy(image.transpose(2, 0, 1).copy())
    mode = {1: "L", 3: "RGB", 4: "CMYK"}.get(image.shape[2])  # not RGBA, which would premultiply alpha
    if image.dtype != np.uint8 or mode is None:
        one = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None]
        boxes = torch.tensor([[top, left, height, width]], dtype=torch.float64, device="cpu")
        return (_resample_valid if has_invalid(image) else resample)(one, boxes, size)[0]
    pil = Image.fromarray(image[:, :, 0] if mode == "L" else image)
    if mode == "CMYK":
        pil = Image.frombytes(mode, image.shape[1::-1], image.tobytes())
    pil = pil.resize(size[::-1], Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    resized = np.array(pil).reshape(*size, image.shape[2])
    return torch.from_numpy(resized).permute(2, 0, 1).contiguous()


def _resample_valid(images: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """:func:`resample` of float32 images of which some values are NaN.

    Weights of NaN count as 0. The result is NaN where less than half of the weight is left; elsewhere the sum is
    divided by the weight that is left, and kept within the valid values of its channel, as bicubic weights may be
    negative. Results that no NaN takes part in are those of :func:`resample`.
    """
    valid = images.isfinite()
    sums = resample(torch.where(valid, images, 0.0), boxes, size)
    weighed = valid[:, :1] if bool((valid == valid[:, :1]).all()) else valid  # nearly always the same in all channels
    weights = resample(weighed * _WEIGHT_UNIT, boxes, size) / _WEIGHT_UNIT
    low, high = (torch.where(valid, images, end).flatten(2) for end in (torch.inf, -torch.inf))
    within = torch.clamp(sums / weights, low.amin(2)[..., None, None], high.amax(2)[..., None, None])
    mixed = torch.where(weights >= LEAST_VALID, within, torch.nan)
    return torch.where(weights == 1, sums, mixed)


def center_box(height: int, width: int, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest centered box (top, left, height, width) with the aspect ratio of ``size`` (h, w)."""
    scale = min(height / size[0], width / size[1])
    h, w = min(height, size[0] * scale), min(width, size[1] * scale)  # not beyond the image by rounding
    return (height - h) / 2, (width - w) / 2, h, w
