"""The protocol every target keeps; the model sees nothing else of it."""

import torch.nn.functional as F
from torch import Tensor, nn

WHITEN_EPS = 1e-5


def whiten(x: Tensor) -> Tensor:
    """Instance whitening: LayerNorm without affine over the last dimension, eps 1e-5; same shape."""
    return F.layer_norm(x, x.shape[-1:], eps=WHITEN_EPS)


class Target(nn.Module):
    """Maps the unmasked image to one vector per token; no gradient flows through it.

    Attributes:
        name: the word users choose it by.
        dim: C, numbers per token.
    """

    name: str
    dim: int

    def forward(self, normalised: Tensor, raw: Tensor) -> Tensor:
        """The targets.

        Args:
            normalised: [B, c, H, W], the encoder's input.
            raw: [B, c, H, W] the same pictures on the 0..255 scale, bytes (as they come from most sets) or float32.

        Returns:
            [B, N, C] float32.
        """
        raise NotImplementedError

    def after_step(self, encoder: nn.Module, step: int) -> None:
        """Called after optimizer step ``step`` (from 1); targets that follow the encoder override it."""
