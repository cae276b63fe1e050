"""The counter-based hash behind every random choice in data, masks and augmentation."""

import math
from numbers import Integral

import torch
from torch import Tensor

from dmjd.config.checks import shown

# One stream per random decision, so that e.g. the crop of an image shares no bits with its masks.
STREAM_EPOCH, STREAM_IMAGE, STREAM_CROP, STREAM_FLIP, STREAM_MASK, STREAM_REPLACE, STREAM_STEP = range(1, 8)

STREAM_SUBSET, STREAM_HOLD_OUT, STREAM_AUGMENT, STREAM_MIX = range(8, 12)  # for evaluations

STREAM_DECODE = 12  # for the subset of masked tokens that the decoder predicts

STREAM_VIEW, STREAM_DROPOUT, STREAM_PROPOSALS = 13, 14, 15

STREAM_PLACE, STREAM_COLOR = 16, 17  # for images with masks or boxes

STREAM_HELD_OUT = 18  # for images that are not trained on

STREAM_VALID_CROP = 19  # for crops in place of those with too many invalid pixels

STREAM_SHARD = 20  # for the order of shards

_MASK64 = (1 << 64) - 1

_GOLDEN = 0x9E3779B97F4A7C15

_MIX1 = 0xBF58476D1CE4E5B9

_MIX2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """A 64-bit pattern as a signed integer (two's complement); torch has no usable uint64 arithmetic."""
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64; torch's own copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64 finalizer (Steele, Lea, Flood, OOPSLA 2014) on wrapping int64."""
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX2)
    return x ^ _shift_right(x, 31)


def _mix_int(x: int) -> int:
    """:func:`_mix` of an unsigned Python integer."""
    x = ((x ^ (x >> 30)) * _MIX1) & _MASK64
    x = ((x ^ (x >> 27)) * _MIX2) & _MASK64
    return x ^ (x >> 31)


def hash64(*parts: int | Tensor) -> Tensor:
    """Counter-based 64-bit hash of a tuple of integers, the only source of randomness in data and masks.

    Args:
        parts: integers of at most 64 bits, signed or unsigned, and int64 tensors that broadcast together; the order
            matters.

    Raises:
        ValueError: for a larger integer.

    Returns:
        int64 tensor of the broadcast shape, uniform over all 64-bit patterns; the same bits on every device.
    """
    head: int = 0
    state: Tensor | None = None
    for part in parts:
        if isinstance(part, Integral):  # NumPy's too
            part = int(part)
            if not -(1 << 63) <= part <= _MASK64:
                raise ValueError(f"seeds and keys must be integers of at most 64 bits, got {shown(part)}")
        if state is None and isinstance(part, int):  # leading integers cost no tensor operation
            head = _mix_int(((head ^ (part & _MASK64)) + _GOLDEN) & _MASK64)
            continue
        state = torch.tensor(_signed(head), device="cpu") if state is None else state
        state = _mix((state ^ (_signed(part) if isinstance(part, int) else part.long())) + _signed(_GOLDEN))
    return torch.tensor(_signed(head), device="cpu") if state is None else state


def uniform(bits: Tensor) -> Tensor:
    """float64 in [0, 1) from the top 53 bits of a hash; same shape."""
    return _shift_right(bits, 11).to(torch.float64) * 2.0**-53


def at_least(bits: Tensor, limit: float) -> Tensor:
    """``uniform(bits) >= limit`` by integers, for devices without float64; bool, same shape."""
    return _shift_right(bits, 11) >= math.ceil(limit * 2.0**53)


def image_keys(seed: int, epoch: Tensor, index: Tensor) -> Tensor:
    """The key of each image in an epoch; its crop, flip and masks are functions of it.

    Args:
        seed: seed of the run.
        epoch: [B] int64.
        index: [B] int64, index of the image in its data set.

    Returns:
        [B] int64.
    """
    return hash64(STREAM_IMAGE, seed, epoch, index)
