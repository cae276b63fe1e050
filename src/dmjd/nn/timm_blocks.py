"""Transformer blocks of timm in our encoders: fast, with keyed stochastic depth, with activation checkpointing."""

from typing import Any

import torch
from timm.layers import GELU, Attention, Mlp
from timm.layers import DropPath as TimmDropPath
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from dmjd.nn.dropout import DropPath, active_dropouts
from dmjd.nn.layers import TransformerBlock, maybe_checkpoint


def own_block(block: Any, drop_path: float) -> nn.Module:
    """A block of timm with the parts of ours that fit it; its parameters and their names stay.

    Args:
        block: any transformer block of timm; it is changed.
        drop_path: stochastic depth rate.

    Returns:
        A :class:`TransformerBlock` if the block is of that kind (layer scale is supported). Otherwise the block
        itself, with stochastic depth drawn from image keys.
    """
    if is_plain(block):
        with torch.device("meta"):  # its weights are replaced
            own = TransformerBlock(block.norm1.normalized_shape[0], block.attn.num_heads, 1.0, drop_path)
        for name in ("norm1", "attn", "ls1", "norm2", "mlp", "ls2"):
            setattr(own, name, getattr(block, name))
        return own
    for part in list(block.modules()):
        for name, child in part.named_children():
            if isinstance(child, TimmDropPath):
                setattr(part, name, DropPath(drop_path))
    return block


def is_plain(block: Any) -> bool:
    """Whether :class:`TransformerBlock` computes what a block of timm does."""
    if type(block) is not Block or type(block.attn) is not Attention or type(block.mlp) is not Mlp:
        return False
    attn, mlp = block.attn, block.mlp
    unused = (attn.q_norm, attn.k_norm, getattr(attn, "norm", None), getattr(attn, "gate", None), mlp.norm)
    linears = (attn.qkv, attn.proj, mlp.fc1, mlp.fc2)
    dropouts = (attn.attn_drop, attn.proj_drop, mlp.drop1, mlp.drop2)
    return (
        all(part is None or isinstance(part, nn.Identity) for part in unused)
        and all(isinstance(norm, nn.LayerNorm) and norm.bias is not None for norm in (block.norm1, block.norm2))
        and all(isinstance(linear, nn.Linear) and linear.bias is not None for linear in linears)
        and all(dropout.p == 0 for dropout in dropouts)
        and isinstance(mlp.act, nn.GELU | GELU)
        and getattr(mlp.act, "approximate", "none") == "none"
    )


def run_block(block: nn.Module, x: Tensor, checkpointing: bool, **arguments: Any) -> Tensor:
    """block(x, **arguments) for a block of timm, with activation checkpointing if wanted.

    Stochastic depth is drawn before, so that the recomputation drops the same rows.
    """
    if not checkpointing:
        return block(x, **arguments)
    layers = active_dropouts(block)
    drawn = [layer.row_bits(x) for layer in layers]

    def run(x: Tensor) -> Tensor:
        for layer, bits in zip(layers, drawn, strict=True):
            layer.bits = bits
        try:
            return block(x, **arguments)
        finally:  # the recomputation stops when it has what it needs, before the last layers take theirs
            for layer in layers:
                layer.bits = None

    return maybe_checkpoint(True, run, x)
