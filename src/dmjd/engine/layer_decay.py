"""Layer-wise decay of the learning rate (Clark et al. 2020, as BEiT and MAE fine-tune)."""

from typing import Any, cast

from torch import nn

from dmjd.encoders.base import Encoder


def layer_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of a model around an encoder: ``lr_scale`` = layer_decay ^ (layers after this one).

    Layer 0 are the embeddings, positions, class token and convolutional stages, layer i + 1 transformer block i, the
    last one all that is not the encoder's. No weight decay on 1-D parameters and positions. Positions are learned,
    the norm of pre-training, which no task uses, is not; an encoder that is frozen stays so.

    Args:
        model: whose trainable parameters are grouped; its attribute ``encoder`` is the encoder in it.
    """
    encoder = cast(Encoder, model.encoder)
    frozen = not any(p.requires_grad for p in encoder.parameters())
    encoder.pos_embed.requires_grad_(not frozen)
    encoder.norm.requires_grad_(False)
    last = len(encoder.blocks) + 1  # type: ignore[arg-type]
    names = {id(p): name for name, p in encoder.named_parameters()}
    plain = encoder.no_weight_decay()
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        name = names.get(id(parameter))
        layer = last if name is None else layer_of(name)
        decayed = parameter.ndim > 1 and name not in plain
        options = {"weight_decay": weight_decay if decayed else 0.0, "lr_scale": layer_decay ** (last - layer)}
        groups.setdefault((layer, decayed), {"params": [], **options})["params"].append(parameter)
    return list(groups.values())


def layer_of(name: str) -> int:
    """The layer of an encoder's parameter: 0, or 1 more than its transformer block."""
    parts = name.split(".")
    return int(parts[1]) + 1 if parts[0] == "blocks" else 0
