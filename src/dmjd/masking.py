"""Disjoint masking (DM): K masked views of an image whose masks overlap as little as possible (DMJD, section III-A).

:class:`Masks` holds the masks of a batch. A :class:`MaskSampler` draws them: :class:`DisjointMasks` is the paper's,
:class:`IndependentMasks` and :class:`ComplementaryMasks` are alternatives to compare it with. To add a sampler, write a
subclass and a line in :data:`SAMPLERS`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dmjd.config.checks import MAX_BATCH_SIZE, Bounds, check_bool, check_float, check_int, check_real, shown
from dmjd.config.tokens import default_block
from dmjd.rng import STREAM_DECODE, STREAM_MASK, hash64
from dmjd.suggest import did_you_mean

# Layout of a 64-bit sort key: mask count in the high bits, then noise, then the unit's index.
_UNITS, _NOISE, _COUNTS = 1 << 20, 1 << 52, 1 << 11
_TOLERANCE = 1e-6  # so that e.g. 49 * (1 - 0.6) = 19.6 and 50 * (1 - 0.6) = 20.0 never lose a unit to rounding


@dataclass(frozen=True)
class Masks:
    """Visible and masked tokens of each view of each image. Token ids are in raster order and skip prefix tokens.

    Attributes:
        visible: [K, B, V] int64 ids of the tokens the encoder sees, sorted (in the caller's order when built by
            :meth:`from_visible`).
        masked: [K, B, M] int64 ids of the masked tokens, sorted.
        mask: [K, B, N] bool, True = masked.
    """

    visible: Tensor
    masked: Tensor
    mask: Tensor

    @classmethod
    def from_visible(cls, visible: Tensor, num_tokens: int) -> "Masks":
        """Build masks from the ids of the visible tokens.

        Args:
            visible: [K, B, V] (or [B, V] for one view) integer ids, distinct within a row; their order is kept.
            num_tokens: N, tokens of an image without prefix tokens.

        Raises:
            ValueError: if ids are no integers, out of range or repeated, or if no token or every token is visible.
        """
        if not isinstance(visible, Tensor) or visible.dtype == torch.bool or visible.dtype.is_floating_point:
            raise ValueError(f"visible must be a tensor of integers, got {getattr(visible, 'dtype', shown(visible))}")
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

    def subset_masked(self, ratio: float) -> "Masks":
        """The same views with a random subset of their masked tokens, for a decoder that predicts only these.

        CrossMAE (Fu et al. 2024). The subset is a pure function of the masks.

        Args:
            ratio: share of the masked tokens to keep, in (0, 1]; at least one is kept.

        Returns:
            Masks with ``masked`` [K, B, :func:`num_decoded`] int64, sorted.
        """
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio must lie in (0, 1], got {ratio}")
        M = self.masked.shape[-1]
        A = num_decoded(M, ratio)
        if A == M:
            return self
        row = hash64(STREAM_DECODE, self.masked).sum(dim=-1, keepdim=True)  # K, B, 1
        noise = (hash64(STREAM_DECODE, row, self.masked) >> 12) & (_NOISE - _UNITS)
        order = _sorted(noise | self.masked)[..., :A] & (_UNITS - 1)
        return replace(self, masked=_sorted(order))


def num_decoded(num_masked: int, ratio: float) -> int:
    """Number of masked tokens in a view that :meth:`Masks.subset_masked` keeps."""
    return max(1, round(num_masked * ratio))


class MaskSampler(ABC):
    """Draws the masks of K views for each image of a batch.

    Attributes:
        num_views: K.
        mask_ratio: c, the share of an image that is masked in each view.
        pred_ratio: p, the share that is masked in at least one view, as requested; the learning-rate scale rule
            multiplies by p / c.
    """

    num_views: int
    mask_ratio: float
    pred_ratio: float

    @abstractmethod
    def counts(self, grid: tuple[int, int]) -> tuple[int, int, int]:
        """Tokens visible in a view, masked in a view, and masked in at least one view: (V, M, U).

        If the size of the union varies between draws, U is the largest possible size.

        Args:
            grid: (h, w) tokens of an image.

        Raises:
            ValueError: if the settings do not fit the grid.
        """

    @abstractmethod
    def draw(self, keys: Tensor, grid: tuple[int, int]) -> Masks:
        """Draw masks.

        Args:
            keys: [B] int64, one per image. The masks must be a pure function of them, the same on every device.
            grid: (h, w) tokens of an image.

        Returns:
            :class:`Masks` with V visible and M masked tokens in every view.
        """


class _BlockSampler(MaskSampler):
    """Base of the samplers below, which mask square blocks of tokens, called units."""

    disjoint = True

    def __init__(self, num_views: int, mask_ratio: float, pred_ratio: float | None, block_size: int | None) -> None:
        _check_ratios(num_views, mask_ratio, pred_ratio)
        self.num_views, self.mask_ratio = int(num_views), float(mask_ratio)
        self.block_size = None if block_size is None else check_int("block_size", block_size, Bounds(ge=1))
        self.pred_ratio = pred_ratio if pred_ratio is not None else min(1.0, num_views * mask_ratio)
        self._requested = pred_ratio

    def _units(self, grid: tuple[int, int]) -> tuple[int, int, int]:
        """Rows and columns of units, and the side of a unit in tokens."""
        block = resolve_block_size(grid, self.block_size)
        return grid[0] // block, grid[1] // block, block

    def counts(self, grid: tuple[int, int]) -> tuple[int, int, int]:
        """(V, M, U) in tokens."""
        h, w, block = self._units(grid)
        V, M, U = mask_counts(h * w, self.num_views, self.mask_ratio, self._requested)
        return V * block**2, M * block**2, U * block**2

    def draw(self, keys: Tensor, grid: tuple[int, int]) -> Masks:
        """Draw K views of each image: keys [B] int64 -> :class:`Masks`."""
        h, w, block = self._units(grid)
        V, M, U = mask_counts(h * w, self.num_views, self.mask_ratio, self._requested)
        mask = _draw_units(keys, h * w, self.num_views, M, U if self.disjoint else None)  # K, B, h*w
        if block > 1:  # K, B, N
            mask = mask.unflatten(-1, (h, w)).repeat_interleave(block, -2).repeat_interleave(block, -1).flatten(-2)
        visible, masked = _split(mask, V * block**2)
        return Masks(visible=visible, masked=masked, mask=mask)


class DisjointMasks(_BlockSampler):
    """Views that prefer to mask what earlier views left visible (DMJD, section III-A and Eq. 3).

    View k masks M units: those masked least often so far, ties broken at random. Units never masked before are eligible
    only while the union of the masks is smaller than U (see :func:`mask_counts`).

    Args:
        num_views: K.
        mask_ratio: c, share of an image masked in each view.
        pred_ratio: p, share masked in at least one view, from c to min(1, K c); None = as disjoint as possible.
        block_size: side of a masking block in tokens; None = 2 if it divides both grid sides, else 1.

    Raises:
        ValueError: if a setting is out of its range.
    """

    def __init__(
        self,
        num_views: int = 2,
        mask_ratio: float = 0.6,
        pred_ratio: float | None = None,
        block_size: int | None = None,
    ) -> None:
        super().__init__(num_views, mask_ratio, pred_ratio, block_size)


class IndependentMasks(_BlockSampler):
    """Views that are masked independently of each other: an ablation of :class:`DisjointMasks`.

    It takes the same arguments, without ``pred_ratio``: the expected prediction rate is p = 1 - (1 - c)^K.
    """

    disjoint = False

    def __init__(self, num_views: int = 2, mask_ratio: float = 0.6, block_size: int | None = None) -> None:
        super().__init__(num_views, mask_ratio, None, block_size)
        self.pred_ratio = 1.0 - (1.0 - mask_ratio) ** num_views


class ComplementaryMasks(_BlockSampler):
    """Views whose visible tokens partition the image (FastConvMAE): disjoint views with c = 1 - 1 / K.

    Args:
        num_views: K >= 2; it must divide the number of units.
        mask_ratio: None, or 1 - 1 / K.
        block_size: see :class:`DisjointMasks`.
    """

    def __init__(self, num_views: int = 4, mask_ratio: float | None = None, block_size: int | None = 1) -> None:
        num_views = check_int("num_views", num_views, Bounds(ge=2, most=_COUNTS - 1))
        ratio = 1.0 - 1.0 / num_views
        if mask_ratio is not None and abs(mask_ratio - ratio) > _TOLERANCE:
            raise ValueError(
                f"complementary masks of {num_views} views have mask_ratio {ratio:.7g}, so that the visible tokens "
                f"partition the image; got {mask_ratio}"
            )
        super().__init__(num_views, ratio, None, block_size)

    def _units(self, grid: tuple[int, int]) -> tuple[int, int, int]:
        h, w, block = super()._units(grid)
        if h * w % self.num_views:
            blocks = f"{h * w} blocks of {block} x {block} tokens"
            raise ValueError(f"num_views {self.num_views} does not divide the {blocks} that complementary views share")
        return h, w, block


SAMPLERS: dict[str, type[MaskSampler]] = {
    "disjoint": DisjointMasks,
    "independent": IndependentMasks,
    "complementary": ComplementaryMasks,
}


def sampler_class(name: str) -> type[MaskSampler]:
    """The class of a masking strategy.

    Raises:
        ValueError: if the name is not in :data:`SAMPLERS`.
    """
    if name not in SAMPLERS:
        raise ValueError(f"unknown masks {shown(name)}{did_you_mean(name, SAMPLERS)} Masks: {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


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
    """Draw K masked views for each image: :class:`DisjointMasks` as a function.

    Args:
        batch_size: B images.
        grid: (h, w) tokens.
        num_views: K.
        mask_ratio: share of an image masked in each view.
        pred_ratio: share masked in at least one view; None = as much as K views can.
        block_size: side of a masking block in tokens; None = 2 if it divides both grid sides, else 1.
        disjoint: False draws the views independently of each other (:class:`IndependentMasks`).
        keys: [B] int64, one per image; the masks are a pure function of them, the same on every device.
        generator: source of the keys if none are given (default: torch's global one).
        device: device of the masks; default: the device of the keys, else the CPU.

    Returns:
        :class:`Masks` with exactly V visible and M masked tokens in every view.

    Raises:
        ValueError: if a setting is out of its range or does not fit the grid.
    """
    batch_size = check_int("batch_size", batch_size, Bounds(ge=0, most=MAX_BATCH_SIZE))
    for name, value, kind in (("keys", keys, Tensor), ("generator", generator, torch.Generator)):
        if not isinstance(value, kind | None):
            raise ValueError(f"{name} must be a torch {kind.__name__}, got {shown(value)}")
    if keys is not None and generator is not None:
        raise ValueError("give keys or a generator, not both: masks are a pure function of the keys")
    if not check_bool("disjoint", disjoint) and pred_ratio is not None:
        raise ValueError("pred_ratio has no meaning with disjoint=False: independent views cannot be steered to it")
    if disjoint:
        sampler: MaskSampler = DisjointMasks(num_views, mask_ratio, pred_ratio, block_size)
    else:
        sampler = IndependentMasks(num_views, mask_ratio, block_size)
    if keys is None:
        keys = random_keys(batch_size, generator)
    elif keys.shape != (batch_size,) or keys.dtype != torch.int64:
        raise ValueError(f"keys must be [{batch_size}] int64, got {list(keys.shape)} {keys.dtype}")
    return sampler.draw(keys.to(device if device is not None else keys.device), grid)


def random_keys(batch_size: int, generator: torch.Generator | None = None) -> Tensor:
    """[B] int64 keys from a generator (default: torch's global one), on its device."""
    device = None if generator is None else generator.device
    return torch.randint(-(2**63), 2**63 - 1, (batch_size,), generator=generator, device=device)


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
        ValueError: if a setting is out of its range; the message names the range.
    """
    N, K, c, p = num_units, num_views, mask_ratio, pred_ratio
    _check_ratios(K, c, p)
    if N > _UNITS:
        raise ValueError(f"at most {_UNITS} masking units an image, got {N}")
    V = math.floor(N * (1.0 - c) + _TOLERANCE)
    M = N - V
    if V == 0 or M == 0:
        # Rounded inwards, so that the bounds in the message are themselves allowed.
        least, most = math.ceil(1e4 / N) / 1e4, math.floor(1e4 - 1e4 / N) / 1e4
        cure = f"use a mask_ratio in [{least}, {most}]" if N > 1 else "use smaller blocks, patches or a larger image"
        kind = "visible" if V == 0 else "masked"
        raise ValueError(f"mask_ratio {c} leaves none of the {N} masking units {kind}; {cure}")
    if p is None:
        return V, M, min(N, K * M)
    return V, M, max(M, min(math.floor(p * N + _TOLERANCE), K * M, N))


def _check_ratios(K: int, c: float, p: float | None = None) -> None:
    check_int("num_views", K, Bounds(ge=1, most=_COUNTS - 1))
    check_float("mask_ratio", c, Bounds(gt=0, lt=1))
    top = min(1.0, K * c)
    if p is not None and not c - _TOLERANCE <= check_real("pred_ratio", p) <= top + _TOLERANCE:
        raise ValueError(
            f"pred_ratio must lie in [{c:.7g}, {top:.7g}] for mask_ratio {c} and {K} view(s), got {p}: the union of "
            "the views' masks is at least one view's mask and at most all of them together"
        )


def resolve_block_size(grid: tuple[int, int], block_size: int | None) -> int:
    """The side of a masking block in tokens; None means :func:`default_block`."""
    if not isinstance(grid, Sequence) or len(grid) != 2:
        raise ValueError(f"grid must be (rows, columns), got {shown(grid)}")
    h, w = (check_int("grid", side, Bounds(ge=1)) for side in grid)
    block_size = default_block((h, w)) if block_size is None else block_size
    if block_size < 1 or h % block_size or w % block_size:
        allowed = [b for b in range(1, min(h, w) + 1) if h % b == 0 and w % b == 0]
        raise ValueError(f"block_size {block_size} does not divide the {h} x {w} token grid; choose one of {allowed}")
    return block_size


def _draw_units(keys: Tensor, N: int, K: int, M: int, U: int | None) -> Tensor:
    """Draw M of N units in each of K views: [K, B, N] bool, True = masked. U = None draws the views independently.

    The union has the same size for every image, so one number keeps track of it.
    """
    units = torch.arange(N, device=keys.device)
    counts = torch.zeros(keys.shape[0], N, dtype=torch.int64, device=keys.device)  # B, N times masked so far
    views = []
    union = 0
    for view in range(K):
        noise = hash64(STREAM_MASK, keys.unsqueeze(1), view, units)  # B, N
        noise = (noise >> 12) & (_NOISE - _UNITS)  # 32 bits, below the count and above the unit in the sort key
        order = _sorted(counts * _NOISE | noise | units) & (_UNITS - 1)  # B, N units
        fresh = M if U is None else min(M, U - union)  # units masked in no earlier view come first in the order
        chosen = torch.cat([order[:, :fresh], order[:, N - union : N - union + M - fresh]], dim=1)  # B, M
        mask = torch.zeros_like(counts, dtype=torch.bool).scatter_(1, chosen, True)
        views.append(mask)
        if U is not None:
            counts = counts + mask
            union += fresh
    return torch.stack(views)


def _split(mask: Tensor, num_visible: int) -> tuple[Tensor, Tensor]:
    """Sorted ids of the visible and of the masked tokens, from [K, B, N] bool with the same count in every row."""
    ids = torch.arange(mask.shape[-1], device=mask.device)
    order = _sorted(mask * _UNITS + ids) & (_UNITS - 1)
    return order[..., :num_visible], order[..., num_visible:]


def _sorted(keys: Tensor) -> Tensor:
    """Sort the rows of int64 keys, which are distinct within a row. On the CPU NumPy's sort is many times faster."""
    if keys.device.type == "cpu":
        return torch.from_numpy(np.sort(keys.numpy(), axis=-1))
    return keys.sort(dim=-1).values
