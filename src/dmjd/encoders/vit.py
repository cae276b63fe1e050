"""Vision transformer (Dosovitskiy et al. 2021) as in MAE: embed visible patches, add positions, run the blocks.

Parameter names are those of timm's VisionTransformer, so state dicts can be exchanged without a key map.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dmjd.encoders.base import TimmModel, drop_path_rates
from dmjd.encoders.plain import PlainEncoder, embed_patches
from dmjd.nn.layers import TransformerBlock, TransformerNorm, block_flops, init_flattened
from dmjd.nn.tokens import gather_positions, sincos_positions


class PatchProjection(nn.Module):
    """Patch embedding, stored under timm's name ``patch_embed.proj`` and applied as a matrix product."""

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        """[B, N, P*P*C] in (row, column, channel) order -> [B, N, D]."""
        return embed_patches(self.proj, patches)


class VisionTransformer(PlainEncoder):
    """ViT encoder, the same class for pre-training and transfer.

    Args:
        img_size: (H, W) in pixels. Images of other sizes divisible by the patch work too.
        patch_size: P.
        in_chans: C.
        embed_dim: D.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP divided by D.
        class_token: prepend one learned token.
        drop_path: stochastic depth rate of the last block, increasing linearly from 0.
    """

    SIZES: ClassVar = {
        "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
        "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
        "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
        "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
        "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
        "giant": {"embed_dim": 1408, "depth": 40, "num_heads": 16, "mlp_ratio": 48 / 11},
    }
    PATCHES = (2, 4, 8, 14, 16, 32)

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
        self.feature_info = self.block_info(depth)
        self.init_weights()

    def init_weights(self) -> None:
        """MAE's initialization: embedding and class token here, linear layers in the base class."""
        super().init_weights()
        init_flattened(self.patch_embed.proj)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)

    def prepare(self, images: Tensor, visible: Tensor | None = None) -> tuple[Tensor, list[Callable[[Tensor], Tensor]]]:
        """Embed patches, add positions, prepend the class token; see :class:`PlainEncoder`."""
        grid, P = self.check_images(images), self.num_prefix_tokens
        x = self.patch_embed(self.visible_patches(images, visible))  # R, V, D
        positions = self.positions(grid)  # 1, prefix + N, D
        x = x + gather_positions(positions[:, P:], visible)
        if self.cls_token is not None:
            prefix = (self.cls_token + positions[:, :P]).expand(x.shape[0], -1, -1)
            x = torch.cat([prefix.to(x.dtype), x], dim=1)
        return x, list(self.blocks)

    def flops(self, num_visible: int | None = None) -> int:
        """Floating-point operations of a forward pass; see :class:`Encoder`."""
        V = num_visible if num_visible is not None else self.num_patches
        embed = 2 * V * self.patch_size**2 * self.in_chans * self.embed_dim
        T = V + self.num_prefix_tokens
        return embed + len(self.blocks) * block_flops(T, self.embed_dim, self.mlp_ratio)

    def timm_model(self) -> TimmModel:
        """timm's ViT of the same size and without a head; see :class:`Encoder`."""
        size = self.name.split("_")[1]
        arguments: dict[str, Any] = {
            "img_size": self.img_size,
            "patch_size": self.patch_size,
            "in_chans": self.in_chans,
            "embed_dim": self.embed_dim,
            "depth": len(self.blocks),
            "num_heads": self.num_heads,
            "mlp_ratio": self.mlp_ratio,
            "num_classes": 0,
        }
        if not self.num_prefix_tokens:
            arguments |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
        patch = 14 if size in ("huge", "giant") else 16  # timm has no others of that name
        defaults = {"img_size": (224, 224), "patch_size": patch, "in_chans": 3, "mlp_ratio": 4.0, **self.SIZES[size]}
        return TimmModel(f"vit_{size}_patch{patch}_224", arguments, defaults)
