"""Targets from several blocks of a moving copy of the encoder, for the set ``ema``.

Shapes: B image, N token, D width.
"""

import torch
from torch import Tensor

from dmjd.targets.base import whitened_mean
from dmjd.targets.ema import EmaTarget, over_tokens


class InstanceMeanTarget(EmaTarget):
    """The target ``ema`` with the mean of its blocks, each normalized over the tokens of an image, channel by channel.

    So does data2vec 2.0 (Baevski et al. 2023). Here they are whitened per token besides.
    """

    @torch.no_grad()
    def forward(self, normalized: Tensor, raw: Tensor) -> Tensor:
        """[B, c, H, W] normalized -> [B, N, D]."""
        return whitened_mean([over_tokens(layer) for layer in self.copy.block_outputs(normalized, self.layers)])
