"""ConvViT, the hybrid encoder of ConvMAE / MCMAE (Gao et al. 2022); the DMJD paper calls it "ConViT".

Stages 1 and 2 are masked convolution blocks on 4 x 4 and 2 x 2 cells per token, stage 3 is a transformer on tokens.
Masked tokens never influence visible ones, so computing only the visible tokens gives the dense masked result.
"""

from collections.abc import Sequence
from functools import partial
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from dmjd.encoders.base import Encoder, drop_path_rates
from dmjd.encoders.timm_features import take_indices
from dmjd.nn.depthwise import cell_indices, dense_depthwise, visible_depthwise
from dmjd.nn.layers import (
    ConvBlock,
    Depthwise,
    PatchEmbed,
    TransformerBlock,
    TransformerNorm,
    block_flops,
    init_flattened,
)
from dmjd.nn.tokens import gather_positions, sincos_positions

CELLS = (4, 2)  # cells per token side in stages 1 and 2


class ConvViT(Encoder):
    """ConvViT encoder. Sizes base and large are DMJD's, tiny and small are ours.

    Args:
        img_size: (H, W) in pixels.
        patch_size: side of a token in pixels: 16, 8 or 4 (first strides 4, 2, 1).
        in_chans: C.
        embed_dims: widths of the three stages.
        depths: numbers of blocks of the three stages.
        num_heads: attention heads of stage 3.
        mlp_ratios: MLP ratios of the three stages: DMJD's are (8, 8, 4), ConvMAE's (4, 4, 4).
        drop_path: stochastic depth rate of the last block, increasing linearly from 0 over all blocks.
    """

    SIZES: ClassVar = {
        "tiny": {"embed_dims": (64, 128, 192), "depths": (2, 2, 11), "num_heads": 3},
        "small": {"embed_dims": (128, 256, 384), "depths": (2, 2, 11), "num_heads": 6},
        "base": {"embed_dims": (256, 384, 768), "depths": (2, 2, 11), "num_heads": 12},
        "large": {"embed_dims": (384, 768, 1024), "depths": (2, 2, 23), "num_heads": 16},
    }
    PATCHES = (4, 8, 16)
    SETTINGS: ClassVar = {
        "embed_dim": ("embed_dims", 3),
        "depth": ("depths", 3),
        "num_heads": ("num_heads", 1),
        "mlp_ratio": ("mlp_ratios", 3),
    }

    def __init__(
        self,
        *,
        img_size: tuple[int, int],
        patch_size: int,
        in_chans: int = 3,
        embed_dims: tuple[int, int, int] = (64, 128, 192),
        depths: tuple[int, int, int] = (2, 2, 11),
        num_heads: int = 3,
        mlp_ratios: tuple[float, float, float] = (8.0, 8.0, 4.0),
        drop_path: float = 0.0,
    ) -> None:
        if patch_size not in self.PATCHES:
            raise ValueError(f"conv_vit encoders come with patch 4, 8 or 16, got {patch_size}")
        super().__init__(img_size, patch_size, in_chans, embed_dims[2])
        d1, d2, d3 = embed_dims
        self.mlp_ratios = mlp_ratios
        self.decoder_mlp_ratio = mlp_ratios[0]
        self.scales = ((d1, CELLS[0]), (d2, CELLS[1]))
        rates = drop_path_rates(drop_path, sum(depths))
        first, second = depths[0], depths[0] + depths[1]
        self.patch_embed1 = PatchEmbed(in_chans, d1, patch_size // CELLS[0])
        self.blocks1 = nn.ModuleList(ConvBlock(d1, mlp_ratios[0], rate) for rate in rates[:first])
        self.patch_embed2: nn.Module = PatchEmbed(d1, d2, 2)
        self.blocks2 = nn.ModuleList(ConvBlock(d2, mlp_ratios[1], rate) for rate in rates[first:second])
        self.patch_embed3: nn.Module = PatchEmbed(d2, d3, 2)
        self.patch_embed4: nn.Module = nn.Linear(d3, d3)
        self.pos_embed = nn.Parameter(sincos_positions(d3, self.grid), requires_grad=False)  # 1, N, D
        self.blocks = nn.ModuleList(TransformerBlock(d3, num_heads, mlp_ratios[2], r) for r in rates[second:])
        self.norm = TransformerNorm(d3)
        self.feature_info = [
            {"num_chs": width, "reduction": patch_size // cells, "module": module}
            for width, cells, module in ((d1, 4, "blocks1"), (d2, 2, "blocks2"), (d3, 1, "blocks"))
        ]
        self.init_weights()

    def init_weights(self) -> None:
        """MAE's initialization: last patch embedding here, linear layers in the base class."""
        super().init_weights()
        init_flattened(cast(PatchEmbed, self.patch_embed3).proj)

    def _conv_stages(self, x: Tensor, depthwise: Sequence[Depthwise]) -> tuple[Tensor, Tensor]:
        """Stages 1 and 2 on channels-last pixels, dense or visible; ``depthwise`` holds one function per stage."""
        x1 = self.patch_embed1(x)
        for block in self.blocks1:
            x1 = block(x1, depthwise[0])
        x2 = self.patch_embed2(x1)
        for block in self.blocks2:
            x2 = block(x2, depthwise[1])
        return x1, x2

    def _embed(self, x2: Tensor, positions: Tensor) -> Tensor:
        """Stage 2's output by token [R, V, 2, 2, d2] -> stage 3's input [R, V, D]."""
        return self.patch_embed4(self.patch_embed3(x2).flatten(2, 4)) + positions

    def _transformer_stage(self, x2: Tensor, positions: Tensor) -> Tensor:
        """Stage 3: tokens [R, V, 2, 2, d2] -> [R, V, D]."""
        x = self._embed(x2, positions)
        for block in self.blocks:
            x = block(x)
        return x

    def _dense_maps(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Stages 1 and 2 of all tokens as maps [B, h*s, w*s, d]; ``mask`` [B, N] bool, True = masked."""
        h, w = self.check_images(images)
        depthwise = []
        for cells in CELLS:
            masked = None
            if mask is not None:
                masked = mask.view(-1, h, w).repeat_interleave(cells, 1).repeat_interleave(cells, 2)
            depthwise.append(partial(dense_depthwise, mask=masked))
        return self._conv_stages(images.permute(0, 2, 3, 1), depthwise)

    def forward_stages(self, images: Tensor, visible: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Tokens, and the outputs of the two convolutional stages by token; see :class:`Encoder`."""
        grid = self.check_images(images)
        positions = self.positions(grid)
        if visible is None:
            x1, x2 = (_to_tokens(x, grid) for x in self._dense_maps(images))
        else:
            cells = (self.patch_size, self.patch_size, self.in_chans)
            pixels = self.visible_patches(images, visible).unflatten(-1, cells)  # R, V, P, P, C
            depthwise = [
                partial(visible_depthwise, cells=cell_indices(visible, grid, s), size=(grid[0] * s, grid[1] * s))
                for s in CELLS
            ]
            x1, x2 = self._conv_stages(pixels, depthwise)
            positions = gather_positions(positions, visible)
        return self._transformer_stage(x2, positions), [x1, x2]

    def forward_masked_dense(self, images: Tensor, visible: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The published implementation: compute all tokens under a mask, then select. Same values, slower.

        Args:
            images: [B, C, H, W].
            visible: [B, V] ids.

        Returns:
            The same as :meth:`forward_stages`.
        """
        grid = self.check_images(images)
        mask = torch.ones(visible.shape[0], grid[0] * grid[1], dtype=torch.bool, device=images.device)
        maps = self._dense_maps(images, mask.scatter_(1, visible, False))
        rows = torch.arange(visible.shape[0], device=images.device).unsqueeze(1)
        x1, x2 = (_to_tokens(x, grid)[rows, visible] for x in maps)
        positions = gather_positions(self.positions(grid), visible)
        return self._transformer_stage(x2, positions), [x1, x2]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """One map for each of the three stages; see :class:`Encoder`.

        ``output_fmt`` is "NCHW", because the stages differ in resolution. If ``stop_early`` skips stage 3, the tokens
        returned are stage 2's cells.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"ConvViT's stages are maps of different sizes: output_fmt must be NCHW, got {output_fmt}")
        take, last = take_indices(3, indices)
        grid = self.check_images(x)
        x1, x2 = self._dense_maps(x)
        maps = [x1.permute(0, 3, 1, 2), x2.permute(0, 3, 1, 2)]
        tokens = x2.flatten(1, 2)
        if last == 2 or not (stop_early or intermediates_only):
            x3 = self._transformer_stage(_to_tokens(x2, grid), self.positions(grid))
            tokens = self.norm(x3)
            maps.append((tokens if norm else x3).transpose(1, 2).unflatten(2, grid))
        outputs = [maps[i].contiguous() for i in take]
        return outputs if intermediates_only else (tokens, outputs)

    def block_outputs(self, images: Tensor, count: int) -> list[Tensor]:
        """Patch tokens after the last blocks of stage 3; see :class:`Encoder`."""
        grid = self.check_images(images)
        x = self._embed(_to_tokens(self._dense_maps(images)[1], grid), self.positions(grid))
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return outputs[-count:]

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] | None = None, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last requested one; see :class:`Encoder`."""
        take, last = take_indices(3, indices)
        if last < 2:  # a parameter without a gradient would make data-parallel training wait for it
            self.blocks, self.patch_embed3, self.patch_embed4 = nn.ModuleList(), nn.Identity(), nn.Identity()
        if last < 1:
            self.blocks2, self.patch_embed2 = nn.ModuleList(), nn.Identity()
        if prune_norm:
            self.norm = nn.Identity()
        return take

    def flops(self, num_visible: int | None = None) -> int:
        """Floating-point operations of a forward pass; see :class:`Encoder`.

        The convolutional stages count visible cells only. A block takes, per cell, 2 d^2 multiply-adds for two 1 x 1
        convolutions, 25 d for the depthwise one and 2 r d^2 for the MLP.
        """
        V = num_visible if num_visible is not None else self.num_patches
        total, in_dim, taps = 0, self.in_chans, (self.patch_size // CELLS[0]) ** 2
        depths = (len(self.blocks1), len(self.blocks2))
        for (d, cells), ratio, depth in zip(self.scales, self.mlp_ratios[:2], depths, strict=True):
            cell = taps * in_dim * d + depth * (2 * d * d + 25 * d + 2 * int(ratio * d) * d)
            total += 2 * V * cells * cells * cell
            in_dim, taps = d, 4
        D = self.embed_dim
        total += 2 * V * (taps * in_dim * D + D * D)
        return total + len(self.blocks) * block_flops(V, D, self.mlp_ratios[2])


def _to_tokens(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Dense map [B, h*s, w*s, D] -> by token [B, N, s, s, D]."""
    B, H, _, D = x.shape
    (h, w), s = grid, H // grid[0]
    return x.reshape(B, h, s, w, s, D).transpose(2, 3).reshape(B, h * w, s, s, D)
