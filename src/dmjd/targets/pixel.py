"""Normalized-pixel targets (MAE, He et al. 2022, ``norm_pix_loss``)."""

import torch
from torch import Tensor

from dmjd.encoders.base import Encoder
from dmjd.nn.tokens import patchify
from dmjd.targets.base import Target

PIXEL_EPS = 1e-6


class PixelTarget(Target):
    """Each patch of the normalized image with zero mean and unit variance over all its values.

    Entries are in the order (row, column, channel); the variance is unbiased.

    Args:
        encoder: determines patch size P and number of channels C.

    Raises:
        ValueError: for patches of a single value.
    """

    name = "pixel"

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.patch_size = encoder.patch_size
        self.dim = self.patch_size**2 * encoder.in_chans
        if self.dim < 2:
            raise ValueError("a pixel target needs patches of more than one value: use a larger patch or target 'hog'")

    def forward(self, normalized: Tensor, raw: Tensor) -> Tensor:
        """[B, C, H, W] normalized -> [B, N, P*P*C]."""
        patches = patchify(normalized.float(), self.patch_size)  # B, N, P*P*C
        mean, std = self.patch_statistics(patches)
        return (patches - mean) / std

    def of_valid(self, normalized: Tensor, raw: Tensor, valid: Tensor) -> Tensor:
        """As :meth:`forward`, with the mean and variance of the valid pixels of a patch; 0, the mean, where invalid."""
        patches, inside = (patchify(x.float(), self.patch_size) for x in (normalized, valid))  # B, N, P*P*C
        count = inside.sum(dim=-1, keepdim=True)
        mean = (patches * inside).sum(dim=-1, keepdim=True) / count.clamp(min=1)
        centered = (patches - mean) * inside
        variance = centered.square().sum(dim=-1, keepdim=True) / (count - 1).clamp(min=1)
        own = centered / (variance + PIXEL_EPS).sqrt()
        return torch.where(count == inside.shape[2], self(normalized, raw), own)

    @staticmethod
    def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each patch, which undo the normalization: [B, N, 1] each."""
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        return mean, (variance + PIXEL_EPS).sqrt()
