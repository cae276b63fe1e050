"""Attention of an encoder's last block, and principal components of its tokens.

Shapes: B image, N patch token, D width, h, w token grid.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dmjd.encoders.base import Encoder, known_preprocess
from dmjd.figures.grid import Columns, image_grid
from dmjd.figures.render import component_colors, heat_map, to_rgb
from dmjd.nn.modes import evaluating

MAX_HEADS = 6  # shown in a figure


class _Products(TorchFunctionMode):
    """Records query and key of every attention, whatever kind of block computes it."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[Tensor, Tensor]] = []  # [B, heads, prefix + N, d] each

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key = args[:2]
            self.pairs.append((query, key))
        return func(*args, **(kwargs or {}))


def last_attention(encoder: Encoder, images: Tensor) -> tuple[Tensor, Tensor]:
    """Attention that each patch token receives in the last transformer block, and the outputs of that block.

    Args:
        encoder: any encoder, in evaluation mode.
        images: [B, C, H, W] normalized.

    Returns:
        received: [B, heads, N], the mean over the queries of all patch tokens; sums to 1 if there are no prefix tokens.
        tokens: [B, N, D], ``encoder(images)`` without prefix tokens.
    """
    block, products = cast(nn.ModuleList, encoder.blocks)[-1], _Products()
    handle = block.register_forward_pre_hook(lambda *_: products.pairs.clear())
    try:
        with products:
            tokens = encoder(images)
    finally:
        handle.remove()
    prefix = encoder.num_prefix_tokens
    # A block may compute several attentions: their heads are shown side by side.
    received = torch.cat([_received(query, key, prefix) for query, key in products.pairs], dim=1)
    return received, tokens[:, prefix:]


def _received(query: Tensor, key: Tensor, prefix: int) -> Tensor:
    """Query and key [B, heads, prefix + N, d] -> [B, heads, N]. One image at a time: N^2 values for each head."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)  # keys that several heads share
    queries = query[:, :, prefix:] * query.shape[-1] ** -0.5
    received = [
        (q @ k.transpose(-2, -1)).softmax(-1).mean(dim=2) for q, k in zip(queries.split(1), key.split(1), strict=True)
    ]
    return torch.cat(received)[..., prefix:]


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
