"""Disjoint masking (DM): K masked views of an image whose masks avoid each other (DMJD, section III-A).

One routine serves single tokens and square blocks of tokens, any grid, any number of views. Each view hides the same
number of units; the disjoint regulation makes a new view prefer what earlier views left visible.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dmjd.rng import STREAM_DECODE, STREAM_MASK, hash64

# Places of unit, noise and count in a 64-bit sort key.
_UNITS, _NOISE, _COUNTS = 1 << 20, 1 << 52, 1 << 11

_TOLERANCE = 1e-6  # so that e.g. 49 * (1 - 0.6) = 19.6 and 50 * (1 - 0.6) = 20.0 never lose a unit to rounding


@dataclass(frozen=True)
class Masks:
    """Which tokens each view of each image sees. Token ids are raster positions and never count prefix tokens.

    Attributes:
        visible: [K, B, V] int64 ids the encoder sees, sorted (in the caller's order when made by ``from_visible``).
        masked: [K, B, M] int64 ids that are masked, sorted.
        mask: [K, B, N] bool, True = masked.
    """

    visible: Tensor
    masked: Tensor
    mask: Tensor

    @classmethod
    def from_visible(cls, visible: Tensor, num_tokens: int) -> "Masks":
        """Masks of the caller's own making.

        Args:
            visible: [K, B, V] (or [B, V] for one view) integer ids, distinct within a row; their order is kept.
            num_tokens: N, tokens of the whole image without prefix tokens.

        Raises:
            ValueError: for ids out of range or repeated, or when nothing or everything is visible.
        """
        visible = visible.long().unsqueeze(0) if visible.dim() == 2 else visible.long()
        if visible.dim() != 3 or visible.shape[0] == 0:
            raise ValueError(f"visible must be [K, B, V] or [B, V] with K >= 1, got shape {list(visible.shape)}")
        V = visible.shape[-1]
        if not 0 < V < num_tokens:
            raise ValueError(f"between 1 and {num_tokens - 1} of {num_tokens} tokens must be visible, got {V}")
        if visible.numel() and (visible.min() < 0 or visible.max() >= num_tokens):
            raise ValueError(f"visible ids must lie in 0..{num_tokens - 1}, got {visible.min()}..{visible.max()}")
        mask = torch.ones(*visible.shape[:2], num_tokens, dtype=torch.bool, device=visible.device)
        mask.scatter_(-1, visible, False)
        if not bool((mask.sum(-1) == num_tokens - V).all()):
            raise ValueError("visible ids must be distinct within each row")
        return cls(visible=visible, masked=_split(mask, V)[1], mask=mask)

    def asked(self, share: float) -> "Masks":
        """The same views with a part of their masked tokens: what a decoder is asked for (CrossMAE, Fu et al. 2024).

        Args:
            share: of the masked tokens, in (0, 1]; at least one is left.

        Returns:
            Masks with ``masked`` [K, B, A] int64, sorted, drawn at random: a pure function of the masks.
        """
        M = self.masked.shape[-1]
        A = asked_count(M, share)
        if A == M:
            return self
        row = hash64(STREAM_DECODE, self.masked).sum(dim=-1, keepdim=True)  # K, B, 1
        noise = (hash64(STREAM_DECODE, row, self.masked) >> 12) & (_NOISE - _UNITS)
        order = _sorted(noise | self.masked)[..., :A] & (_UNITS - 1)
        return replace(self, masked=_sorted(order))


def asked_count(num_masked: int, share: float) -> int:
    """Masked tokens of a view that the decoder is asked for."""
    return max(1, round(num_masked * share))


def mask_counts(
    num_units: int, num_views: int, mask_ratio: float, pred_ratio: float | None = None
) -> tuple[int, int, int]:
    """Units visible in a view, masked in a view, and masked in at least one view: (V, M, U).

    Args:
        num_units: N, tokens or blocks of an image.
        num_views: K >= 1.
        mask_ratio: c, the corruption rate.
        pred_ratio: p, the prediction rate; None = as disjoint as possible.

    Raises:
        ValueError: for what cannot be, naming the allowed range.
    """
    N, K, c, p = num_units, num_views, mask_ratio, pred_ratio
    if K < 1:
        raise ValueError(f"num_views must be at least 1, got {K}")
    if K >= _COUNTS or N > _UNITS:
        raise ValueError(f"at most {_COUNTS - 1} views and {_UNITS} masking units an image, got {K} and {N}")
    if not 0.0 < c < 1.0:
        raise ValueError(f"mask_ratio must lie between 0 and 1 (both excluded), got {c}")
    V = math.floor(N * (1.0 - c) + _TOLERANCE)
    M = N - V
    if V == 0 or M == 0:
        # Rounded inwards, so that the bounds the message names are themselves allowed.
        least, most = math.ceil(1e4 / N) / 1e4, math.floor(1e4 - 1e4 / N) / 1e4
        what = "visible" if V == 0 else "masked"
        cure = f"use a mask_ratio in [{least}, {most}]" if N > 1 else "use smaller blocks, patches or a larger image"
        raise ValueError(f"mask_ratio {c} leaves none of the {N} masking units {what}; {cure}")
    if p is None:
        return V, M, min(N, K * M)
    top = min(1.0, K * c)
    if not c - _TOLERANCE <= p <= top + _TOLERANCE:
        raise ValueError(
            f"pred_ratio must lie in [{c:.7g}, {top:.7g}] for mask_ratio {c} and {K} view(s), got {p}: the union of "
            "the views' masks is at least one view's mask and at most all of them together"
        )
    return V, M, max(M, min(math.floor(p * N + _TOLERANCE), K * M, N))


def resolve_block_size(grid: tuple[int, int], block_size: int | None) -> int:
    """The side of a masking block in tokens; None means 2 where it divides both grid sides, else 1."""
    h, w = grid
    if h < 1 or w < 1:
        raise ValueError(f"the token grid must be at least 1 x 1, got {h} x {w}")
    if block_size is None:
        return 2 if h % 2 == 0 and w % 2 == 0 else 1
    if block_size < 1 or h % block_size or w % block_size:
        allowed = [b for b in range(1, min(h, w) + 1) if h % b == 0 and w % b == 0]
        raise ValueError(f"block_size {block_size} does not divide the {h} x {w} token grid; choose one of {allowed}")
    return block_size


def disjoint_masks(
    batch_size: int,
    grid: tuple[int, int] = (14, 14),
    num_views: int = 2,
    mask_ratio: float = 0.6,
    pred_ratio: float | None = None,
    block_size: int | None = 1,
    disjoint: bool = True,
    keys: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Masks:
    """Draw K masked views for each image (DMJD, section III-A and Eq. 3; counts for every K by this project).

    View k takes its M units in the order of how often they have been masked so far, fewest first, ties by fresh
    noise; units never masked are eligible only while the union of the masks is below U (see :func:`mask_counts`).

    Args:
        batch_size: B images.
        grid: (h, w) tokens.
        num_views: K.
        mask_ratio: share of an image masked in each view.
        pred_ratio: share masked in at least one view; None = as much as K views can.
        block_size: side in tokens of the square block that is masked as one; None = 2 where it divides, else 1.
        disjoint: False draws the views independently of each other (the ablation).
        keys: [B] int64, one per image; the masks are a pure function of them, the same on every device.
        generator: source of the keys when none are given (default: torch's own).
        device: where the masks are made; default the keys' device, else the CPU.

    Returns:
        :class:`Masks` with exactly V visible and M masked tokens in every view.

    Raises:
        ValueError: for what cannot be.
    """
    if batch_size < 0:
        raise ValueError(f"batch_size must not be negative, got {batch_size}")
    if keys is not None and generator is not None:
        raise ValueError("give keys or a generator, not both: masks are a pure function of the keys")
    block = resolve_block_size(grid, block_size)
    h, w = grid[0] // block, grid[1] // block
    if not disjoint and pred_ratio is not None:
        raise ValueError("pred_ratio has no meaning with disjoint=False: independent views cannot be steered to it")
    V, M, U = mask_counts(h * w, num_views, mask_ratio, pred_ratio)
    if keys is None:
        keys = _draw_keys(batch_size, generator)
    elif keys.shape != (batch_size,) or keys.dtype != torch.int64:
        raise ValueError(f"keys must be [{batch_size}] int64, got {list(keys.shape)} {keys.dtype}")
    keys = keys.to(device if device is not None else keys.device)
    mask = _draw_units(keys, h * w, num_views, M, U, disjoint)  # K, B, units
    if block > 1:
        mask = (
            mask.unflatten(-1, (h, w)).repeat_interleave(block, -2).repeat_interleave(block, -1).flatten(-2)
        )  # K, B, N
    visible, masked = _split(mask, V * block * block)
    return Masks(visible=visible, masked=masked, mask=mask)


def _draw_keys(batch_size: int, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else None
    return torch.randint(-(2**63), 2**63 - 1, (batch_size,), generator=generator, device=device)


def _draw_units(keys: Tensor, N: int, K: int, M: int, U: int, disjoint: bool) -> Tensor:
    """The draw itself: bool [K, B, N], True = masked. The union is equally large for every image, so it is a number."""
    units = torch.arange(N, device=keys.device)
    counts = torch.zeros(keys.shape[0], N, dtype=torch.int64, device=keys.device)  # B, N times masked so far
    views = []
    union = 0
    for view in range(K):
        noise = hash64(STREAM_MASK, keys.unsqueeze(1), view, units)  # B, N
        noise = (noise >> 12) & (_NOISE - _UNITS)  # 32 bits between the count above and the unit below, in one sort key
        order = _sorted(counts * _NOISE | noise | units) & (_UNITS - 1)  # B, N units
        fresh = min(M, U - union)  # units no earlier view has masked come first in the order
        chosen = torch.cat([order[:, :fresh], order[:, N - union : N - union + M - fresh]], dim=1)  # B, M
        mask = torch.zeros_like(counts, dtype=torch.bool).scatter_(1, chosen, True)
        views.append(mask)
        if disjoint:
            counts = counts + mask
            union += fresh
    return torch.stack(views)


def _split(mask: Tensor, num_visible: int) -> tuple[Tensor, Tensor]:
    """Sorted ids of the visible and of the masked tokens, from [K, B, N] bool with the same count in every row."""
    ids = torch.arange(mask.shape[-1], device=mask.device)
    order = _sorted(mask * _UNITS + ids) & (_UNITS - 1)
    return order[..., :num_visible], order[..., num_visible:]


def _sorted(keys: Tensor) -> Tensor:
    """int64 keys that differ within a row, ascending in each row. NumPy's sort is many times as fast on a CPU."""
    if keys.device.type == "cpu":
        return torch.from_numpy(np.sort(keys.numpy(), axis=-1))
    return keys.sort(dim=-1).values
