"""HOG targets: histograms of oriented gradients, whitened (MaskFeat, Wei et al. 2022; DMJD's default)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dmjd.targets.base import Target, whiten

NUM_BINS = 9
_CHUNK_PIXELS = {"cpu": 1 << 18, "cuda": 1 << 25}


def default_cell(patch_size: int) -> int:
    """Side of a HOG cell in pixels: half the patch if that is whole, else a third, else the patch."""
    for parts in (2, 3):
        if patch_size % parts == 0:
            return patch_size // parts
    return patch_size


def hog(images_0_255: Tensor, cell_size: int = 8, num_bins: int = NUM_BINS) -> Tensor:
    """Histograms of unsigned gradient orientation, each channel apart, without block normalisation or whitening.

    Centred differences, zero across the border; a pixel's magnitude goes whole into its orientation's bin, bins of
    180 / num_bins degrees; each cell holds the sum over its pixels divided by their count.

    Args:
        images_0_255: [B, C, H, W] of any number type, before normalisation.
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
    # A few images at a time: what lies between the passes then stays in the cache of a CPU, and memory stays small.
    most = _CHUNK_PIXELS.get(images_0_255.device.type, _CHUNK_PIXELS["cuda"])
    chunks = images_0_255.split(max(1, most // (C * H * W)))
    return torch.cat([_histograms(chunk.float().contiguous(), cell_size, num_bins) for chunk in chunks])


def _histograms(x: Tensor, cell: int, num_bins: int) -> Tensor:
    """[B, C, H, W] float32 -> [B, C, H/cell, W/cell, bins]."""
    B, C, H, W = x.shape
    g_row, g_col = torch.zeros_like(x), torch.zeros_like(x)
    torch.sub(x[:, :, 2:], x[:, :, :-2], out=g_row[:, :, 1:-1])
    torch.sub(x[..., 2:], x[..., :-2], out=g_col[..., 1:-1])
    # 2 n bins of the full turn and one for exactly 180 degrees, folded at the end. A few float32 steps up: an angle on
    # the edge of two bins (45 degrees of 4 bins) must not be rounded below it on one device and not on another.
    # Integer gradients come no nearer to an edge without lying on it.
    n, all_bins = num_bins, 2 * num_bins + 1
    bins = torch.atan2(g_row, g_col).mul_(n / math.pi).add_(n * (1 + 4e-7)).floor_()  # 0 .. 2 n
    magnitude = g_row.mul_(g_row).addcmul_(g_col, g_col).sqrt_()
    if x.device.type == "cpu":
        bins += (torch.arange(W) // cell * all_bins).float()  # its place in the row of cells
        rows = B * C * (H // cell)
        sums = x.new_zeros(rows, W // cell * all_bins)
        sums.scatter_add_(1, bins.long().view(rows, -1), magnitude.view(rows, -1))
        full = sums.view(B, C, H // cell, W // cell, all_bins)
        half = full[..., :n] + full[..., n : 2 * n]
        half[..., 0] += full[..., -1]
        return half.mul_(1 / cell**2)
    bins.remainder_(n)
    # One pooling pass a bin: no atomic additions, whose order would change the sums from run to run.
    return torch.stack([F.avg_pool2d(magnitude * (bins == k), cell) for k in range(n)], dim=-1)


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

    def forward(self, normalised: Tensor, raw: Tensor) -> Tensor:
        """[B, C, H, W] on the 0..255 scale (``raw``) -> [B, N, cells^2 * bins * C]."""
        x = whiten(hog(raw, self.cell_size, self.num_bins))  # B, C, h*cells, w*cells, bins
        B, C, rows, columns, bins = x.shape
        s = self.cells
        x = x.view(B, C, rows // s, s, columns // s, s, bins).permute(0, 2, 4, 3, 5, 6, 1)  # B, h, w, s, s, bins, C
        return x.reshape(B, -1, self.dim)
