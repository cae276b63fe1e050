"""HOG targets: histograms of oriented gradients, whitened (MaskFeat, Wei et al. 2022; DMJD's default)."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dmjd.targets.base import Target, whiten

NUM_BINS = 9

# Pixels taken at a time: what lies between the passes stays in the cache of a CPU, and memory small elsewhere.
_CPU_PIXELS, _DEVICE_PIXELS = 1 << 18, 1 << 25

# The table of all gradients that differences of bytes can make; for more bins than this it would not pay.
_TABLE_SIDE, _TABLE_BINS = 512, 32


def default_cell(patch_size: int) -> int:
    """Side of a HOG cell in pixels: half the patch if that is whole, else a third, else the patch."""
    for parts in (2, 3):
        if patch_size % parts == 0:
            return patch_size // parts
    return patch_size


def hog(images_0_255: Tensor, cell_size: int = 8, num_bins: int = NUM_BINS) -> Tensor:
    """Histograms of unsigned gradient orientation, each channel apart, without block normalization or whitening.

    Centerd differences, zero across the border; a pixel's magnitude goes whole into its orientation's bin, bins of
    180 / num_bins degrees; each cell holds the sum over its pixels divided by their count.

    Args:
        images_0_255: [B, C, H, W] of any number type, before normalization.
        cell_size: side of a cell in pixels, dividing H and W.
        num_bins: orientations.

    Returns:
        [B, C, H/cell, W/cell, bins] float32.

    Raises:
        ValueError: if the cell does not divide the image.
    """
    H, W = images_0_255.shape[-2:]
    if cell_size < 1 or H % cell_size or W % cell_size:
        raise ValueError(f"HOG cell of {cell_size} pixels does not divide the image of {H} x {W}")
    if not 1 <= num_bins <= 255:
        raise ValueError(f"HOG takes 1 to 255 bins, got {num_bins}")
    B, C = images_0_255.shape[:2]
    if min(images_0_255.shape) == 0:
        return torch.zeros(B, C, H // cell_size, W // cell_size, num_bins, device=images_0_255.device)
    if images_0_255.device.type != "cpu" or torch.compiler.is_compiling():
        # As many at a time as keep memory small; one pooling pass a bin, which compiles to a single graph.
        chunks = images_0_255.split(max(1, _DEVICE_PIXELS // (C * H * W)))
        return torch.cat([_pooled(chunk.float(), cell_size, num_bins) for chunk in chunks])
    bytewise = images_0_255.dtype == torch.uint8 and num_bins <= _TABLE_BINS
    histograms = _looked_up if bytewise else _computed
    out = torch.empty(B * C, H // cell_size, W // cell_size, num_bins)
    per_chunk = max(1, _CPU_PIXELS // (H * W))
    planes = images_0_255.reshape(B * C, H, W)
    for chunk, part in zip(planes.split(per_chunk), out.split(per_chunk), strict=True):
        torch.sum(histograms(chunk, cell_size, num_bins), dim=2, out=part)
        part.mul_(1 / cell_size**2)
    return out.view(B, C, H // cell_size, W // cell_size, num_bins)


def _looked_up(planes: Tensor, cell: int, num_bins: int) -> Tensor:
    """[b, H, W] uint8 -> [b, H/cell, cell, W/cell, bins]: sums over rows of cells, by the table of all gradients."""
    b, H, W = planes.shape
    x = planes.int()
    at = torch.empty_like(x)  # 512 * row difference + column difference
    at[:, :1], at[:, -1:] = 0, 0
    torch.sub(x[:, 2:], x[:, :-2], out=at[:, 1:-1])
    at[..., :: max(1, W - 1)].mul_(_TABLE_SIDE)  # the border, of no column difference
    inner = at[..., 1:-1]
    torch.add(x[..., 2:], inner, alpha=_TABLE_SIDE, out=inner).sub_(x[..., :-2])
    sums = F.embedding_bag(at.abs_().view(-1, cell), _gradient_table(num_bins), mode="sum")
    return sums.view(b, H // cell, cell, W // cell, num_bins)


@functools.lru_cache(maxsize=2)
def _gradient_table(num_bins: int) -> Tensor:
    """[256 * 512, bins] float32: row |512 * row difference + column difference| holds the gradient's magnitude in its
    bin and zeros beside it. Differences of bytes are whole, so these are all there are; a gradient and its opposite
    share a row."""
    rows = torch.arange(_TABLE_SIDE // 2 * _TABLE_SIDE)
    down = (rows + _TABLE_SIDE // 2).div(_TABLE_SIDE, rounding_mode="floor")
    bins, magnitude = _polar(down.float(), (rows - down * _TABLE_SIDE).float(), num_bins)
    return _one_hot(num_bins)[bins.flatten().long()] * magnitude.view(-1, 1)


def _one_hot(num_bins: int) -> Tensor:
    """[2 n + 1, n]: the n bins of half a turn from those of a full turn and one for exactly 180 degrees."""
    return torch.eye(num_bins).repeat(3, 1)[: 2 * num_bins + 1]


def _computed(planes: Tensor, cell: int, num_bins: int) -> Tensor:
    """The same from planes of any number type, the same bits for the same values."""
    b, H, W = planes.shape
    bins, magnitude = _polar(*_gradient(planes.float()), num_bins)
    sums = F.embedding_bag(
        bins.int().view(-1, cell), _one_hot(num_bins), per_sample_weights=magnitude.view(-1, cell), mode="sum"
    )
    return sums.view(b, H // cell, cell, W // cell, num_bins)


def _pooled(x: Tensor, cell: int, num_bins: int) -> Tensor:
    """[B, C, H, W] float32 -> [B, C, H/cell, W/cell, bins] without atomic additions, whose order would change the
    sums from run to run."""
    bins, magnitude = _polar(*_gradient(x), num_bins)
    bins.remainder_(num_bins)
    return torch.stack([F.avg_pool2d(magnitude * (bins == k), cell) for k in range(num_bins)], dim=-1)


def _gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    """Centerd differences of [..., H, W] along rows and along columns, zero across the border."""
    (H, W), g_row, g_col = x.shape[-2:], x[..., 2:, :] - x[..., :-2, :], x[..., 2:] - x[..., :-2]
    return F.pad(g_row, (0, 0, 1, min(H - 1, 1))), F.pad(g_col, (1, min(W - 1, 1)))  # an image may be a pixel wide


def _polar(g_row: Tensor, g_col: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Orientation, in bins of a full turn: 0 .. 2 n as float32; and magnitude."""
    # A few float32 steps up: an angle on the edge of two bins (45 degrees of 4 bins) must not be rounded below it on
    # one device and not on another. Integer gradients come no nearer to an edge without lying on it.
    bins = torch.atan2(g_row, g_col).mul_(n / math.pi).add_(n * (1 + 4e-7)).floor_()
    return bins, (g_row * g_row).addcmul_(g_col, g_col).sqrt_()


class HogTarget(Target):
    """Whitened HOG of a token's cells, in the order (cell row, cell column, bin, channel) (DMJD, section III-C).

    Args:
        patch_size: pixels of a token's side. in_chans: image channels.
        cell_size: pixels of a cell's side, dividing the patch; None = :func:`default_cell`.
        num_bins: orientations.
    """

    name = "hog"

    def __init__(
        self, *, patch_size: int, in_chans: int, cell_size: int | None = None, num_bins: int = NUM_BINS
    ) -> None:
        super().__init__()
        self.cell_size = cell_size if cell_size is not None else default_cell(patch_size)
        if self.cell_size < 1 or patch_size % self.cell_size:
            raise ValueError(f"hog_cell {cell_size} does not divide the {patch_size}-pixel patch")
        self.num_bins = num_bins
        self.cells = patch_size // self.cell_size  # along one side of a token
        self.dim = self.cells**2 * num_bins * in_chans

    def forward(self, normalized: Tensor, raw: Tensor) -> Tensor:
        """[B, C, H, W] on the 0..255 scale (``raw``) -> [B, N, cells^2 * bins * C]."""
        x = whiten(hog(raw, self.cell_size, self.num_bins))  # B, C, h*cells, w*cells, bins
        B, C, rows, columns, bins = x.shape
        s = self.cells
        x = x.view(B, C, rows // s, s, columns // s, s, bins).permute(0, 2, 4, 3, 5, 6, 1)  # B, h, w, s, s, bins, C
        return x.reshape(B, -1, self.dim)
