"""The models of variants, where the library's own is not enough."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from convergence_agreement import AgreeingModel
from convergence_ema import InstanceMeanTarget
from convergence_masks import ShuffledVisible, Windows
from convergence_variant import Variant
from torch import Tensor

from dmjd.branches import Branch, Distillation, DistillationBranch
from dmjd.config.pretrain import PretrainConfig
from dmjd.encoders.base import Encoder
from dmjd.masking import Masks
from dmjd.model import MaskedImageModel
from dmjd.runs.build import build_distillation, build_encoder, build_masks, build_model, build_reconstruction
from dmjd.runs.start import begin_from
from dmjd.targets.ema import EmaSettings
from dmjd.targets.hog import HogTarget


class MisalignedBranch(DistillationBranch):
    """Compares the shuffled visible tokens with targets in raster order, as published.

    So the prediction of a visible token is compared with the target of another one.
    """

    def token_ids(self, masks: Masks) -> Tensor:
        """[K, B, V] ids of the visible tokens, sorted."""
        return masks.visible.sort(dim=-1).values


@dataclass(frozen=True)
class Misaligned(Distillation):
    """Settings of :class:`MisalignedBranch`."""

    def build(self, encoder: Encoder, out_dim: int) -> Branch:
        """The branch for an encoder, with fresh weights."""
        return MisalignedBranch(encoder, out_dim, self)


def weight_colors(model: MaskedImageModel, weight: float) -> MaskedImageModel:
    """The model, with the colors of its HOG targets times ``weight``."""
    for target in model.modules():
        if isinstance(target, HogTarget) and weight != 1.0:
            target._colors = functools.partial(_weighted, target._colors, weight)  # type: ignore[method-assign]
    return model


def _weighted(colors: Callable[[Tensor], Tensor], weight: float, means: Tensor) -> Tensor:
    return weight * colors(means)


def make_model(variant: Variant, config: PretrainConfig) -> MaskedImageModel:
    """The untrained model of a variant; both orders start from the same weights."""
    if variant.agreement is not None:
        return AgreeingModel(config, variant.agreement)
    if variant.instance_mean:
        return _of_instances(config)
    if not variant.misaligned:
        model = weight_colors(build_model(*begin_from(config)), variant.color_weight)
        model.masks = Windows(model.masks) if variant.windows else model.masks
        return model
    torch.manual_seed(config.seed)
    encoder, distillation = build_encoder(config), build_distillation(config)
    assert distillation is not None
    return MaskedImageModel(
        encoder,
        masks=ShuffledVisible(build_masks(config)),
        mim=build_reconstruction(config),
        vis=Misaligned(**{f.name: getattr(distillation, f.name) for f in dataclasses.fields(distillation)}),
    )


def _of_instances(config: PretrainConfig) -> MaskedImageModel:
    """The model of a configuration, with :class:`InstanceMeanTarget` as its target ``ema``."""
    torch.manual_seed(config.seed)
    encoder = build_encoder(config)
    target = InstanceMeanTarget(encoder, EmaSettings(config.ema_layers, config.ema_momentum, joined=False))
    mim, vis = build_reconstruction(config), build_distillation(config)
    if mim is not None and isinstance(mim.target, EmaSettings):
        mim = dataclasses.replace(mim, target=target)
    if vis is not None and isinstance(vis.target, EmaSettings):
        vis = dataclasses.replace(vis, target=target)
    return MaskedImageModel(encoder, masks=build_masks(config), mim=mim, vis=vis)
