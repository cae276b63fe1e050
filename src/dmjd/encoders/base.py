"""What every encoder offers, so that everything downstream is written once."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmjd.images.preprocess import Preprocess
from dmjd.nn.layers import TRANSFORMER_NORM_EPS, init_linear, set_checkpointing
from dmjd.nn.tokens import gather_views, patchify, sincos_positions


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Stochastic depth growing linearly from 0 in the first block to ``last`` in the last one."""
    if not 0.0 <= last < 1.0:
        raise ValueError(f"drop_path must lie in [0, 1), got {last}")
    return [last * i / max(1, depth - 1) for i in range(depth)]


class Encoder(nn.Module, ABC):
    """Base of the encoders: images in, tokens out, on all patches or on the visible ones only.

    Attributes:
        name: the name it was created by. options: keyword arguments that make it again with ``create_encoder``.
        img_size: (H, W) pixels. grid: (h, w) tokens. patch_size: P, pixels of a token's side.
        in_chans: C. embed_dim: D. num_prefix_tokens: class tokens before the patch tokens.
        scales: (width, cells per token side) of each convolutional stage, finest first; empty for a plain ViT.
        decoder_mlp_ratio: MLP ratio its reconstruction decoder takes by default.
        norm: the final norm of pre-training; not part of pooled features.
        feature_info: timm's description of the intermediate maps.
        preprocess: how images become its input, where known.
    """

    pos_embed: nn.Parameter
    norm: nn.Module
    feature_info: list[dict[str, Any]]
    decoder_mlp_ratio: float
    scales: tuple[tuple[int, int], ...] = ()

    def __init__(
        self, img_size: tuple[int, int], patch_size: int, in_chans: int, embed_dim: int, num_prefix_tokens: int = 0
    ) -> None:
        super().__init__()
        H, W = img_size
        if H % patch_size or W % patch_size or min(H, W) < patch_size:
            raise ValueError(
                f"img_size {H} x {W} is not divisible by the encoder's {patch_size}-pixel patch; "
                f"nearest that is: {_nearest(H, patch_size)} x {_nearest(W, patch_size)}"
            )
        if in_chans < 1:
            raise ValueError(f"in_chans must be at least 1, got {in_chans}")
        self.name = type(self).__name__
        self.options: dict[str, Any] = {}
        self.img_size, self.grid = (H, W), (H // patch_size, W // patch_size)
        self.patch_size, self.in_chans, self.embed_dim = patch_size, in_chans, embed_dim
        self.num_features = embed_dim  # timm's word for the same
        self.num_prefix_tokens = num_prefix_tokens
        self.preprocess: Preprocess | None = None

    @property
    def num_patches(self) -> int:
        """N, patch tokens of an image of ``img_size``."""
        return self.grid[0] * self.grid[1]

    @property
    def depth(self) -> int:
        """Transformer blocks."""
        return len(cast(nn.ModuleList, self.blocks))

    def init_weights(self) -> None:
        """MAE's initialization of every linear layer (see :func:`dmjd.nn.layers.init_linear`)."""
        self.apply(init_linear)

    @abstractmethod
    def forward_stages(self, images: Tensor, visible: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Block outputs before ``norm``, and the outputs of the convolutional stages for multi-scale fusion.

        Args:
            images: [B, C, H, W] normalized.
            visible: [R, V] int64 ids of the tokens to compute, R = K * B, view-major; None = all.

        Returns:
            tokens [R, prefix + V, D]; one [R, V, s, s, d] for each of ``scales``.
        """

    @abstractmethod
    def block_outputs(self, images: Tensor, count: int) -> list[Tensor]:
        """Patch tokens after each of the last ``count`` transformer blocks, before the norm.

        Args:
            images: [B, C, H, W] normalized. count: 1 to :attr:`depth`.

        Returns:
            [B, N, D] each, the last block's at the end.
        """

    @abstractmethod
    def flops(self, num_visible: int | None = None) -> int:
        """Floating-point operations of one forward pass of one image, on ``num_visible`` patch tokens (default all)."""

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        """Block outputs, before the norm of pre-training.

        Args:
            images: [B, C, H, W] normalized.
            visible: None for all tokens; [B, V] or [K, B, V] int64 raster ids to see only those.

        Returns:
            [B, prefix + N, D], [B, prefix + V, D] or [K, B, prefix + V, D].
        """
        if visible is None:
            return self.forward_stages(images)[0]
        if visible.dim() not in (2, 3) or visible.shape[-2] != images.shape[0]:
            raise ValueError(
                f"visible must be [B, V] or [K, B, V] with B = {images.shape[0]}, got {list(visible.shape)}"
            )
        tokens = self.forward_stages(images, visible.flatten(0, -2))[0]  # R, prefix + V, D
        return tokens.unflatten(0, visible.shape[:-1])

    def forward_features(self, images: Tensor) -> Tensor:
        """timm's meaning of the name: all tokens after the final norm, [B, prefix + N, D]."""
        return self.norm(self(images))

    def pool(self, tokens: Tensor) -> Tensor:
        """The downstream feature: mean over patch tokens, then a fresh ``fc_norm`` without affine (identity affine).

        Args:
            tokens: [B, prefix + N, D], as :meth:`forward` gives them.

        Returns:
            [B, D].
        """
        return F.layer_norm(self.mean_patch_token(tokens), (self.embed_dim,), eps=TRANSFORMER_NORM_EPS)

    def mean_patch_token(self, tokens: Tensor) -> Tensor:
        """[B, prefix + N, D] -> [B, D], prefix tokens left out."""
        return tokens[:, self.num_prefix_tokens :].mean(dim=1)

    def check_images(self, images: Tensor) -> tuple[int, int]:
        """The token grid of a batch; ValueError where shape or channels do not fit."""
        if images.dim() != 4 or images.shape[1] != self.in_chans:
            raise ValueError(f"images must be [B, {self.in_chans}, H, W], got {list(images.shape)}")
        H, W = images.shape[-2:]
        if H % self.patch_size or W % self.patch_size:
            raise ValueError(f"image of {H} x {W} pixels is not divisible by the {self.patch_size}-pixel patch")
        return H // self.patch_size, W // self.patch_size

    def visible_patches(self, images: Tensor, visible: Tensor | None) -> Tensor:
        """Pixels of the tokens to compute: [B, N, P*P*C], or [R, V, P*P*C] for ids [R, V].

        Gathering pixels before they are embedded moves the least memory and embeds nothing that no view sees.
        """
        patches = patchify(images, self.patch_size)  # B, N, P*P*C
        return patches if visible is None else gather_views(patches, visible)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Position table for a grid, [1, prefix + h*w, D].

        Another grid than the encoder's own: a fixed table is computed anew, a learned one resized by 2-D bicubic
        interpolation.
        """
        if grid == self.grid:
            return self.pos_embed
        P = self.num_prefix_tokens
        fixed = sincos_positions(self.embed_dim, self.grid, P).to(self.pos_embed.device)
        if torch.allclose(self.pos_embed.detach().float(), fixed, atol=1e-5):
            return sincos_positions(self.embed_dim, grid, P).to(self.pos_embed)
        table = self.pos_embed[:, P:].unflatten(1, self.grid).permute(0, 3, 1, 2).float()  # 1, D, h, w
        table = F.interpolate(table, size=grid, mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
        return torch.cat([self.pos_embed[:, :P], table.to(self.pos_embed.dtype)], dim=1)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute block activations again in the backward pass: less memory, about a quarter more arithmetic."""
        set_checkpointing(self, enable)

    def no_weight_decay(self) -> set[str]:
        """Names kept out of weight decay besides 1-D parameters (timm's protocol)."""
        return {"pos_embed"}


def as_indices(indices: int | Sequence[int] | None) -> int | list[int] | None:
    """Indices of intermediate maps as timm's own helper wants them."""
    return indices if indices is None or isinstance(indices, int) else list(indices)


def _nearest(pixels: int, patch_size: int) -> int:
    return max(1, round(pixels / patch_size)) * patch_size


def known_preprocess(encoder: Encoder) -> Preprocess:
    """``encoder.preprocess``; ValueError where it is not known."""
    if encoder.preprocess is None:
        raise ValueError(f"{encoder.name} does not know its preprocessing: set encoder.preprocess = Preprocess(...)")
    return encoder.preprocess
