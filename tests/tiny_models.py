"""Tiny pre-training models and the images they run on."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmjd.branches import Distillation, Reconstruction
from dmjd.encoders.registry import create_encoder
from dmjd.masking import DisjointMasks, MaskSampler
from dmjd.model import MaskedImageModel

SIZES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch8": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "conv_vit_tiny_patch8": {"embed_dims": (8, 12, 16), "depths": (1, 1, 1), "num_heads": 2},
}
KEYS = torch.tensor([3, 14, 159])


def tiny_model(
    name: str = "vit_tiny_patch8",
    encoder: dict[str, Any] | None = None,
    *,
    masks: MaskSampler | dict[str, Any] | None = None,
    mim: dict[str, Any] | None = {},  # noqa: B006, it is only read
    vis: dict[str, Any] | None = {},  # noqa: B006, it is only read
    target: Any = "hog",
) -> MaskedImageModel:
    """A model for 32-pixel images; ``masks``, ``mim`` and ``vis`` change the default settings, None = off."""
    torch.manual_seed(0)
    decoder = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}
    return MaskedImageModel(
        create_encoder(name, **{"img_size": 32} | SIZES[name] | (encoder or {})),
        masks=masks if isinstance(masks, MaskSampler) else DisjointMasks(**masks or {}),
        mim=None if mim is None else Reconstruction(**{"target": target} | decoder | mim),
        vis=None if vis is None else Distillation(**{"target": target, "projector_dim": 32} | vis),
    )


def smooth_images(B: int = 3, channels: int = 3, size: tuple[int, int] = (32, 32)) -> tuple[Tensor, Tensor]:
    """(normalized, raw) of smooth random images."""
    generator = torch.Generator().manual_seed(B)
    coarse = torch.rand(B, channels, 5, 5, generator=generator)
    raw = (F.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1) * 255).round()
    return (raw / 255 - 0.5) / 0.25, raw


def losses_of(model: MaskedImageModel, **arguments: Any) -> dict[str, float]:
    """All scalars of one pass over :func:`smooth_images`."""
    with torch.no_grad():
        return {k: v.item() for k, v in model(*smooth_images(), **{"keys": KEYS} | arguments).items()}
