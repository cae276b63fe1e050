"""Targets from several blocks of a moving copy of the encoder, for the set ``ema``.

Shapes: B image, N token, D width, L block, C = L * D or D.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import instance_norm

from dmjd.encoders.base import Encoder
from dmjd.targets.base import whitened_mean
from dmjd.targets.ema import EmaSettings, EmaTarget


@dataclass(frozen=True)
class Layers:
    """Settings.

    Attributes:
        joined: whether every block is a target of its own, their features side by side, instead of one of their mean.
        instance: whether each channel is normalized over the tokens of an image (data2vec 2.0, Baevski et al. 2022),
            before the features are averaged or joined.
    """

    joined: bool = False
    instance: bool = False


class LayeredEmaTarget(EmaTarget):
    """The target ``ema`` with other ways to put the blocks together."""

    def __init__(self, encoder: Encoder, settings: EmaSettings, ways: Layers) -> None:
        super().__init__(encoder, settings)
        self.ways = ways
        self.dim = encoder.embed_dim * (self.layers if ways.joined else 1)

    @torch.no_grad()
    def forward(self, normalized: Tensor, raw: Tensor) -> Tensor:
        """[B, c, H, W] normalized -> [B, N, C]."""
        outputs = [layer.float() for layer in self.copy.block_outputs(normalized, self.layers)]  # B, N, D
        if self.ways.instance:
            outputs = [instance_norm(layer.transpose(1, 2)).transpose(1, 2) for layer in outputs]
        if not self.ways.joined:
            return whitened_mean(outputs)
        return torch.cat(outputs if self.ways.instance else [whitened_mean([layer]) for layer in outputs], dim=2)
