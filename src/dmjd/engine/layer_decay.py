"""Parameter groups with layer-wise learning rate decay (Clark et al. 2020; BEiT and MAE use it for fine-tuning)."""

from typing import cast

from torch import nn

from dmjd.encoders.base import Encoder
from dmjd.engine.optim import ParameterGroup


def layer_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[ParameterGroup]:
    """Parameter groups for a downstream task, by :func:`encoder_groups`.

    Position embeddings become trainable; the encoder's final norm, which no downstream task uses, is frozen. A frozen
    encoder stays frozen.

    Args:
        model: the model whose trainable parameters are grouped; ``model.encoder`` is the encoder.
        weight_decay: weight decay of matrices and convolutions.
        layer_decay: factor per layer, 1 = none.
    """
    encoder = cast(Encoder, model.encoder)
    frozen = not any(p.requires_grad for p in encoder.parameters())
    if encoder.pos_embed is not None:
        encoder.pos_embed.requires_grad_(not frozen)
    encoder.norm.requires_grad_(False)
    return encoder_groups(model, encoder, weight_decay, layer_decay)


def encoder_groups(
    model: nn.Module, encoder: Encoder, weight_decay: float, layer_decay: float, frozen_until: float = 0.0
) -> list[ParameterGroup]:
    """Parameter groups of a model around an encoder, with "lr_scale" = layer_decay ^ (number of layers above).

    Layers are numbered by :meth:`~dmjd.encoders.base.Encoder.layer_of`; parameters outside the encoder, and its final
    norm, are the last layer. 1-D parameters and position embeddings have no weight decay.

    Args:
        model: the model whose trainable parameters are grouped.
        encoder: a submodule of it.
        weight_decay: weight decay of matrices and convolutions.
        layer_decay: factor per layer, 1 = none.
        frozen_until: progress of the run until which the encoder is not trained.
    """
    last = encoder.depth + 1
    names = {id(p): name for name, p in encoder.named_parameters()}
    undecayed = encoder.no_weight_decay()
    groups: dict[tuple[int, bool, bool], ParameterGroup] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        name = names.get(id(parameter))
        layer = last if name is None or name.startswith("norm.") else encoder.layer_of(name)
        decayed = parameter.ndim > 1 and name not in undecayed
        options = {"weight_decay": weight_decay if decayed else 0.0, "lr_scale": layer_decay ** (last - layer)}
        if name is not None and frozen_until:
            options["frozen_until"] = frozen_until
        groups.setdefault((layer, name is None, decayed), {"params": [], **options})["params"].append(parameter)
    return list(groups.values())
