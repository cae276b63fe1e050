"""The two light branches on the shared encoder (DMJD, section III-B): reconstruction of masked tokens, distillation on
visible ones.
"""

from typing import cast

import torch
from torch import Tensor, nn

from dmjd.nn.layers import (
    TRANSFORMER_NORM_EPS,
    TransformerBlock,
    TransformerNorm,
    block_flops,
    init_linear,
    strided_conv,
)
from dmjd.nn.tokens import gather_tokens, sincos_positions


def default_decoder(embed_dim: int) -> tuple[int, int, int]:
    """(width, depth, heads) of the decoder for an encoder width: the published 512 x 8 from 768 on, smaller below.

    A 512 x 8 decoder on a tiny encoder would take nine tenths of the time.
    """
    if embed_dim >= 768:
        return 512, 8, 16
    return (256, 2, 8) if embed_dim >= 384 else (128, 2, 4)


class ReconstructionDecoder(nn.Module):
    """Invisible reconstruction: mask tokens in the masked places, positions, transformer blocks, linear head (MAE).

    Args:
        encoder_dim: D. grid: (h, w) tokens. num_prefix_tokens: class tokens that pass through.
        dim, depth, num_heads, mlp_ratio: of the transformer. out_dim: C, numbers predicted per token.
    """

    def __init__(
        self,
        encoder_dim: int,
        grid: tuple[int, int],
        *,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        out_dim: int,
        num_prefix_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.num_prefix_tokens, self.mlp_ratio = num_prefix_tokens, mlp_ratio
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_positions(dim, grid, num_prefix_tokens), requires_grad=False)
        self.blocks = nn.ModuleList(TransformerBlock(dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = TransformerNorm(dim)
        self.head = nn.Linear(dim, out_dim)
        self.apply(init_linear)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent: Tensor, visible: Tensor, masked: Tensor, all_tokens: bool = False) -> Tensor:
        """Predict the masked tokens.

        The blocks don't care about token order, so visible and mask tokens are laid side by side instead of scattered.

        Args:
            latent: [R, prefix + V, D]. visible: [R, V] ids in the latent's order. masked: [R, M] ids.
            all_tokens: predict the visible ones too.

        Returns:
            [R, M, C] in the order of ``masked``; with ``all_tokens`` [R, V + M, C], visible first.
        """
        P, V = self.num_prefix_tokens, visible.shape[1]
        x = self.embed(latent)  # R, prefix + V, dim
        hidden = self.mask_token.to(x.dtype).expand(x.shape[0], masked.shape[1], -1)  # R, M, dim
        table = self.pos_embed[:, P:].expand(x.shape[0], -1, -1)
        positions = gather_tokens(table, torch.cat([visible, masked], dim=1))  # R, V + M, dim
        if P:
            positions = torch.cat([self.pos_embed[:, :P].expand(x.shape[0], -1, -1), positions], dim=1)
        x = torch.cat([x, hidden], dim=1) + positions  # R, prefix + V + M, dim
        for block in self.blocks[:-1]:
            x = block(x)
        # The last block computes only the tokens that are predicted; it attends to all.
        return self.head(self.norm(self.blocks[-1](x, skip=P if all_tokens else P + V)))

    def flops(self, num_visible: int, num_masked: int) -> int:
        """Floating-point operations of one pass of one view: all tokens in the blocks, masked ones from the last on."""
        dim, T = self.embed.out_features, self.num_prefix_tokens + num_visible + num_masked
        embed = 2 * (T - num_masked) * self.embed.in_features * dim
        blocks = (len(self.blocks) - 1) * block_flops(T, dim, self.mlp_ratio)
        blocks += block_flops(T, dim, self.mlp_ratio, skip=T - num_masked)
        return embed + blocks + 2 * num_masked * dim * self.head.out_features


class DistillationHead(nn.Module):
    """Visible distillation: a projector on each visible token and one linear predictor.

    Args:
        encoder_dim: D. dim: width of the projector (the decoder's). out_dim: C, numbers predicted per token.
        depth: linear layers of the projector; the paper's has three.
    """

    def __init__(self, encoder_dim: int, dim: int, out_dim: int, depth: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(encoder_dim, dim)]
        for _ in range(depth - 1):
            layers += [TransformerNorm(dim), nn.GELU(), nn.Linear(dim, dim)]
        self.projector = nn.Sequential(*layers, nn.LayerNorm(dim, eps=TRANSFORMER_NORM_EPS, elementwise_affine=False))
        self.predictor = nn.Linear(dim, out_dim)
        self.apply(init_linear)

    def forward(self, latent: Tensor) -> Tensor:
        """Visible tokens without prefix [R, V, D] -> predictions for the same tokens [R, V, C]."""
        return self.predictor(self.projector(latent))

    def flops(self, num_visible: int) -> int:
        """Floating-point operations of one forward pass of one view."""
        return 2 * num_visible * sum(p.numel() for p in self.parameters() if p.dim() > 1)


class MultiScaleFusion(nn.Module):
    """Brings the convolutional stages to token resolution in pre-training (ConvMAE): one strided convolution each.

    Args:
        scales: (width, cells per token side) of each stage. dim: D.
    """

    def __init__(self, scales: tuple[tuple[int, int], ...], dim: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width, dim, cells, cells) for width, cells in scales)

    def forward(self, stages: list[Tensor]) -> Tensor:
        """[R, V, s, s, d] for each stage -> [R, V, D]."""
        convs = (cast(nn.Conv2d, conv) for conv in self.convs)
        fused = [strided_conv(conv, x).flatten(2) for conv, x in zip(convs, stages, strict=True)]
        return torch.stack(fused).sum(0)

    def flops(self, num_visible: int) -> int:
        """Floating-point operations of one forward pass of one view."""
        return 2 * num_visible * sum(p.numel() for p in self.parameters() if p.dim() > 1)
