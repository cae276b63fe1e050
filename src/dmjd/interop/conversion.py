"""Whole models from weights of other projects: published DMJD, ConvMAE and MAE, and timm."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn

from dmjd.branches import Distillation, Reconstruction
from dmjd.config.checks import check_path
from dmjd.encoders.base import Encoder, TimmModel
from dmjd.encoders.classifier import Classifier
from dmjd.encoders.conv_vit import ConvViT
from dmjd.encoders.published import is_conv_vit, read_state, square_grid, to_our_state, to_published
from dmjd.encoders.registry import ENCODERS, create_encoder, nearest_name
from dmjd.encoders.vit import VisionTransformer
from dmjd.masking import DisjointMasks
from dmjd.model import MaskedImageModel
from dmjd.nn.layers import TRANSFORMER_NORM_EPS
from dmjd.nn.modes import own_defaults

# Width -> attention heads of the published models; they cannot be inferred from the tensors.
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}


@own_defaults()
def load_official(
    source: str | Path | Mapping[str, Tensor], num_heads: int | None = None, decoder_heads: int | None = None
) -> MaskedImageModel | Classifier:
    """Load published DMJD, ConvMAE or MAE weights.

    The kind of model and its sizes are inferred from the tensors: convolutional stages mean a ConvViT, ``proj_embed``
    the distillation branch, ``head.*`` a :class:`Classifier`. The target is normalized pixels if predictions have P*P*C
    numbers, HOG otherwise.

    Args:
        source: a ``.pth`` or ``.safetensors`` file, or a state dict. In a file, the state dict may be under ``model``
            or ``state_dict``.
        num_heads: attention heads of the encoder; None = the published number for its width.
        decoder_heads: heads of the decoder; None = 16.

    Returns:
        :class:`MaskedImageModel` or :class:`Classifier`, in evaluation mode.

    Raises:
        ValueError: naming unknown or missing keys, tensors of wrong shape, or a file that cannot be read.
    """
    state = _State(source if isinstance(source, Mapping) else read_state(check_path("source", source)))
    conv_vit = is_conv_vit(state)
    needed = ["pos_embed"] + (["patch_embed1.proj.weight"] if conv_vit else ["patch_embed.proj.weight"])
    if lacking := [key for key in needed if key not in state]:
        raise ValueError(f"these are not DMJD, ConvMAE or MAE weights: {', '.join(lacking)} missing")
    encoder = (_conv_vit if conv_vit else _vit)(state, num_heads)
    model: MaskedImageModel | Classifier
    if "head.weight" in state:
        model = Classifier(encoder, state["head.weight"].shape[0])
        allowed = {"encoder.norm.weight", "encoder.norm.bias"}  # used in pre-training only; not in all classifiers
    else:
        model, allowed = _pretraining_model(state, encoder, decoder_heads), set()
    _load_strictly(model, to_our_state(state), allowed, partial(to_published, conv_vit=conv_vit))
    return model.eval()


class _State(dict[str, Tensor]):
    """A state dict in which a missing key raises a ValueError."""

    def __missing__(self, key: str) -> Tensor:
        raise ValueError(f"the weights do not fit (missing: {key})")


def _depth(keys: Iterable[str], prefix: str) -> int:
    indices = [int(key[len(prefix) :].split(".")[0]) for key in keys if key.startswith(prefix)]
    return max(indices) + 1 if indices else 0


def _heads(dim: int, num_heads: int | None, word: str) -> int:
    heads = num_heads if num_heads is not None else _HEADS.get(dim, 0)
    if heads < 1 or dim % heads:
        raise ValueError(f"{word} cannot be inferred from a width of {dim}: pass {word}=, a divisor of it")
    return heads


def _vit(state: Mapping[str, Tensor], num_heads: int | None) -> Encoder:
    dim, in_chans, patch, _ = state["patch_embed.proj.weight"].shape
    class_token = "cls_token" in state
    h, w = square_grid(state["pos_embed"].shape[1] - int(class_token))
    options: dict[str, Any] = {
        "img_size": (h * patch, w * patch),
        "in_chans": in_chans,
        "embed_dim": dim,
        "depth": _depth(state, "blocks."),
        "num_heads": _heads(dim, num_heads, "num_heads"),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / dim,
        "class_token": class_token,
    }
    return create_encoder(nearest_name(VisionTransformer, dim, patch), **options)


def _conv_vit(state: Mapping[str, Tensor], num_heads: int | None) -> Encoder:
    d1, in_chans, stride, _ = state["patch_embed1.proj.weight"].shape
    d2, d3 = state["patch_embed2.proj.weight"].shape[0], state["patch_embed3.proj.weight"].shape[0]
    h, w = square_grid(state["pos_embed"].shape[1])
    patch = 4 * stride
    options: dict[str, Any] = {
        "img_size": (h * patch, w * patch),
        "in_chans": in_chans,
        "embed_dims": (d1, d2, d3),
        "depths": (_depth(state, "blocks1."), _depth(state, "blocks2."), _depth(state, "blocks3.")),
        "num_heads": _heads(d3, num_heads, "num_heads"),
        "mlp_ratios": tuple(
            state[f"blocks{i}.0.mlp.fc1.weight"].shape[0] / dim for i, dim in ((1, d1), (2, d2), (3, d3))
        ),
    }
    return create_encoder(nearest_name(ConvViT, d3, patch), **options)


def _pretraining_model(state: Mapping[str, Tensor], encoder: Encoder, decoder_heads: int | None) -> MaskedImageModel:
    if "decoder_embed.weight" not in state:
        raise ValueError("these weights hold neither a decoder (decoder_embed.weight) nor a classifier (head.weight)")
    dim = state["decoder_embed.weight"].shape[0]
    out_dim = state["decoder_pred.weight"].shape[0]
    vis = "proj_embed.0.weight" in state
    target = "pixel" if out_dim == encoder.patch_size**2 * encoder.in_chans else "hog"
    mim = Reconstruction(
        target=target,
        decoder_dim=dim,
        decoder_depth=_depth(state, "decoder_blocks."),
        decoder_heads=decoder_heads if decoder_heads is not None else 16,
        decoder_mlp_ratio=state["decoder_blocks.0.mlp.fc1.weight"].shape[0] / dim,
    )
    if vis:
        return MaskedImageModel(encoder, DisjointMasks(2, 0.6), mim, Distillation(target=target, projector_dim=dim))
    return MaskedImageModel(encoder, DisjointMasks(1, 0.75, block_size=1), mim, vis=None)


def _load_strictly(
    model: nn.Module, state: dict[str, Tensor], allowed_missing: set[str], published: Callable[[str], str]
) -> None:
    """Load a state dict, or raise an error with the keys as in the file (``published``: our key -> its key)."""
    expected = model.state_dict()
    unknown = sorted(published(key) for key in set(state) - set(expected))
    missing = sorted(published(key) for key in set(expected) - set(state) - allowed_missing)
    wrong = [
        f"{published(key)} is {list(state[key].shape)}, expected {list(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    problems = [("unknown", unknown), ("missing", missing), ("of wrong shape", wrong)]
    if text := "; ".join(f"{word}: {', '.join(keys)}" for word, keys in problems if keys):
        raise ValueError(f"the weights do not fit ({text})")
    model.load_state_dict(state, strict=not allowed_missing)


def from_timm(model: nn.Module) -> Encoder:
    """Convert a timm ``VisionTransformer`` with learned or fixed positions to our encoder, in evaluation mode.

    Raises:
        ValueError: if the model has parts that our ViT lacks (registers, layer scale, pre-norm), is of another class
            (rotary positions, parallel blocks), or has other activations or norms.
    """
    if not isinstance(model, timm_vit.VisionTransformer) or type(model.blocks[0]) is not timm_vit.Block:
        raise ValueError(f"{type(model).__name__} is not a timm VisionTransformer with plain blocks")
    act, eps = model.blocks[0].mlp.act, model.blocks[0].norm1.eps
    if getattr(act, "approximate", "") != "none" or eps != TRANSFORMER_NORM_EPS:
        raise ValueError(
            f"this ViT has {act} and norms of eps {eps}; ours has exact GELU and eps {TRANSFORMER_NORM_EPS}"
        )
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(("head.", "fc_norm."))}
    options: dict[str, Any] = {
        "img_size": tuple(model.patch_embed.img_size),
        "in_chans": state["patch_embed.proj.weight"].shape[1],
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": model.blocks[0].attn.num_heads,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / model.embed_dim,
        "class_token": model.num_prefix_tokens == 1,
    }
    patch = model.patch_embed.patch_size[0]
    encoder = create_encoder(nearest_name(VisionTransformer, model.embed_dim, patch), **options)
    if isinstance(model.norm, nn.Identity):  # timm's average-pooled models have the norm after the pooling
        state |= {f"norm.{k}": v for k, v in model.fc_norm.state_dict().items()}
    _load_strictly(encoder, state, set(), str)  # the names are the same
    return encoder.eval()


def timm_arguments(encoder: Encoder) -> dict[str, Any]:
    """Arguments with which any ViT of ``timm.create_model`` loads the encoder's state dict strictly.

    Raises:
        ValueError: if timm has no such model.
    """
    return _timm_model(encoder).arguments


def timm_call(encoder: Encoder) -> tuple[str, dict[str, Any]]:
    """Name and arguments of ``timm.create_model`` for an encoder, without arguments that the name implies.

    ``pretrained_cfg_overlay`` tells timm's own transforms the preprocessing, if it is known.

    Raises:
        ValueError: if timm has no such model.
    """
    model = _timm_model(encoder)
    call = {key: value for key, value in model.arguments.items() if model.defaults.get(key) != value}
    if (known := encoder.preprocess) is not None:
        size_and_fit = {"input_size": (known.in_chans, *known.img_size), "crop_pct": 1.0, "interpolation": "bicubic"}
        call["pretrained_cfg_overlay"] = {"mean": known.mean, "std": known.std} | size_and_fit
    return model.name, call


def _timm_model(encoder: Encoder) -> TimmModel:
    if (model := encoder.timm_model()) is None:
        able = " and ".join(f"{name}_*" for name, cls in ENCODERS.items() if cls.timm_model is not Encoder.timm_model)
        raise ValueError(f"timm has no {type(encoder).__name__}; only {able} encoders can be loaded by timm")
    return model
