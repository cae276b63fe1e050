"""The two floors of a training step: its arithmetic and the bytes it must move; and the two rates of the card."""

from typing import Any

import torch
from torch import nn

from dmjd.encoders.conv_vit import CELLS, ConvViT
from dmjd.model import MaskedImageModel
from dmjd.nn.layers import TransformerBlock
from dmjd.pretraining.bench import matmul_rate, wait

HALF = 2  # bytes

# How often the output of a product is moved: written and read forward, read again backward; its gradient written, read.
MOVES = 5

# Per parameter and step: float32 read and a half-precision copy written and read twice, 4 + 3 * 2; gradient written, 4;
# AdamW reads parameter, gradient and two moments and writes three of them, 7 * 4.
PARAMETER_BYTES = 4 + 3 * HALF + 4 + 7 * 4


def block_outputs(dim: int, mlp_ratio: float) -> float:
    """Values per token that the products of a transformer block write: qkv 3 D, attention D, proj D, fc1 r D, fc2 D."""
    return (6 + mlp_ratio) * dim


def mlp_ratio(block: nn.Module) -> float:
    """Hidden width of a block's MLP relative to its width."""
    fc1 = block.mlp.fc1
    return fc1.out_features / fc1.in_features


def blocks_bytes(blocks: nn.ModuleList, tokens: int) -> float:
    """Bytes that the products of transformer blocks move for one row of so many tokens."""
    outputs = sum(block_outputs(b.norm1.normalized_shape[0], mlp_ratio(b)) for b in blocks)
    return MOVES * HALF * tokens * outputs


def conv_bytes(encoder: ConvViT, visible: int) -> float:
    """The same for the convolution blocks: conv1 d, depthwise d, conv2 d, fc1 r d, fc2 d per visible cell."""
    total = 0.0
    for blocks, cells in zip((encoder.blocks1, encoder.blocks2), CELLS, strict=True):
        outputs = sum((4 + mlp_ratio(block)) * block.norm1.normalized_shape[0] for block in blocks)
        total += MOVES * HALF * visible * cells**2 * outputs
    return total


def step_floors(model: MaskedImageModel, batch: int, rates: dict[str, float]) -> dict[str, Any]:
    """Least milliseconds of a step by arithmetic and by memory traffic.

    The traffic counts parameters and the outputs of all matrix products, each moved as often as separate products must;
    norms, activations, targets and losses are taken to cost nothing.

    Args:
        model: the pre-training model.
        batch: images per step.
        rates: of :func:`card_rates`.
    """
    visible, masked, _ = model.counts
    encoder = model.encoder
    row = blocks_bytes(encoder.blocks, visible + encoder.num_prefix_tokens)
    if isinstance(encoder, ConvViT):
        row += conv_bytes(encoder, visible)
    for branch in model.branches.values():
        decoder = getattr(branch, "decoder", None)
        blocks = [m for m in decoder.modules() if isinstance(m, TransformerBlock)] if decoder is not None else []
        row += blocks_bytes(nn.ModuleList(blocks), visible + masked)
    flops = 3 * model.flops() * batch
    moved = row * model.masks.num_views * batch + PARAMETER_BYTES * sum(p.numel() for p in model.parameters())
    return {
        "gflop": flops / 1e9,
        "gigabytes": moved / 1e9,
        "arithmetic_ms": 1e3 * flops / rates["matmul_bf16"],
        "memory_ms": 1e3 * moved / rates["copy"],
    }


def card_rates(device: torch.device) -> dict[str, float]:
    """FLOP/s of matrix products in bf16 and float32, and bytes/s of a copy, counting bytes read and written."""
    size = 1 << (31 if device.type == "cuda" else 24)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    seconds = min(timed(lambda: target.copy_(source), device) for _ in range(6))
    return {
        "matmul_bf16": matmul_rate(device, torch.bfloat16, repeats=10),
        "matmul_fp32": matmul_rate(device, torch.float32, repeats=3),
        "copy": 2 * size / seconds,
    }


def timed(function: Any, device: torch.device) -> float:
    """Seconds of one call, waiting for the device before and after."""
    import time

    wait(device)
    started = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - started
