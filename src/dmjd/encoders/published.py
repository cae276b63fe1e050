"""Published weights of DMJD, ConvMAE and MAE: files read safely, and key tables used in both directions."""

import argparse
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmjd.files import read_safetensors

# (published prefix, ours); the first match counts.
DECODER_KEYS = (
    ("decoder_embed.", "branches.mim.decoder.embed."),
    ("decoder_pos_embed", "branches.mim.decoder.pos_embed"),
    ("decoder_blocks.", "branches.mim.decoder.blocks."),
    ("decoder_norm.", "branches.mim.decoder.norm."),
    ("decoder_pred.", "branches.mim.decoder.head."),
    ("mask_token", "branches.mim.decoder.mask_token"),
    ("proj_embed.", "branches.vis.head.projector."),
    ("predictor.0.", "branches.vis.head.predictor."),
    ("stage1_output_decode.", "fusion.convs.0."),
    ("stage2_output_decode.", "fusion.convs.1."),
    ("fc_norm.", "fc_norm."),
    ("head.", "head."),
)

# Beginnings of names in checkpoints of version 0.1 -> ours, so that they still load.
FORMER_KEYS = {"decoder.": "branches.mim.decoder.", "distillation.": "branches.vis.head."}

CONV_VIT_KEYS = (("blocks3.", "encoder.blocks."),)

ENCODER_KEYS = (("", "encoder."),)

# In the published convolutional stages the depthwise convolution is called "attn".
_DEPTHWISE = (re.compile(r"^(blocks[12]\.\d+)\.attn\."), r"\1.dwconv.")

_DEPTHWISE_BACK = (re.compile(r"^(encoder\.blocks[12]\.\d+)\.dwconv\."), r"\1.attn.")

_POINTWISE = re.compile(r"blocks[12]\.\d+\.(conv[12]|mlp\.fc[12])\.weight$")


def to_ours(key: str, conv_vit: bool) -> str:
    """Our name for a published parameter."""
    key = _DEPTHWISE[0].sub(_DEPTHWISE[1], key)
    table = DECODER_KEYS + (CONV_VIT_KEYS if conv_vit else ()) + ENCODER_KEYS
    theirs, ours = next(pair for pair in table if key.startswith(pair[0]))
    return ours + key[len(theirs) :]


def to_published(key: str, conv_vit: bool) -> str:
    """The published name of a parameter: inverse of :func:`to_ours`."""
    key = _DEPTHWISE_BACK[0].sub(_DEPTHWISE_BACK[1], key)
    table = DECODER_KEYS + (CONV_VIT_KEYS if conv_vit else ()) + ENCODER_KEYS
    theirs, ours = next(pair for pair in table if key.startswith(pair[1]))
    return theirs + key[len(ours) :]


def to_our_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published weights under our names and with our shapes: ``encoder.*``, and those of decoder or classifier."""
    conv_vit = is_conv_vit(state)
    return {
        to_ours(key, conv_vit): value.flatten(1) if conv_vit and _POINTWISE.search(key) else value
        for key, value in state.items()
    }


def is_conv_vit(state: Mapping[str, Tensor]) -> bool:
    """Whether published weights are those of a ConvViT."""
    return any(key.startswith("blocks3.") for key in state)


def square_grid(num_patches: int) -> tuple[int, int]:
    """The token grid of a published position table.

    Raises:
        ValueError: if it is not square, as published ones always are.
    """
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ValueError(f"a position table of {num_patches} patches is not square; published weights always are")
    return side, side


def _reason(error: Exception) -> str:
    """Why torch did not read a file; without its advice to execute what the file holds."""
    if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"it holds {found[1]}, which is no tensor"
    if isinstance(error, RuntimeError | OSError) and str(error):
        return str(error).splitlines()[0]
    return "it is damaged, or torch.save did not write it"


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a ``.safetensors`` file, or from a file of ``torch.save`` without running code in it.

    Args:
        path: the file. The state dict may be under ``model`` or ``state_dict``.

    Raises:
        ValueError: if the file cannot be read, or holds other things than weights.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # published checkpoints hold their arguments
            state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} could not be read as plain weights ({_reason(error)}). Nothing in a file is ever executed: "
            "re-save it as safetensors, or with torch.save of a dict of tensors"
        ) from None
    for name in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict of tensors")
    return dict(state)
