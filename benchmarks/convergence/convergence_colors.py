"""HOG targets that know the color of a cell, for the set ``best``: HOG is blind to it, and pixels are not."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dmjd.encoders.base import Encoder
from dmjd.targets import HogSettings
from dmjd.targets.base import Target
from dmjd.targets.hog import HogTarget


@dataclass(frozen=True)
class Colors:
    """Settings.

    Attributes:
        kind: "mean": HOG and the mean of each channel in each cell; "opponent": HOG of brightness, red minus green and
            yellow minus blue instead of the three channels. Images have three channels.
        weight: of the means.
    """

    kind: str
    weight: float = 1.0


class ColorHog(Target):
    """HOG of a token's cells, with their colors.

    Args:
        encoder: determines patch size and number of channels. settings: what is added. cell: side of a cell in pixels.
    """

    name = "color_hog"

    def __init__(self, encoder: Encoder, settings: Colors, cell: int | None) -> None:
        super().__init__()
        self.hog, self.settings, self.patch_size = HogTarget(encoder, HogSettings(cell)), settings, encoder.patch_size
        means = self.hog.cells**2 * encoder.in_chans
        self.dim = self.hog.dim + (means if settings.kind == "mean" else 0)

    def forward(self, normalized: Tensor, raw: Tensor) -> Tensor:
        """[B, 3, H, W] twice -> [B, N, C]."""
        if self.settings.kind == "opponent":
            red, green, blue = raw.float().unbind(1)
            mean = (red + green + blue) / 3
            return self.hog(normalized, torch.stack([mean, red - green, (red + green) / 2 - blue], dim=1))
        means = F.avg_pool2d(normalized.float(), self.hog.cell_size)
        tokens = F.unfold(means, self.hog.cells, stride=self.hog.cells).transpose(1, 2)  # B, N, C * cells^2
        return torch.cat([self.hog(normalized, raw), self.settings.weight * tokens], dim=2)
