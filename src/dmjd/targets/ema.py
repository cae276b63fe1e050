"""Targets from an exponential moving average of the encoder (data2vec, Baevski et al. 2022)."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmjd.config.checks import MAX_DEPTH, Bounds, check_bool, check_float, check_int
from dmjd.encoders.base import Encoder
from dmjd.images.invalid import valid_tokens
from dmjd.targets.base import WHITEN_EPS, Target, TargetSettings, whiten, whitened_mean

MOMENTUM = 0.996

COLLAPSED = 0.02  # threshold of ``target_std``; healthy encoders, even random ones, are far above it


@dataclass(frozen=True)
class EmaSettings(TargetSettings):
    """Settings of :class:`EmaTarget`.

    Args:
        layers: number of last transformer blocks; None = half of them.
        momentum: momentum at the start of the run, 0 to 1; 1 = the copy stays what the run began with.
        joined: whether every block is a target of its own, all side by side; False = their mean.
    """

    layers: int | None = None
    momentum: float = MOMENTUM
    joined: bool = True

    def __post_init__(self) -> None:
        if self.layers is not None:
            check_int("ema_layers", self.layers, Bounds(ge=1, most=MAX_DEPTH))
        check_float("ema_momentum", self.momentum, Bounds(ge=0, le=1))
        check_bool("ema_joined", self.joined)


class EmaTarget(Target):
    """Features of an exponential moving average of the encoder, on the unmasked image.

    The outputs of the last blocks are normalized over the tokens of an image, channel by channel (data2vec 2.0, Baevski
    et al. 2023), and put side by side. If they are not joined, they are whitened, averaged and whitened again. After
    every step the copy moves towards the encoder by 1 - momentum; the momentum rises to 1 over the run by half a cosine
    (BYOL, Grill et al. 2020).

    Args:
        encoder: the encoder; it is copied with its weights.
        settings: layers, momentum, and whether blocks are joined.

    Raises:
        ValueError: for more layers than the encoder has blocks, or a momentum out of range.
    """

    name = "ema"
    settings_class = EmaSettings
    autocast = True

    def __init__(self, encoder: Encoder, settings: EmaSettings = EmaSettings()) -> None:
        super().__init__()
        self.layers = max(1, encoder.depth // 2) if settings.layers is None else settings.layers
        if self.layers > encoder.depth:
            raise ValueError(f"ema_layers must be 1 to {encoder.depth}, the encoder's blocks, got {self.layers}")
        self.momentum, self.joined = settings.momentum, settings.joined
        self._deviation: Tensor | None = None  # of the last images, if blocks are joined
        self.dim = encoder.embed_dim * (self.layers if self.joined else 1)
        self.copy = copy.deepcopy(encoder).requires_grad_(False).eval()
        self.copy.set_grad_checkpointing(False)

    def train(self, mode: bool = True) -> "EmaTarget":
        """Set the mode; the copy stays in evaluation mode, since targets must not depend on stochastic depth."""
        super().train(mode)
        self.copy.eval()
        return self

    def forward(self, normalized: Tensor, raw: Tensor) -> Tensor:
        """[B, c, H, W] normalized -> [B, N, L * D], or [B, N, D] if the L blocks are not joined."""
        return self._features(normalized, None)

    def of_valid(self, normalized: Tensor, raw: Tensor, valid: Tensor) -> Tensor:
        """:meth:`forward`; joined blocks are normalized over the tokens that are mostly valid, all others are zero."""
        return self._features(normalized, valid_tokens(valid, self.copy.patch_size))

    @torch.no_grad()
    def _features(self, normalized: Tensor, valid: Tensor | None) -> Tensor:
        outputs = self.copy.block_outputs(normalized, self.layers)
        if not self.joined:
            return whitened_mean(outputs)
        # Seen before the normalization, which makes even the rounding errors of a collapsed encoder large.
        self._deviation = feature_deviation(whiten(outputs[-1].float()))
        return torch.cat([over_tokens(layer, valid) for layer in outputs], dim=2)

    def momentum_at(self, progress: float) -> float:
        """Momentum at ``progress`` of the run (0 to 1): from the initial one to 1 by half a cosine."""
        return 1.0 - (1.0 - self.momentum) * 0.5 * (1.0 + math.cos(math.pi * progress))

    @torch.no_grad()
    def after_step(self, encoder: nn.Module, step: int, progress: float) -> None:
        """Move the copy towards the encoder."""
        if (momentum := self.momentum_at(progress)) == 1.0:  # a frozen copy
            return
        copied, current = ([p.detach() for p in module.parameters()] for module in (self.copy, encoder))
        torch._foreach_lerp_(copied, current, 1.0 - momentum)

    def scalars(self, features: Tensor) -> dict[str, Tensor]:
        """``target_std``: see :func:`feature_deviation`; 0 if every image has the same target."""
        return {"target_std": feature_deviation(features) if self._deviation is None else self._deviation}

    def warning(self, scalars: Mapping[str, float]) -> str | None:
        """Warn of a collapse: the encoder gives every image the same features, so nothing is left to learn."""
        deviation = scalars.get("target_std", 1.0)
        if deviation >= COLLAPSED:
            return None
        return (
            f"the ema target has collapsed: its features have a standard deviation of {deviation:.3f} over images (1 "
            "for unrelated features). The encoder learns nothing from here on; start again with a lower --blr, a "
            "higher --ema-momentum, or --mim-target hog"
        )


def over_tokens(features: Tensor, valid: Tensor | None = None) -> Tensor:
    """Features [B, N, D] in float32, each channel with zero mean and unit variance over the tokens of an image.

    Only tokens that are ``valid`` ([B, N] bool; None: all) count; the others become zero.
    """
    features = features.float()
    whole = F.layer_norm(features.transpose(1, 2), features.shape[1:2], eps=WHITEN_EPS).transpose(1, 2)
    if valid is None:
        return whole
    weight = valid.unsqueeze(2) / valid.sum(dim=1).clamp(min=1).view(-1, 1, 1)  # B, N, 1
    centered = features - (weight * features).sum(dim=1, keepdim=True)
    variance = (weight * centered.square()).sum(dim=1, keepdim=True)
    own = centered * torch.rsqrt(variance + WHITEN_EPS) * valid.unsqueeze(2)
    return torch.where(valid.all(dim=1).view(-1, 1, 1), whole, own)


def feature_deviation(features: Tensor) -> Tensor:
    """Standard deviation over images of the features [B, N, C] of each token position, a scalar.

    The mean is taken over images, so that tokens which encode only their position count as collapsed. The tokens of a
    single image are compared with each other.
    """
    features = features.float()
    mean = features.mean(dim=0 if len(features) > 1 else 1, keepdim=True)
    return (features - mean).square().mean().sqrt()
