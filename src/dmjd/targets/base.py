"""The interface of learning targets, which is all that the model relies on."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WHITEN_EPS = 1e-5


def whiten(x: Tensor) -> Tensor:
    """Instance whitening: LayerNorm without affine over the last dimension, eps 1e-5; same shape."""
    return F.layer_norm(x, x.shape[-1:], eps=WHITEN_EPS)


def whitened_mean(layers: Sequence[Tensor]) -> Tensor:
    """Average the features of one or more layers. Each is whitened first, so that none outweighs the others.

    Args:
        layers: [B, N, C] each, of any floating type.

    Returns:
        [B, N, C] float32, whitened.
    """
    white = [whiten(layer.float()) for layer in layers]
    return white[0] if len(white) == 1 else whiten(torch.stack(white).mean(dim=0))


@dataclass(frozen=True)
class TargetSettings:
    """Base class for the settings of a target: a frozen dataclass in the same file as the target."""


class Target(nn.Module, ABC):
    """Maps the unmasked image to one vector per token; no gradient flows through it.

    A target that is created by name is constructed as ``cls(encoder)``, or ``cls(encoder, settings)`` if it has
    settings.

    Attributes:
        name: name of the target in configurations.
        settings_class: dataclass of its settings; None = it has none. In a run's configuration, field ``x`` of target
            ``name`` is called ``name_x``.
        dim: C, numbers per token.
        autocast: whether it may compute in the run's reduced precision; its result is float32 either way.
    """

    name: ClassVar[str]
    settings_class: ClassVar[type[TargetSettings] | None] = None
    dim: int
    autocast: ClassVar[bool] = False

    @abstractmethod
    def forward(self, normalized: Tensor, raw: Tensor) -> Tensor:
        """Compute the targets.

        Args:
            normalized: [B, c, H, W], the encoder's input.
            raw: [B, c, H, W], the same images on the 0..255 scale, uint8 (as most sources give them) or float32.

        Returns:
            [B, N, C] float32.
        """

    def of_valid(self, normalized: Tensor, raw: Tensor, valid: Tensor) -> Tensor:
        """Targets of images in which some pixels mean nothing; these are the mean in both forms.

        Override it in targets of a token that can leave its invalid pixels out.

        Args:
            normalized, raw: as in :meth:`forward`; ``raw`` is float32.
            valid: [B, c, H, W] bool.

        Returns:
            [B, N, C] float32, finite. Tokens with less than half of valid pixels have no loss.
        """
        return self(normalized, raw)

    def after_step(self, encoder: nn.Module, step: int, progress: float) -> None:
        """Called after optimizer step ``step`` (from 1), at ``progress`` of the run (0 to 1).

        Override it in targets that follow the encoder.
        """

    def scalars(self, features: Tensor) -> dict[str, Tensor]:
        """Scalars to log about the targets [B, N, C] of a step: name -> scalar."""
        return {}

    def warning(self, scalars: Mapping[str, float]) -> str | None:
        """A warning for the user, given the logged means of :meth:`scalars`; None if there is none."""
        return None
