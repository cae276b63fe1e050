"""Whole models from weights of other projects: published DMJD, ConvMAE and MAE, and timm."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dmjd.branches import Distillation, Reconstruction
from dmjd.config.checks import check_path
from dmjd.encoders.base import Encoder, TimmModel
from dmjd.encoders.classifier import Classifier
from dmjd.encoders.conv_vit import ConvViT
from dmjd.encoders.published import is_conv_vit, read_state, square_grid, to_our_state, to_published
from dmjd.encoders.registry import ENCODERS, create_encoder, names_of, nearest_name
from dmjd.encoders.timm_names import CLASSES
from dmjd.encoders.vit import VisionTransformer
from dmjd.masking import DisjointMasks
from dmjd.model import MaskedImageModel
from dmjd.nn.layers import TRANSFORMER_NORM_EPS
from dmjd.nn.modes import evaluating, own_defaults
from dmjd.nn.timm_blocks import is_plain

# Width -> attention heads of the published models; they cannot be inferred from the tensors.
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}


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
    """Convert a vision transformer of timm (class ``VisionTransformer`` or ``Eva``) to an encoder, in evaluation mode.

    A plain ViT becomes our :class:`VisionTransformer`, any other the encoder ``timm/NAME``. The head is left out; a
    norm after the pooling becomes the encoder's final norm.

    Raises:
        ValueError: for a model of another class, or one that ``timm.create_model`` does not build with these sizes.
    """
    if type(model).__name__ not in CLASSES:
        raise ValueError(f"{type(model).__name__} is not a plain vision transformer of timm")
    vit = cast(Any, model)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(("head.", "fc_norm.", "attn_pool."))}
    if isinstance(vit.norm, nn.Identity):  # timm's average-pooled models have the norm after the pooling
        state |= {f"norm.{k}": v for k, v in vit.fc_norm.state_dict().items()}
    options: dict[str, Any] = {
        "img_size": tuple(vit.patch_embed.img_size),
        "in_chans": state["patch_embed.proj.weight"].shape[1],
        "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks),
    }
    encoder = _plain_vit(vit, options, state) if _is_plain_vit(vit) else _timm_vit(vit, options)
    _load_strictly(encoder, state, set(), str)  # the names are the same
    _check_same(vit, encoder.eval())
    return encoder


def _is_plain_vit(model: Any) -> bool:
    """Whether our ViT has all parts of a model of timm."""
    block = model.blocks[0]
    table = None if model.pos_embed is None else model.pos_embed.shape[1]
    return (
        is_plain(block)
        and isinstance(block.ls1, nn.Identity)
        and block.norm1.eps == TRANSFORMER_NORM_EPS
        and isinstance(model.norm_pre, nn.Identity)
        and isinstance(model.patch_embed.norm, nn.Identity)
        and table == model.patch_embed.num_patches + model.num_prefix_tokens
        and model.num_prefix_tokens == int(model.cls_token is not None)
    )


def _plain_vit(model: Any, options: dict[str, Any], state: Mapping[str, Tensor]) -> Encoder:
    options |= {
        "num_heads": model.blocks[0].attn.num_heads,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / model.embed_dim,
        "class_token": model.num_prefix_tokens == 1,
    }
    patch = model.patch_embed.patch_size[0]
    return create_encoder(nearest_name(VisionTransformer, model.embed_dim, patch), **options)


def _timm_vit(model: Any, options: dict[str, Any]) -> Encoder:
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if name is None:
        raise ValueError(f"this {type(model).__name__} was not built by timm.create_model, which tells its name")
    attention = getattr(model.blocks[0], "attn", model.blocks[0])
    if (heads := getattr(attention, "num_heads", None)) is not None:
        options |= {"num_heads": heads}
    return create_encoder(f"timm/{name}", **options, patch_size=model.patch_embed.patch_size[0])


def _check_same(model: Any, encoder: Encoder) -> None:
    """Check that both compute the same: activation, eps and the like are in no tensor."""
    images = torch.randn(1, encoder.in_chans, *encoder.img_size, generator=torch.Generator().manual_seed(0))
    device = next(model.parameters()).device
    with evaluating(model), evaluating(encoder):
        theirs = model.forward_intermediates(images.to(device), 1, output_fmt="NLC", intermediates_only=True)[0]
        ours = encoder.block_outputs(images, 1)[0]
    tolerance = 1e-5 if theirs.dtype == torch.float32 else 3e-2
    if not torch.allclose(theirs.float().cpu(), ours, rtol=tolerance, atol=tolerance):
        raise ValueError(
            f"this model computes other values than {encoder.name}: it was built with an activation, a norm or other "
            "arguments that the encoder does not have"
        )


def timm_arguments(encoder: Encoder) -> dict[str, Any]:
    """Arguments with which the model of :func:`timm_call` loads the encoder's state dict strictly.

    For our own ViT, any plain ViT of ``timm.create_model`` does.

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
        call["pretrained_cfg_overlay"] = dict(zip(("mean", "std"), known.stored_statistics, strict=True)) | size_and_fit
    return model.name, call


def _timm_model(encoder: Encoder) -> TimmModel:
    if (model := encoder.timm_model()) is None:
        able = " and ".join(names_of(f) for f, cls in ENCODERS.items() if cls.timm_model is not Encoder.timm_model)
        raise ValueError(f"timm has no {type(encoder).__name__}; only {able} encoders can be loaded by timm")
    return model
