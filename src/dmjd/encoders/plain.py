"""Encoders that embed patches and run transformer blocks on tokens, all at one resolution."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from dmjd.encoders.base import Encoder
from dmjd.encoders.timm_features import take_indices


class PlainEncoder(Encoder):
    """Base class of encoders without convolutional stages.

    A family defines :meth:`prepare` and :meth:`flops`, and in its constructor the modules ``blocks`` and ``norm``.
    """

    blocks: nn.ModuleList

    @abstractmethod
    def prepare(self, images: Tensor, visible: Tensor | None = None) -> tuple[Tensor, list[Callable[[Tensor], Tensor]]]:
        """The input of the first block, and the blocks as functions of tokens.

        Args:
            images: [B, C, H, W] normalized.
            visible: [R, V] int64 ids of the tokens to compute, R = K * B, view-major; None = all.

        Returns:
            Tokens with positions, prefix first, [R, prefix + V, D]; and for each block a function of such tokens.
        """

    def block_info(self, depth: int) -> list[dict[str, object]]:
        """``feature_info``: one map for each block."""
        return [
            {"num_chs": self.embed_dim, "reduction": self.patch_size, "module": f"blocks.{i}"} for i in range(depth)
        ]

    def forward_stages(self, images: Tensor, visible: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Block outputs, and no convolutional stages; see :class:`Encoder`."""
        x, blocks = self.prepare(images, visible)
        for block in blocks:
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
        """One map for each block; see :class:`Encoder`."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be NCHW or NLC, got {output_fmt}")
        take, last = take_indices(len(self.blocks), indices)
        grid = self.check_images(x)
        x, blocks = self.prepare(x)
        outputs = []
        for i, block in enumerate(blocks[: last + 1] if stop_early else blocks):
            x = block(x)
            if i in take:
                y = (self.norm(x) if norm else x)[:, self.num_prefix_tokens :]
                outputs.append(y if output_fmt == "NLC" else y.transpose(1, 2).unflatten(2, grid).contiguous())
        return outputs if intermediates_only else (self.norm(x), outputs)

    def block_outputs(self, images: Tensor, count: int) -> list[Tensor]:
        """Patch tokens after the last blocks; see :class:`Encoder`."""
        outputs = self.forward_intermediates(images, count, output_fmt="NLC", intermediates_only=True)
        return cast(list[Tensor], outputs)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] | None = None, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the blocks after the last requested one; see :class:`Encoder`."""
        take, last = take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        return take


def embed_patches(proj: nn.Conv2d, patches: Tensor) -> Tensor:
    """Patch embedding as a matrix product.

    Args:
        proj: the convolution whose stride is its kernel size.
        patches: [B, N, P*P*C] in (row, column, channel) order.

    Returns:
        [B, N, D].
    """
    return F.linear(patches, proj.weight.permute(0, 2, 3, 1).flatten(1), proj.bias)
