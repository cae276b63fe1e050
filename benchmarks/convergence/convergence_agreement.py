"""Losses on the pooled features of the views, beside those of the tokens, for the set ``agreement``.

Shapes: B image, K view, R = K * B rows (view-major), V visible token, D width, P width of the projection.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmjd.config.pretrain import PretrainConfig
from dmjd.masking import Masks
from dmjd.model import MaskedImageModel
from dmjd.runs.build import build_distillation, build_encoder, build_masks, build_reconstruction

_PROJECTION, _TEMPERATURE = 128, 0.2


@dataclass(frozen=True)
class Agreement:
    """Settings.

    Attributes:
        kind: "contrast": the views of an image are to be told from those of other images (InfoNCE, SimCLR); "spread":
            features of all views are to be spread over the sphere (the uniformity of U-MAE, Zhang et al. 2022).
        weight: of the loss. color: each view is brightened and tinted by up to this much.
    """

    kind: str
    weight: float
    color: float = 0.0


class AgreeingModel(MaskedImageModel):
    """The model of a configuration with such a loss."""

    def __init__(self, config: PretrainConfig, settings: Agreement) -> None:
        torch.manual_seed(config.seed)
        encoder = build_encoder(config)
        branches = {"mim": build_reconstruction(config), "vis": build_distillation(config)}
        super().__init__(encoder, masks=build_masks(config), **branches)
        self.settings, width = settings, encoder.embed_dim
        self.projection: nn.Module = nn.Linear(width, _PROJECTION)
        if settings.kind == "contrast":
            hidden = 2 * _PROJECTION
            first, last = nn.Linear(width, hidden), nn.Linear(hidden, _PROJECTION)
            self.projection = nn.Sequential(first, nn.LayerNorm(hidden), nn.GELU(), last)

    def encode(self, normalized: Tensor, visible: Tensor) -> Tensor:
        """As the model does, of views of other colors if that is set."""
        if not (self.settings.color and self.training):
            return super().encode(normalized, visible)
        shape = (len(normalized), normalized.shape[1], 1, 1)
        views = []
        for own in visible:  # V of each image
            scale, shift = (torch.empty(shape, device=normalized.device).uniform_(-1, 1) for _ in range(2))
            color = self.settings.color
            views.append(super().encode(normalized * (1 + color * scale) + 2 * color * shift, own.unsqueeze(0)))
        return torch.cat(views)

    def losses(
        self, latent: Tensor, targets: dict[str, Tensor], masks: Masks, valid: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Those of the branches and "agreement"."""
        out = super().losses(latent, targets, masks, valid)
        pooled = latent[:, self.encoder.num_prefix_tokens :].mean(dim=1)  # R, D
        unit = F.normalize(self.projection(pooled).float(), dim=1)  # R, P
        loss = (
            contrast(unit, masks.visible.shape[0])
            if self.settings.kind == "contrast"
            else (unit @ unit.T).pow(2).mean()
        )
        return out | {"agreement": loss, "loss": out["loss"] + self.settings.weight * loss}


def contrast(unit: Tensor, num_views: int) -> Tensor:
    """InfoNCE of K views of each image, [R, P] of length 1: each pair of views against all other images."""
    R = len(unit)
    similarity = unit @ unit.T / _TEMPERATURE
    image = torch.arange(R, device=unit.device) % (R // num_views)
    same = image.unsqueeze(1) == image
    others = similarity.masked_fill(same, -torch.inf).logsumexp(dim=1, keepdim=True)
    pairs = same & ~torch.eye(R, dtype=torch.bool, device=unit.device)
    return (torch.logaddexp(similarity, others) - similarity)[pairs].mean()
