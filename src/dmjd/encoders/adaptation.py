"""Weights fitted to an encoder of another grid, patch size, number of channels or other prefix tokens.

Functions on tensors by timm's names. Each returns the tensors that change and says in words what it did.
"""

import math
import re
from collections.abc import Mapping

import torch
from timm.layers import resample_patch_embed
from torch import Tensor

from dmjd.nn.tokens import resize_positions, sincos_positions

Tensors = dict[str, Tensor]

POSITIONS = "pos_embed"

PREFIX_TOKENS = {"cls_token": "class token", "reg_token": "registers"}  # in the order of the sequence

FIRST_LAYERS = ("patch_embed.proj.weight", "patch_embed1.proj.weight")

# Layer scale, by timm's two names -> the layer whose output it scales.
_SCALED = {"ls1.gamma": "attn.proj", "gamma_1": "attn.proj", "ls2.gamma": "mlp.fc2", "gamma_2": "mlp.fc2"}

_SCALE = re.compile(rf"(blocks\.\d+\.)({'|'.join(map(re.escape, _SCALED))})")

_ALMOST = 1e-5  # largest difference of a stored table of sines and cosines


def fit_prefix(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[Tensors, list[str]]:
    """Class token and registers: those that the encoder does not have are dropped, of several the first are kept."""
    fitted, changes = {}, []
    for key, word in PREFIX_TOKENS.items():
        if key not in tensors:
            continue
        if key not in wanted:
            changes.append(f"{word} dropped")
            continue
        count, had = wanted[key].shape[1], tensors[key].shape[1]
        fitted[key] = tensors[key][:, :count]
        if count < had:
            changes.append(f"{word} {had} -> {count}")
    return fitted, changes


def fit_positions(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], grid: tuple[int, int], new_grid: tuple[int, int]
) -> tuple[Tensors, list[str]]:
    """The position table on another token grid, for other prefix tokens.

    A table of sines and cosines is computed for the grid; others are resized (2-D bicubic). Positions of prefix tokens
    are kept; where the encoder's table has none for them, they are added to the tokens, which computes the same.

    Args:
        tensors: with ``pos_embed`` [1, prefix + h*w, D].
        wanted: those of the encoder.
        grid: (h, w) of the table.
        new_grid: (h, w) of the encoder.

    Raises:
        ValueError: if the table is smaller than its grid.
    """
    table, width = tensors[POSITIONS].float(), tensors[POSITIONS].shape[-1]
    prefix = table.shape[1] - math.prod(grid)
    new_prefix = wanted[POSITIONS].shape[1] - math.prod(new_grid)
    if prefix < 0 or table.dim() != 3:
        raise ValueError(f"{POSITIONS} is {list(table.shape)}, too small for {grid[0]} x {grid[1]} tokens")
    fitted, changes = {}, []
    patches = table[:, prefix:]
    if grid != new_grid:
        fixed = width % 4 == 0 and torch.allclose(patches, sincos_positions(width, grid), atol=_ALMOST)
        patches = sincos_positions(width, new_grid) if fixed else resize_positions(patches, grid, new_grid)
        sizes = f"{grid[0]} x {grid[1]} -> {new_grid[0]} x {new_grid[1]}"
        changes.append(f"positions {'computed' if fixed else 'resized'} {sizes}")
    surplus = table[:, new_prefix:prefix]
    for key in PREFIX_TOKENS:
        if surplus.shape[1] and key in tensors and key in wanted:
            count = min(surplus.shape[1], tensors[key].shape[1])
            fitted[key] = tensors[key].clone()
            fitted[key][:, :count] += surplus[:, :count]
            surplus = surplus[:, count:]
    kept = table[:, : min(prefix, new_prefix)]
    blank = table.new_zeros(1, max(0, new_prefix - prefix), width)
    fitted[POSITIONS] = torch.cat([kept, blank, patches], dim=1)
    return fitted, changes


def fit_first_layer(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], patch_size: int
) -> tuple[Tensors, list[str]]:
    """The first convolution for other channels (:func:`adapt_channels`) and another patch size (FlexiViT's rule).

    Args:
        tensors, wanted: those of the source and of the encoder.
        patch_size: of the encoder, in pixels; its first kernel may be smaller.
    """
    fitted, changes = {}, []
    for key in FIRST_LAYERS:
        if key not in tensors or key not in wanted or tensors[key].dim() != 4 or wanted[key].dim() != 4:
            continue
        kernel, shape = tensors[key].float(), wanted[key].shape
        channels, side = kernel.shape[1], kernel.shape[2]
        if channels != shape[1]:
            kernel = adapt_channels(kernel, shape[1])
            changes.append(f"first layer adapted {channels} -> {shape[1]} channels")
        if kernel.shape[2:] != shape[2:]:
            kernel = resample_patch_embed(kernel, list(shape[2:]))
            changes.append(f"patches resampled {patch_size * side // shape[2]} -> {patch_size} pixels")
        fitted[key] = kernel
    return fitted, changes


def adapt_channels(kernel: Tensor, in_chans: int) -> Tensor:
    """A first convolution [D, C, P, P] for ``in_chans`` channels, by timm's rule (``adapt_input_conv``).

    One channel gets the sum over C, so that a gray image gives what its copies in C channels gave. Otherwise channels
    are repeated in order, scaled by C / ``in_chans``, so that outputs keep their size.
    """
    C = kernel.shape[1]
    if in_chans == 1:
        return kernel.sum(dim=1, keepdim=True)
    return kernel.repeat(1, math.ceil(in_chans / C), 1, 1)[:, :in_chans] * (C / in_chans)


def fit_layer_scale(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[Tensors, set[str], list[str]]:
    """Layer scale moved into the layer that it scales, or set to 1, where only one side has it: both compute the same.

    Returns:
        Changed tensors, names of the tensors that were used up, and what was done.
    """
    fitted: Tensors = {}
    used, changes = set(), []
    for key in tensors:
        if (match := _SCALE.fullmatch(key)) is None or key in wanted:
            continue
        for kind in ("weight", "bias"):
            layer = f"{match[1]}{_SCALED[match[2]]}.{kind}"
            if layer in tensors:
                gamma = tensors[key].view(-1, *[1] * (tensors[layer].dim() - 1))
                fitted[layer] = tensors[layer] * gamma
        used.add(key)
    if used:
        changes.append("layer scale moved into the weights")
    ones = {
        key: torch.ones_like(value) for key, value in wanted.items() if _SCALE.fullmatch(key) and key not in tensors
    }
    if ones:
        changes.append("layer scale set to 1")
    return fitted | ones, used, changes
