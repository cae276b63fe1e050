"""Normalized-pixel targets (MAE, He et al. 2022, ``norm_pix_loss``)."""

import torch
from torch import Tensor

from dmjd.nn.tokens import patchify
from dmjd.targets.base import Target

PIXEL_EPS = 1e-6


class PixelTarget(Target):
    """Each patch of the normalized image brought to zero mean and unit variance over all its values.

    Args:
        patch_size: P. in_chans: C. Entries in the order (row, column, channel); unbiased variance.
    """

    name = "pixel"

    def __init__(self, *, patch_size: int, in_chans: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.dim = patch_size * patch_size * in_chans
        if self.dim < 2:
            raise ValueError("a pixel target needs patches of more than one value: use a larger patch or target 'hog'")

    def forward(self, normalized: Tensor, raw: Tensor) -> Tensor:
        """[B, C, H, W] normalized -> [B, N, P*P*C]."""
        patches = patchify(normalized.float(), self.patch_size)  # B, N, P*P*C
        mean, std = self.patch_statistics(patches)
        return (patches - mean) / std

    @staticmethod
    def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
        """What undoes the normalization: mean and standard deviation of each patch, [B, N, 1] each."""
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        return mean, (variance + PIXEL_EPS).sqrt()
