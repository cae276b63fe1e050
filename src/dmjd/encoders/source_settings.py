"""Which encoder given weights belong to: its name and sizes as settings of a run."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dmjd.encoders.base import Encoder
from dmjd.encoders.conv_vit import ConvViT
from dmjd.encoders.vit import VisionTransformer

MLP_RATIO = 4.0  # of our families by name

# model_type and width in config.json of transformers -> name in timm
_TIMM_NAMES = {
    ("dinov2", 384): "vit_small_patch14_dinov2",
    ("dinov2", 768): "vit_base_patch14_dinov2",
    ("dinov2", 1024): "vit_large_patch14_dinov2",
    ("dinov2", 1536): "vit_giant_patch14_dinov2",
    ("dinov2_with_registers", 384): "vit_small_patch14_reg4_dinov2",
    ("dinov2_with_registers", 768): "vit_base_patch14_reg4_dinov2",
    ("dinov2_with_registers", 1024): "vit_large_patch14_reg4_dinov2",
    ("dinov2_with_registers", 1536): "vit_giant_patch14_reg4_dinov2",
    ("dinov3_vit", 384): "vit_small_patch16_dinov3",
    ("dinov3_vit", 768): "vit_base_patch16_dinov3",
    ("dinov3_vit", 1024): "vit_large_patch16_dinov3",
    ("dinov3_vit", 1280): "vit_huge_plus_patch16_dinov3",
    ("dinov3_vit", 4096): "vit_7b_patch16_dinov3",
}

_GATED = {"vit_small_patch16_dinov3": "vit_small_plus_patch16_dinov3"}  # with a gated MLP, of the same width


# Names in a plain ViT, and those of heads, which no encoder has
_PLAIN = re.compile(
    r"(cls_token|pos_embed|patch_embed\.proj|norm|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])|head|fc_norm)(\.|$)"
)


def of_encoder(encoder: Encoder) -> dict[str, Any]:
    """Settings that create an encoder of ours."""
    settings: dict[str, Any] = {
        "encoder": encoder.name,
        "class_token": bool(encoder.options.get("class_token", False)),
    }
    for setting, (argument, _) in type(encoder).SETTINGS.items():
        settings[setting] = encoder.options.get(argument)
    return settings


def of_transformers(kind: str, tensors: Mapping[str, Tensor], heads: int) -> dict[str, Any] | None:
    """Settings of a model of transformers, by its ``model_type``; None if its size has no name."""
    width = len(tensors["norm.weight"])
    name = _TIMM_NAMES.get((kind, width))
    if name is None:
        return of_plain_vit(tensors, heads)
    if "blocks.0.mlp.fc1_g.weight" in tensors:
        name = _GATED.get(name, name)
    return {"encoder": f"timm/{name}"}


def of_plain_vit(tensors: Mapping[str, Tensor], heads: int | None = None) -> dict[str, Any] | None:
    """Settings of a plain ViT by the shapes of its tensors, under our names; None if it is no plain ViT.

    Args:
        tensors: the encoder's.
        heads: attention heads; None: those of the named size of the same width.
    """
    patch = tensors.get("patch_embed.proj.weight")
    fc1 = tensors.get("blocks.0.mlp.fc1.weight")
    if patch is None or fc1 is None or not all(map(_PLAIN.match, tensors)):
        return None
    width, depth = patch.shape[0], _depth(tensors, "blocks.")
    size = _size_of(VisionTransformer.SIZES, "embed_dim", width)
    if heads is None and size is None:
        return None
    named = VisionTransformer.SIZES[size or "tiny"]
    ratio = fc1.shape[0] / width
    return {
        "encoder": f"vit_{size or 'tiny'}_patch{patch.shape[-1]}",
        "class_token": "cls_token" in tensors,
        "embed_dim": width if width != named["embed_dim"] else None,
        "depth": depth if depth != named["depth"] else None,
        "num_heads": heads if heads not in (None, named["num_heads"]) else None,
        "mlp_ratio": ratio if ratio != named.get("mlp_ratio", MLP_RATIO) else None,
    }


def of_conv_vit(tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The same for a ConvViT."""
    embeddings = [tensors.get(f"patch_embed{stage}.proj.weight") for stage in (1, 2, 3)]
    stages = ("blocks1.", "blocks2.", "blocks.")
    hidden = [tensors.get(f"{stage}0.mlp.fc1.weight") for stage in stages]
    if any(part is None for part in (*embeddings, *hidden)):
        return None
    widths = tuple(part.shape[0] for part in embeddings if part is not None)
    size = _size_of(ConvViT.SIZES, "embed_dims", widths)
    if size is None:
        return None
    patch = 1
    for part in embeddings:
        assert part is not None
        patch *= part.shape[-1]
    depths = tuple(_depth(tensors, stage) for stage in stages)
    ratios = tuple(part.shape[0] / width for part, width in zip(hidden, widths, strict=True) if part is not None)
    return {
        "encoder": f"conv_vit_{size}_patch{patch}",
        "class_token": False,
        "embed_dim": None,
        "depth": depths if depths != ConvViT.SIZES[size]["depths"] else None,
        "num_heads": None,
        "mlp_ratio": ratios,
    }


def as_flags(settings: Mapping[str, Any]) -> str:
    """Settings as flags of ``dmjd pretrain``."""
    words = []
    for name, value in settings.items():
        if value is None or value is False:
            continue
        numbers = value if isinstance(value, list | tuple) else [value]
        flag = f"--{name.replace('_', '-')}"
        words.append(flag if value is True else f"{flag} {' '.join(map(str, numbers))}")
    return " ".join(words)


def _size_of(sizes: Mapping[str, Mapping[str, Any]], argument: str, width: Any) -> str | None:
    """Name of the size of this width."""
    return next((size for size, values in sizes.items() if values[argument] == width), None)


def _depth(tensors: Mapping[str, Tensor], blocks: str) -> int:
    """Number of blocks whose names begin so."""
    return len({key.removeprefix(blocks).split(".")[0] for key in tensors if key.startswith(blocks)})
