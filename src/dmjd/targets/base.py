"""The protocol every target keeps; the model sees nothing else of it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WHITEN_EPS = 1e-5


def whiten(x: Tensor) -> Tensor:
    """Instance whitening: LayerNorm without affine over the last dimension, eps 1e-5; same shape."""
    return F.layer_norm(x, x.shape[-1:], eps=WHITEN_EPS)


def whitened_mean(layers: Sequence[Tensor]) -> Tensor:
    """Features of one or more layers as one target: each whitened, so that none outweighs the others, then averaged.

    Args:
        layers: [B, N, C] each, of any floating type.

    Returns:
        [B, N, C] float32, whitened.
    """
    white = [whiten(layer.float()) for layer in layers]
    return white[0] if len(white) == 1 else whiten(torch.stack(white).mean(dim=0))


class Target(nn.Module, ABC):
    """Maps the unmasked image to one vector per token; no gradient flows through it.

    Attributes:
        name: the word users choose it by.
        dim: C, numbers per token.
        autocast: whether it may compute in the run's reduced precision; its result is float32 either way.
    """

    name: str
    dim: int
    autocast = False

    @abstractmethod
    def forward(self, normalized: Tensor, raw: Tensor) -> Tensor:
        """The targets.

        Args:
            normalized: [B, c, H, W], the encoder's input.
            raw: [B, c, H, W] the same images on the 0..255 scale, bytes (as they come from most sets) or float32.

        Returns:
            [B, N, C] float32.
        """

    def after_step(self, encoder: nn.Module, step: int, progress: float) -> None:
        """Called after optimizer step ``step`` (from 1), at ``progress`` of the run; targets that follow the encoder
        override it."""

    def scalars(self, features: Tensor) -> dict[str, Tensor]:
        """What is to be logged of the targets [B, N, C] of a step: name -> scalar."""
        return {}

    def warning(self, scalars: Mapping[str, float]) -> str | None:
        """What a user must be told, given the logged means of :meth:`scalars`; None where all is well."""
        return None
