"""Encoders by name: ``create_encoder``."""

import difflib
import inspect
import re
from collections.abc import Callable
from typing import Any

from timm.models._features import FeatureGetterNet

from dmjd.encoders.base import Encoder
from dmjd.encoders.conv_vit import CONV_VIT_SIZES, ConvViT
from dmjd.encoders.vit import VIT_SIZES, VisionTransformer

_CONV_PATCHES = (4, 8, 16)


def _vit(size: str, **options: Any) -> Encoder:
    dim, depth, heads = VIT_SIZES[size]
    return VisionTransformer(**{"embed_dim": dim, "depth": depth, "num_heads": heads} | options)


def _conv_vit(size: str, patch_size: int, class_token: bool = False, **options: Any) -> Encoder:
    if class_token:
        raise ValueError("ConvViT has no class token; use a vit_* encoder or leave class_token out")
    if patch_size not in _CONV_PATCHES:
        raise ValueError(f"conv_vit encoders come with patch 4, 8 or 16, got {patch_size}")
    dims, depths, heads = CONV_VIT_SIZES[size]
    sizes: dict[str, Any] = {"embed_dims": dims, "depths": depths, "num_heads": heads}
    return ConvViT(patch_size=patch_size, **sizes | options)


# family: (class, factory by size); both families have the same four sizes
ENCODERS: dict[str, tuple[type[Encoder], Callable[..., Encoder]]] = {
    "vit": (VisionTransformer, _vit),
    "conv_vit": (ConvViT, _conv_vit),
}


def encoder_names() -> list[str]:
    """Common names; any other patch side works for ViT too (``vit_small_patch14``)."""
    vit = [f"vit_{size}_patch{p}" for size in VIT_SIZES for p in (2, 4, 8, 14, 16, 32)]
    return vit + [f"conv_vit_{size}_patch{p}" for size in CONV_VIT_SIZES for p in _CONV_PATCHES]


def create_encoder(
    name: str,
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    class_token: bool = False,
    drop_path: float = 0.0,
    *,
    features_only: bool = False,
    out_indices: int | tuple[int, ...] | None = None,
    **overrides: Any,
) -> Any:
    """Make an encoder with fresh weights (from torch's own random state).

    Args:
        name: ``vit_{tiny,small,base,large}_patch{P}`` or ``conv_vit_{tiny,small,base,large}_patch{4,8,16}``.
        img_size: pixels, one side or (height, width); the patch must divide both.
        in_chans: channels. class_token: one prefix token (ViT only). drop_path: stochastic depth of the last block.
        features_only: give timm's feature backbone instead, a module: images -> list of maps [B, D, h, w], with
            ``feature_info``. out_indices: which maps (default: all of ConvViT's three, ViT's last four).
        overrides: any argument of :class:`VisionTransformer` (``embed_dim``, ``depth``, ``num_heads``, ``mlp_ratio``)
            or :class:`ConvViT` (``embed_dims``, ``depths``, ``num_heads``, ``mlp_ratios``).

    Returns:
        :class:`Encoder` (or timm's ``FeatureGetterNet``).

    Raises:
        ValueError: unknown name (the nearest is suggested), unknown override, or sizes that do not fit.
    """
    match = re.fullmatch(r"(vit|conv_vit)_([a-z]+)_patch(\d+)", name)
    if match is None or match[2] not in VIT_SIZES or int(match[3]) == 0:
        near = difflib.get_close_matches(name, encoder_names(), n=1, cutoff=0.0)
        raise ValueError(f"unknown encoder '{name}'; did you mean '{near[0]}'?")
    cls, factory = ENCODERS[match[1]]
    known = set(inspect.signature(cls).parameters) - {"patch_size"}  # the name says it
    if unknown := set(overrides) - known:
        raise ValueError(f"{name} does not take {', '.join(sorted(unknown))}; it takes {', '.join(sorted(known))}")
    size = (img_size, img_size) if isinstance(img_size, int) else (int(img_size[0]), int(img_size[1]))
    options = {"in_chans": in_chans, "class_token": class_token, "drop_path": drop_path} | overrides
    encoder = factory(match[2], patch_size=int(match[3]), img_size=size, **options)
    encoder.name = name
    encoder.options = {"img_size": list(size)} | {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
    return _features_only(encoder, out_indices) if features_only else encoder


def _features_only(encoder: Encoder, out_indices: int | tuple[int, ...] | None) -> FeatureGetterNet:
    indices = out_indices if out_indices is not None else min(4, len(encoder.feature_info))
    return FeatureGetterNet(encoder, out_indices=indices)
