"""Pure functions on tokens: patches, positions, gathering by id, and the counter-based noise of every random choice.

Shape legend of the whole package: B image, K view, N token, V visible, M masked, D width, C channel or target entry,
H, W picture sides, h, w grid sides, P patch side.
"""

import numpy as np
import torch
from torch import Tensor

# One stream per random decision, so that e.g. the crop of an image never shares bits with its mask.
STREAM_EPOCH, STREAM_IMAGE, STREAM_CROP, STREAM_FLIP, STREAM_MASK, STREAM_REPLACE, STREAM_STEP = range(1, 8)
STREAM_SUBSET, STREAM_HOLD_OUT, STREAM_AUGMENT, STREAM_MIX = range(8, 12)  # of evaluations
STREAM_DECODE = 12  # which masked tokens the decoder is asked for
STREAM_PLACE, STREAM_COLOUR = 16, 17  # of pictures with masks or boxes

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """The two's-complement reading of a 64-bit pattern, since torch has no usable uint64 arithmetic."""
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64: torch's own copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64 finaliser (Steele, Lea, Flood, OOPSLA 2014) on wrapping int64."""
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX2)
    return x ^ _shift_right(x, 31)


def _mix_int(x: int) -> int:
    """The same as :func:`_mix` on an unsigned Python integer."""
    x = ((x ^ (x >> 30)) * _MIX1) & _MASK64
    x = ((x ^ (x >> 27)) * _MIX2) & _MASK64
    return x ^ (x >> 31)


def hash64(*parts: int | Tensor) -> Tensor:
    """Counter-based 64-bit hash of a tuple of integers: the package's only source of randomness in data and masks.

    Args:
        parts: Python integers (taken modulo 2^64) and int64 tensors that broadcast together; the order matters.

    Returns:
        int64 tensor of the broadcast shape, uniform over all 64-bit patterns; the same bits on every device.
    """
    head: int = 0
    state: Tensor | None = None
    for part in parts:
        if state is None and isinstance(part, int):  # leading integers cost no tensor operation
            head = _mix_int(((head ^ (part & _MASK64)) + _GOLDEN) & _MASK64)
            continue
        state = torch.tensor(_signed(head)) if state is None else state
        state = _mix((state ^ (_signed(part) if isinstance(part, int) else part.long())) + _signed(_GOLDEN))
    return torch.tensor(_signed(head)) if state is None else state


def uniform(bits: Tensor) -> Tensor:
    """float64 in [0, 1) from the top 53 bits of a hash; same shape."""
    return _shift_right(bits, 11).to(torch.float64) * 2.0**-53


def image_keys(seed: int, epoch: Tensor, index: Tensor) -> Tensor:
    """The key of each image of an epoch, from which its crop, flip and masks follow.

    Args:
        seed: the run's seed.
        epoch: [B] int64. index: [B] int64, position of the image in its set.

    Returns:
        [B] int64.
    """
    return hash64(STREAM_IMAGE, seed, epoch, index)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """[B, C, h*P, w*P] -> [B, h*w, P*P*C], raster order; entries in the order (row, column, channel)."""
    B, C, H, W = images.shape
    P = patch_size
    if H % P or W % P:
        raise ValueError(f"image of {H} x {W} pixels is not divisible into patches of {P} x {P}")
    x = images.reshape(B, C, H // P, P, W // P, P).permute(0, 2, 4, 3, 5, 1)  # B, h, w, P, P, C
    return x.reshape(B, (H // P) * (W // P), P * P * C)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Inverse of :func:`patchify`: [B, h*w, P*P*C] -> [B, C, h*P, w*P]."""
    B, N, E = patches.shape
    (h, w), P = grid, patch_size
    if h * w != N or E % (P * P):
        raise ValueError(f"{N} patches of {E} values do not form a {h} x {w} grid of {P} x {P}-pixel patches")
    x = patches.reshape(B, h, w, P, P, E // (P * P)).permute(0, 5, 1, 3, 2, 4)  # B, C, h, P, w, P
    return x.reshape(B, -1, h * P, w * P)


def sincos_positions(dim: int, grid: tuple[int, int], num_prefix: int = 0) -> Tensor:
    """Fixed 2-D sine-cosine position table (MAE, He et al. 2022), computed in float64.

    The first half of the channels encodes the column, the second half the row; each half is [sin..., cos...] with
    frequencies 10000^(-i / (dim / 4)).

    Returns:
        [1, num_prefix + h*w, dim] float32; prefix positions are zero.

    Raises:
        ValueError: if ``dim`` is not divisible by 4.
    """
    if dim % 4:
        raise ValueError(f"sine-cosine positions need a width divisible by 4, got {dim}")
    h, w = grid
    omega = 10000.0 ** (-np.arange(dim // 4, dtype=np.float64) / (dim / 4))
    rows, columns = np.meshgrid(np.arange(h, dtype=np.float64), np.arange(w, dtype=np.float64), indexing="ij")
    angles = [axis.reshape(-1, 1) * omega for axis in (columns, rows)]  # N, D/4 each
    table = np.concatenate([part for a in angles for part in (np.sin(a), np.cos(a))], axis=1)  # N, D
    table = np.concatenate([np.zeros((num_prefix, dim)), table])
    return torch.from_numpy(table).float().unsqueeze(0)


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """Pick tokens by id: x [B, N, D], ids [B, V] int64 -> [B, V, D]."""
    return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def gather_views(x: Tensor, ids: Tensor) -> Tensor:
    """Pick tokens of images for all their views: x [B, N, D], ids [R, V] with R = K * B, view-major -> [R, V, D]."""
    image = torch.arange(ids.shape[0], device=ids.device) % x.shape[0]  # R
    return x[image.unsqueeze(1), ids]
