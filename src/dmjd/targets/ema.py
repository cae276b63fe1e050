"""Targets from a slowly moving copy of the encoder itself (data2vec, Baevski et al. 2022)."""

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dmjd.encoders.base import Encoder
from dmjd.targets.base import Target, whitened_mean

MOMENTUM = 0.996

COLLAPSED = 0.02  # of ``target_std``; healthy encoders, random ones too, lie many times above it


class EmaTarget(Target):
    """Features of an exponential moving average of the encoder, on the unmasked image.

    The last blocks' outputs are whitened, averaged and whitened again. After every step the copy moves towards the
    encoder by 1 - momentum, and momentum rises to 1 over the run by half a cosine (BYOL, Grill et al. 2020).

    Args:
        encoder: what it copies, weights and all. layers: last transformer blocks that are averaged; None = half.
        momentum: at the start of the run, 0 to 1.

    Raises:
        ValueError: for more layers than the encoder has blocks, or a momentum that cannot be.
    """

    name = "ema"
    autocast = True

    def __init__(self, encoder: Encoder, *, layers: int | None = None, momentum: float = MOMENTUM) -> None:
        super().__init__()
        self.layers = max(1, encoder.depth // 2) if layers is None else layers
        if not 1 <= self.layers <= encoder.depth:
            raise ValueError(f"ema_layers must be 1 to {encoder.depth}, the encoder's blocks, got {layers}")
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"ema_momentum must lie in [0, 1], got {momentum}")
        self.momentum, self.dim = momentum, encoder.embed_dim
        self.copy = copy.deepcopy(encoder).requires_grad_(False).eval()
        self.copy.set_grad_checkpointing(False)

    def train(self, mode: bool = True) -> "EmaTarget":
        """The copy stays in evaluation mode: its answers must not depend on stochastic depth."""
        super().train(mode)
        self.copy.eval()
        return self

    @torch.no_grad()
    def forward(self, normalized: Tensor, raw: Tensor) -> Tensor:
        """[B, c, H, W] normalized -> [B, N, D]."""
        return whitened_mean(self.copy.block_outputs(normalized, self.layers))

    def momentum_at(self, progress: float) -> float:
        """Momentum at ``progress`` of the run: from the first one up to 1 by half a cosine."""
        return 1.0 - (1.0 - self.momentum) * 0.5 * (1.0 + math.cos(math.pi * progress))

    @torch.no_grad()
    def after_step(self, encoder: nn.Module, step: int, progress: float) -> None:
        """Move the copy towards the encoder."""
        mine, theirs = ([p.detach() for p in module.parameters()] for module in (self.copy, encoder))
        torch._foreach_lerp_(mine, theirs, 1.0 - self.momentum_at(progress))

    def scalars(self, features: Tensor) -> dict[str, Tensor]:
        """``target_std``: see :func:`feature_deviation`; 0 means that every image has the same target."""
        return {"target_std": feature_deviation(features)}

    def warning(self, scalars: Mapping[str, float]) -> str | None:
        """Collapse: the encoder has learned to give every image the same features, so there is nothing to learn."""
        deviation = scalars.get("target_std", 1.0)
        if deviation >= COLLAPSED:
            return None
        return (
            f"the ema target has collapsed: its features differ by {deviation:.3f} from image to image (1 would be "
            "unrelated features). The encoder learns nothing from here on; start again with a lower --blr, a higher "
            "--ema-momentum, or --mim-target hog"
        )


def feature_deviation(features: Tensor) -> Tensor:
    """How much the features [B, N, C] of a place differ from image to image: root mean square deviation, a scalar.

    The mean is taken over images, so that tokens which tell their place and nothing of the image count as
    collapsed. A single image has no others to differ from: its tokens are compared with each other.
    """
    features = features.float()
    mean = features.mean(dim=0 if len(features) > 1 else 1, keepdim=True)
    return (features - mean).square().mean().sqrt()
