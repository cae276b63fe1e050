"""HOG targets: histograms of oriented gradients, whitened (MaskFeat, Wei et al. 2022; DMJD's default)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dmjd.targets.base import Target, whiten

NUM_BINS = 9


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
    x = images_0_255.float()
    g_row = F.pad(x[:, :, 2:] - x[:, :, :-2], (0, 0, 1, 1)) if H > 1 else torch.zeros_like(x)
    g_col = F.pad(x[:, :, :, 2:] - x[:, :, :, :-2], (1, 1)) if W > 1 else torch.zeros_like(x)
    magnitude = torch.hypot(g_row, g_col)
    # Fold to the half-plane before the angle is taken: exactly 180 degrees becomes 0 without rounding at the seam.
    flip = (g_row < 0) | ((g_row == 0) & (g_col < 0))
    angle = torch.atan2(g_row.abs(), torch.where(flip, -g_col, g_col))  # [0, pi)
    # A few float32 steps up: an angle on the edge of two bins (45 degrees of 4 bins) must not be rounded below it on
    # one device and not on another. Integer gradients come no nearer to an edge without lying on it.
    bins = (angle * (num_bins / math.pi) + num_bins * 4e-7).to(torch.uint8).clamp_(max=num_bins - 1)
    # One pooling pass a bin: no mask of all bins is held, and sums are in a fixed order on every device.
    cells = [F.avg_pool2d(magnitude * (bins == k), cell_size) for k in range(num_bins)]
    return torch.stack(cells, dim=-1)  # B, C, H/cell, W/cell, bins


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
