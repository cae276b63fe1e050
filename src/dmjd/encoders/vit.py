"""Vision transformer (Dosovitskiy et al. 2021) as MAE uses it: embed visible patches, add positions, run the blocks.

Parameter names equal timm's VisionTransformer, so state dicts move both ways without a map.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from dmjd.encoders.base import Encoder, as_indices, drop_path_rates
from dmjd.nn.layers import TransformerBlock, TransformerNorm, block_flops, init_flattened
from dmjd.nn.tokens import gather_tokens, sincos_positions

# name: (width, depth, heads)
VIT_SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}


class PatchProjection(nn.Module):
    """Holder of the patch embedding under timm's name ``patch_embed.proj``, applied as a matrix product."""

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        """[B, N, P*P*C] in (row, column, channel) order -> [B, N, D]."""
        return F.linear(patches, self.proj.weight.permute(0, 2, 3, 1).flatten(1), self.proj.bias)


class VisionTransformer(Encoder):
    """ViT encoder; one class for pre-training and transfer.

    Args:
        img_size: (H, W) pixels it is built for; other sizes that the patch divides work at call time.
        patch_size: P. in_chans: C. embed_dim: D. depth: blocks. num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over D.
        class_token: whether one learned prefix token runs along.
        drop_path: stochastic depth rate of the last block, growing linearly from 0.
    """

    def __init__(
        self,
        *,
        img_size: tuple[int, int],
        patch_size: int,
        in_chans: int = 3,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        class_token: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(img_size, patch_size, in_chans, embed_dim, num_prefix_tokens=int(class_token))
        self.num_heads, self.mlp_ratio = num_heads, mlp_ratio
        self.decoder_mlp_ratio = mlp_ratio
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        positions = sincos_positions(embed_dim, self.grid, self.num_prefix_tokens)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)  # 1, prefix + N, D
        self.patch_embed = PatchProjection(in_chans, embed_dim, patch_size)
        self.blocks = nn.ModuleList(
            TransformerBlock(embed_dim, num_heads, mlp_ratio, rate) for rate in drop_path_rates(drop_path, depth)
        )
        self.norm = TransformerNorm(embed_dim)
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{i}"} for i in range(depth)
        ]
        self.init_weights()

    def init_weights(self) -> None:
        """MAE's initialization of the embedding and class token; the blocks' linears by the base class."""
        super().init_weights()
        init_flattened(self.patch_embed.proj)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)

    def _embed(self, images: Tensor, visible: Tensor | None) -> Tensor:
        """[B, C, H, W] (and ids [R, V]) -> tokens with positions, prefix first: [R, prefix + V, D]."""
        grid = self.check_images(images)
        x = self.patch_embed(self.visible_patches(images, visible))  # R, V, D
        positions = self.positions(grid)  # 1, prefix + N, D
        x = x + self.visible_positions(positions, visible)
        if self.cls_token is None:
            return x
        prefix = (self.cls_token + positions[:, :1]).expand(x.shape[0], -1, -1)
        return torch.cat([prefix.to(x.dtype), x], dim=1)

    def forward_stages(self, images: Tensor, visible: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Block outputs and no convolutional stages; see :class:`Encoder`."""
        x = self._embed(images, visible)
        for block in self.blocks:
            x = block(x)
        return x, []

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of chosen blocks, with timm's arguments.

        Args:
            x: [B, C, H, W] normalized images.
            indices: block indices (negative from the end), a count of last blocks, or None for all.
            norm: apply the final norm to each.
            stop_early: do not run the blocks after the last one asked for.
            output_fmt: "NCHW" for maps [B, D, h, w], "NLC" for tokens [B, N, D]; prefix tokens are left out.
            intermediates_only: return the list alone, not (tokens after the final norm, list).
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be NCHW or NLC, got {output_fmt}")
        take, last = feature_take_indices(len(self.blocks), as_indices(indices))
        grid = self.check_images(x)
        x = self._embed(x, None)
        outputs = []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = block(x)
            if i in take:
                y = (self.norm(x) if norm else x)[:, self.num_prefix_tokens :]
                outputs.append(y if output_fmt == "NLC" else y.transpose(1, 2).unflatten(2, grid).contiguous())
        return outputs if intermediates_only else (self.norm(x), outputs)

    def block_outputs(self, images: Tensor, count: int) -> list[Tensor]:
        """Patch tokens of the last blocks; see :class:`Encoder`."""
        outputs = self.forward_intermediates(images, count, output_fmt="NLC", intermediates_only=True)
        return cast(list[Tensor], outputs)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] | None = None, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last one asked for (timm's protocol); returns the absolute indices."""
        take, last = feature_take_indices(len(self.blocks), as_indices(indices))
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        return take

    def flops(self, num_visible: int | None = None) -> int:
        """Floating-point operations of one forward pass of one image, on ``num_visible`` patch tokens (default all)."""
        V = num_visible if num_visible is not None else self.num_patches
        embed = 2 * V * self.patch_size**2 * self.in_chans * self.embed_dim
        T = V + self.num_prefix_tokens
        return embed + len(self.blocks) * block_flops(T, self.embed_dim, self.mlp_ratio)

    def visible_positions(self, positions: Tensor, visible: Tensor | None) -> Tensor:
        """Positions of patch tokens: [1, N, D], or [R, V, D] for the visible ids."""
        table = positions[:, self.num_prefix_tokens :]
        if visible is None:
            return table
        return gather_tokens(table.expand(visible.shape[0], -1, -1), visible)
