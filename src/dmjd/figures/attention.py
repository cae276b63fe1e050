"""What the last block of an encoder attends to, and its tokens as colors.

Shapes: B image, N patch token, D width, h, w token grid.
"""

from typing import cast

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from dmjd.encoders.base import Encoder, known_preprocess
from dmjd.figures.grid import Columns, sheet
from dmjd.figures.render import component_colors, glow, to_rgb
from dmjd.nn.layers import TransformerBlock
from dmjd.nn.modes import evaluating

MOST_HEADS = 6  # that a figure has room for


def last_attention(encoder: Encoder, images: Tensor) -> tuple[Tensor, Tensor]:
    """Attention that each patch token receives in the last transformer block, and the block outputs.

    Args:
        encoder: any encoder, in evaluation mode. images: [B, C, H, W] normalized.

    Returns:
        received: [B, heads, N], the mean over the queries of all patch tokens; 1 in sum where there is no class token,
        whose share is left out.
        tokens: [B, N, D], what ``encoder(images)`` gives, without the class token.
    """
    inputs: list[Tensor] = []

    def keep(block: nn.Module, given: tuple[Tensor, ...]) -> None:
        inputs.append(given[0])

    block = cast(TransformerBlock, cast(nn.ModuleList, encoder.blocks)[-1])
    handle = block.register_forward_pre_hook(keep)
    try:
        tokens = encoder(images)
    finally:
        handle.remove()
    prefix = encoder.num_prefix_tokens
    received = torch.cat([_received(block, x, prefix) for x in inputs[0].split(1)])  # one at a time: N^2 values each
    return received, tokens[:, prefix:]


def _received(block: TransformerBlock, x: Tensor, prefix: int) -> Tensor:
    """The block's input [B, prefix + N, D] -> [B, heads, N]; its own forward pass keeps no attention weights."""
    heads = block.attn.num_heads
    qkv = cast(nn.Linear, block.attn.qkv)(block.norm1(x))
    q, k, _ = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # B, heads, N, d
    weights = (q[:, :, prefix:] * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)  # B, heads, N, prefix + N
    return weights.mean(dim=2)[..., prefix:]


def attention_figure(encoder: Encoder, images_0_255: Tensor, num_shown: int) -> Figure:
    """Each image, the attention its tokens receive in the last block, and the tokens' principal components.

    Args:
        encoder: whose ``preprocess`` is set; left as it was.
        images_0_255: [B, C, H, W], from all of which the components are taken. num_shown: how many are drawn.
    """
    normalized = known_preprocess(encoder).normalize(images_0_255)
    with evaluating(encoder):
        parts = [last_attention(encoder, part) for part in normalized.split(8)]
    received, tokens = (torch.cat(values).float() for values in zip(*parts, strict=True))
    rgb = to_rgb(images_0_255)[:num_shown]
    received, grid = received[:num_shown], encoder.grid  # b, heads, N
    heads = _telling_heads(received)
    columns: Columns = {
        "image": list(rgb),
        "principal components\nof the tokens": list(component_colors(tokens, grid)[:num_shown]),
        "attention received,\nmean of heads": list(glow(rgb, received.mean(1), grid)),
    } | {f"head {i + 1}": list(glow(rgb, received[:, i], grid)) for i in heads}
    return sheet(columns, [""] * len(rgb), _note(received.shape[1], len(images_0_255)))


def _telling_heads(received: Tensor) -> list[int]:
    """Of [B, heads, N] the heads whose attention is most uneven, in their own order."""
    unevenness = (received.std(dim=-1) / received.mean(dim=-1)).mean(dim=0)  # heads
    return sorted(unevenness.topk(min(MOST_HEADS, len(unevenness))).indices.tolist())


def _note(num_heads: int, num_images: int) -> str:
    heads = f" The {MOST_HEADS} of {num_heads} heads with the most uneven attention." if num_heads > MOST_HEADS else ""
    return (
        "Attention of the last block: bright tokens are attended to by the others most; each panel has its own scale."
        f"{heads} Principal components: tokens of one color are alike, within an image and across images; "
        f"the mean token of each place over {num_images} images is taken away first."
    )
