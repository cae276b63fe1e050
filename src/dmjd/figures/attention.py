"""Attention of an encoder's last block, and principal components of its tokens.

Shapes: B image, N patch token, D width, h, w token grid.
"""

from typing import cast

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from dmjd.encoders.base import Encoder, known_preprocess
from dmjd.figures.grid import Columns, image_grid
from dmjd.figures.render import component_colors, heat_map, to_rgb
from dmjd.nn.layers import TransformerBlock
from dmjd.nn.modes import evaluating

MAX_HEADS = 6  # shown in a figure


def last_attention(encoder: Encoder, images: Tensor) -> tuple[Tensor, Tensor]:
    """Attention that each patch token receives in the last transformer block, and the outputs of that block.

    Args:
        encoder: any encoder, in evaluation mode.
        images: [B, C, H, W] normalized.

    Returns:
        received: [B, heads, N], the mean over the queries of all patch tokens; sums to 1 if there is no class token.
        tokens: [B, N, D], ``encoder(images)`` without the class token.
    """
    inputs: list[Tensor] = []

    def record(block: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs.append(arguments[0])

    block = cast(TransformerBlock, cast(nn.ModuleList, encoder.blocks)[-1])
    handle = block.register_forward_pre_hook(record)
    try:
        tokens = encoder(images)
    finally:
        handle.remove()
    prefix = encoder.num_prefix_tokens
    received = torch.cat(
        [_received(block, x, prefix) for x in inputs[0].split(1)]
    )  # one image at a time: N^2 values each
    return received, tokens[:, prefix:]


def _received(block: TransformerBlock, x: Tensor, prefix: int) -> Tensor:
    """The block's input [B, prefix + N, D] -> [B, heads, N]. Computed here: the block returns no attention weights."""
    heads = block.attn.num_heads
    qkv = cast(nn.Linear, block.attn.qkv)(block.norm1(x))
    q, k, _ = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # B, heads, N, d
    weights = (q[:, :, prefix:] * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)  # B, heads, N, prefix + N
    return weights.mean(dim=2)[..., prefix:]


def attention_figure(encoder: Encoder, images_0_255: Tensor, num_shown: int) -> Figure:
    """Each image, the attention its tokens receive in the last block, and the tokens' principal components.

    Args:
        encoder: an encoder with ``preprocess``; it is not changed.
        images_0_255: [B, C, H, W]; the components are computed from all of them.
        num_shown: number of images to draw.
    """
    normalized = known_preprocess(encoder).normalize(images_0_255)
    with evaluating(encoder):
        parts = [last_attention(encoder, part) for part in normalized.split(8)]
    received, tokens = (torch.cat(values).float() for values in zip(*parts, strict=True))
    rgb = to_rgb(images_0_255)[:num_shown]
    received, grid = received[:num_shown], encoder.grid  # b, heads, N
    heads = _most_uneven_heads(received)
    columns: Columns = {
        "image": list(rgb),
        "principal components\nof the tokens": list(component_colors(tokens, grid)[:num_shown]),
        "attention received,\nmean of heads": list(heat_map(rgb, received.mean(1), grid)),
    } | {f"head {i + 1}": list(heat_map(rgb, received[:, i], grid)) for i in heads}
    return image_grid(columns, [""] * len(rgb), _note(received.shape[1], len(images_0_255)))


def _most_uneven_heads(received: Tensor) -> list[int]:
    """The heads of [B, heads, N] with the most uneven attention, in ascending order."""
    unevenness = (received.std(dim=-1) / received.mean(dim=-1)).mean(dim=0)  # heads
    return sorted(unevenness.topk(min(MAX_HEADS, len(unevenness))).indices.tolist())


def _note(num_heads: int, num_images: int) -> str:
    heads = f" The {MAX_HEADS} of {num_heads} heads with the most uneven attention." if num_heads > MAX_HEADS else ""
    return (
        "Attention of the last block: bright tokens receive the most attention; each panel has its own scale."
        f"{heads} Principal components: similar tokens have similar colors, within and across images; the mean token "
        f"of each position over {num_images} images is subtracted first."
    )
