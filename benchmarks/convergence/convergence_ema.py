"""Targets from several blocks of a moving copy of the encoder, for the set ``ema``.

Shapes: B image, N token, D width, L block, C = L * D or D.
"""

import torch
from torch import Tensor
from torch.nn.functional import instance_norm

from dmjd.encoders.base import Encoder
from dmjd.targets.base import whitened_mean
from dmjd.targets.ema import EmaSettings, EmaTarget


class LayeredEmaTarget(EmaTarget):
    """The target ``ema`` with each channel of a block normalized over the tokens of an image (data2vec 2.0, Baevski et
    al. 2022).

    Args:
        joined: whether every block is a target of its own, their features side by side, instead of one of their mean.
    """

    def __init__(self, encoder: Encoder, settings: EmaSettings, joined: bool) -> None:
        super().__init__(encoder, settings)
        self.joined = joined
        self.dim = encoder.embed_dim * (self.layers if joined else 1)

    @torch.no_grad()
    def forward(self, normalized: Tensor, raw: Tensor) -> Tensor:
        """[B, c, H, W] normalized -> [B, N, C]."""
        outputs = self.copy.block_outputs(normalized, self.layers)  # B, N, D each
        outputs = [instance_norm(layer.float().transpose(1, 2)).transpose(1, 2) for layer in outputs]
        return torch.cat(outputs, dim=2) if self.joined else whitened_mean(outputs)
