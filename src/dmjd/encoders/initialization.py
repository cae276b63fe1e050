"""Start an encoder from trained weights: adapt them, load all of them or say what is missing, and report."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmjd.encoders.adaptation import (
    POSITIONS,
    PREFIX_TOKENS,
    Tensors,
    fit_first_layer,
    fit_layer_scale,
    fit_positions,
    fit_prefix,
)
from dmjd.encoders.base import Encoder
from dmjd.encoders.registry import create_encoder as create_fresh_encoder
from dmjd.encoders.source_settings import as_flags
from dmjd.encoders.sources import Weights, read_weights, traits
from dmjd.encoders.timm_features import feature_backbone
from dmjd.encoders.timm_weights import SHOWN

# Beginnings of the names of tensors that an encoder has no use for.
_HEADS = ("head.", "head_dist.", "fc_norm.", "attn_pool.", "pre_logits.", "mask_token")

# Biases that some versions of a model lack because they are zero.
_BIASES = (".q_bias", ".v_bias", ".qkv.bias")


@dataclass(frozen=True)
class Initialization:
    """What :func:`initialize` did.

    Attributes:
        source: where the weights came from.
        hash: that of :class:`~dmjd.encoders.sources.Weights`.
        loaded: number of tensors that were loaded.
        wanted: number of the encoder's tensors.
        changes: what was adapted, in words.
        fresh: names of the tensors that keep their random weights, as requested.
    """

    source: str
    hash: str
    loaded: int
    wanted: int
    changes: tuple[str, ...]
    fresh: tuple[str, ...]

    def __str__(self) -> str:
        fresh = [f"fresh: {_listed(self.fresh)}"] if self.fresh else []
        parts = [f"{self.loaded} of {self.wanted} encoder tensors from {self.source}", *self.changes, *fresh]
        return ", ".join(parts)


def create_encoder(
    name: str,
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    class_token: bool = False,
    drop_path: float = 0.0,
    *,
    init: str | Path | None = None,
    init_fresh: Sequence[str] = (),
    features_only: bool = False,
    out_indices: int | tuple[int, ...] | None = None,
    **overrides: Any,
) -> Any:
    """Create an encoder with random weights (from torch's global random state), or with those of ``init``.

    Args:
        name: ``vit_{tiny,small,base,large,huge,giant}_patch{P}``, ``conv_vit_{tiny,small,base,large}_patch{4,8,16}``,
            or that of another family; see :func:`dmjd.encoders.registry.encoder_names`.
        img_size: pixels, one side or (height, width), divisible by the patch.
        in_chans: channels.
        class_token: one prefix token, if the family supports one.
        drop_path: stochastic depth of the last block.
        init: weights to start from, anything that :func:`~dmjd.encoders.sources.read_weights` takes; they are adapted
            as in :func:`initialize`. ``preprocess`` gets the source's mean and standard deviation, if it has them for
            as many channels.
        init_fresh: beginnings of the names of tensors that ``init`` need not have.
        features_only: return timm's feature backbone instead, a module: images -> list of maps [B, D, h, w], with
            ``feature_info``.
        out_indices: which maps (default: the last four, all three of ConvViT).
        overrides: other arguments of the family's class, such as ``embed_dim``. Lists count as tuples, so that the
            ``options`` of an encoder file can be passed.

    Returns:
        :class:`~dmjd.encoders.base.Encoder` (or timm's ``FeatureGetterNet``).

    Raises:
        ValueError: unknown name (the nearest is suggested), unknown override, sizes that do not fit, or weights that
            are not available or do not fit.
    """
    encoder = create_fresh_encoder(name, img_size, in_chans, class_token, drop_path, **overrides)
    if init is not None:
        initialize(encoder, read_weights(init), fresh=init_fresh)
    return feature_backbone(encoder, out_indices) if features_only else encoder


@torch.no_grad()
def initialize(encoder: Encoder, weights: Weights, fresh: Collection[str] = ()) -> Initialization:
    """Load weights into an encoder, adapted to its grid, patch size, channels and prefix tokens.

    ``encoder.preprocess`` becomes the source's with the encoder's size, if both have the same number of channels.

    Args:
        encoder: changed in place.
        weights: of :func:`~dmjd.encoders.sources.read_weights`.
        fresh: beginnings of the names of tensors that the source need not have.

    Raises:
        ValueError: if a tensor of the encoder would stay fresh without being in ``fresh``, if the source has layers
            that the encoder lacks, or if a shape differs that cannot be adapted. The encoder is unchanged then.
    """
    wanted = encoder.state_dict()
    asked = tuple(fresh)
    _check_traits(encoder, weights)
    tensors, changes = _adapted(encoder, weights, wanted)
    if asked:
        tensors = {key: value for key, value in tensors.items() if not key.startswith(asked)}
    _check_fit(encoder, weights, tensors, wanted, asked)
    loaded = {key: tensors[key] for key in wanted if key in tensors}
    encoder.load_state_dict(loaded, strict=False)
    if (known := weights.preprocess) is not None and known.in_chans == encoder.in_chans:
        encoder.preprocess = dataclasses.replace(known, img_size=encoder.img_size)
    missing = tuple(key for key in wanted if key not in tensors)
    return Initialization(weights.source, weights.hash, len(loaded), len(wanted), tuple(changes), missing)


def _adapted(encoder: Encoder, weights: Weights, wanted: Mapping[str, Tensor]) -> tuple[Tensors, list[str]]:
    """The tensors of the source for the encoder, and what was changed."""
    tensors, changes = dict(weights.tensors), []
    for kind in ("weight", "bias"):  # models that pool over patches have their norm behind the pooling
        if f"norm.{kind}" not in tensors and f"fc_norm.{kind}" in tensors:
            tensors[f"norm.{kind}"] = tensors.pop(f"fc_norm.{kind}")
    scaled, used, done = fit_layer_scale(tensors, wanted)
    tensors = {key: value for key, value in (tensors | scaled).items() if key not in used}
    changes += done
    prefix, dropped = fit_prefix(tensors, wanted)
    tensors = {key: value for key, value in tensors.items() if key not in PREFIX_TOKENS} | prefix
    if POSITIONS in tensors and POSITIONS in wanted and weights.grid is not None:
        try:
            moved, done = fit_positions(tensors, wanted, weights.grid, encoder.grid)
        except ValueError as error:
            raise ValueError(f"--init {weights.source}: {error}") from None
        tensors, changes = tensors | moved, changes + done
    first, done = fit_first_layer(tensors, wanted, encoder.patch_size)
    tensors, changes = tensors | first, changes + done + dropped
    return {key: value for key, value in tensors.items() if not _is_unused(key, value, wanted)}, changes


def _is_unused(key: str, value: Tensor, wanted: Mapping[str, Tensor]) -> bool:
    """Whether a tensor of the source that the encoder lacks changes nothing: a head, or a bias that is zero."""
    return key not in wanted and (key.startswith(_HEADS) or (key.endswith(_BIASES) and not value.any()))


def _check_traits(encoder: Encoder, weights: Weights) -> None:
    """Check what tensors do not tell: the same ones mean something else with other heads or activations."""
    heads, activation = traits(encoder)
    for word, theirs, ours in (
        ("attention heads", weights.num_heads, heads),
        ("the activation", weights.activation, activation),
    ):
        if theirs is not None and ours is not None and theirs != ours:
            had, has = (f"{one} {word}" if word[0] != "t" else f"{word} {one}" for one in (theirs, ours))
            raise ValueError(f"--init {weights.source} has {had}, {encoder.name} has {has}{_cure(weights)}")


def _check_fit(
    encoder: Encoder, weights: Weights, tensors: Tensors, wanted: Mapping[str, Tensor], asked: tuple[str, ...]
) -> None:
    missing = [key for key in wanted if key not in tensors and not (asked and key.startswith(asked))]
    unknown = [key for key in tensors if key not in wanted]
    wrong = [key for key in wanted if key in tensors and tensors[key].shape != wanted[key].shape]
    problems = []
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        had, has = (list(some[wrong[0]].shape) for some in (tensors, wanted))
        problems.append(f"{wrong[0]} is {had}, wanted is {has}{more}")
    if missing:
        problems.append(f"{len(missing)} of {len(wanted)} tensors would stay fresh: {_listed(missing)}")
    if unknown:
        problems.append(f"it has {len(unknown)} tensors that the encoder lacks: {_listed(unknown)}")
    if not problems:
        return
    cure = _cure(weights)
    if len(missing) <= SHOWN and not wrong and not unknown:
        cure = f"; to start with fresh ones: --init-fresh {' '.join(missing)}"
    raise ValueError(f"--init {weights.source} does not fit {encoder.name}: {'; '.join(problems)}{cure}")


def _cure(weights: Weights) -> str:
    """How to create the encoder that the weights have; empty if that is unknown."""
    if weights.settings is not None:
        return f". The weights are those of {as_flags(weights.settings)}"
    blocks = {key.split(".")[1] for key in weights.tensors if key.startswith("blocks.")}
    width = weights.tensors["norm.weight"].shape[0] if "norm.weight" in weights.tensors else None
    if not blocks or width is None:
        return ""
    heads = "" if weights.num_heads is None else f" and {weights.num_heads} heads"
    return f". The weights have {len(blocks)} blocks of width {width}{heads}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"
