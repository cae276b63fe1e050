"""Layers that timm does not have: ConvViT's masked convolution block, attention of some tokens only, initialization.

Convolutional stages are channels-last. A *dense* map is [B, H, W, D]; a *visible* map is [R, V, s, s, D]: for each of R
rows (views x images) V visible tokens of s x s cells. All layers except the depthwise convolution are pointwise or
confined to one token, so they serve both forms.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dmjd.nn.dropout import DropPath
from dmjd.nn.recompute import attention, norm_linear, norm_mlp

CONV_NORM_EPS = 1e-5

TRANSFORMER_NORM_EPS = 1e-6

TransformerNorm = partial(nn.LayerNorm, eps=TRANSFORMER_NORM_EPS)

# Applies the 5 x 5 depthwise convolution to a map of either form.
Depthwise = Callable[[nn.Conv2d, Tensor], Tensor]


class TransformerBlock(Block):
    """timm's pre-norm block with MAE's settings (qkv bias, eps 1e-6), and with timm's parameter names.

    The forward pass is ours: the last block of a decoder computes the masked tokens only, and
    :mod:`dmjd.nn.recompute` saves less for the backward pass.

    Attributes:
        checkpointing: recompute attention and hidden layer in the backward pass instead of saving them.
    """

    checkpointing = False

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float = 0.0) -> None:
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"{num_heads} attention heads do not divide the width {dim}")
        norm = cast(type[nn.Module], TransformerNorm)  # annotated as a class; a function works
        super().__init__(dim, num_heads, mlp_ratio, qkv_bias=True, norm_layer=norm)
        # Keyed, unlike timm's: what an image loses does not depend on its batch.
        self.drop_path1 = DropPath(drop_path)  # type: ignore[assignment]
        self.drop_path2 = DropPath(drop_path)  # type: ignore[assignment]

    def forward(self, x: Tensor, skip: int = 0) -> Tensor:  # type: ignore[override]
        """[B, N, D] -> [B, N - skip, D]: the first ``skip`` tokens are attended to, but not computed."""
        x = x[:, skip:] + self.drop_path1(self.ls1(maybe_checkpoint(self.checkpointing, self._attend, x, skip)))
        fc1, fc2 = cast(nn.Linear, self.mlp.fc1), cast(nn.Linear, self.mlp.fc2)
        hidden = norm_mlp(cast(nn.LayerNorm, self.norm2), fc1, fc2, x, not self.checkpointing)
        return x + self.drop_path2(self.ls2(hidden))

    def _attend(self, x: Tensor, skip: int) -> Tensor:
        norm, qkv, heads = cast(nn.LayerNorm, self.norm1), cast(nn.Linear, self.attn.qkv), self.attn.num_heads
        if skip:
            D, x = x.shape[-1], norm(x)
            q = F.linear(x[:, skip:], qkv.weight[:D], qkv.bias[:D]).unflatten(-1, (heads, -1)).transpose(1, 2)
            k, v = F.linear(x, qkv.weight[D:], qkv.bias[D:]).unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = norm_linear(norm, qkv, x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # B, heads, N, d
        project = cast(nn.Linear, self.attn.proj)
        return project(attention(q, k, v).transpose(1, 2).flatten(2))


def maybe_checkpoint(enabled: bool, layers: Callable[..., Tensor], *args: object) -> Tensor:
    """layers(*args), with activation checkpointing if enabled. The layers must not be random."""
    return checkpoint(layers, *args, use_reentrant=False, preserve_rng_state=False) if enabled else layers(*args)


def block_flops(num_tokens: int, dim: int, mlp_ratio: float, skip: int = 0) -> int:
    """Floating-point operations of a transformer block: twice its multiply-adds.

    Multiply-adds per token are 2 D^2 for keys and values; and, unless it is skipped, 2 D^2 for query and projection,
    2 r D^2 for the MLP and 2 N D for attention.
    """
    per_query = 2 * dim * dim + 2 * int(mlp_ratio * dim) * dim + 2 * num_tokens * dim
    return 2 * (num_tokens * 2 * dim * dim + (num_tokens - skip) * per_query)


class PointwiseConv(nn.Linear):
    """A 1 x 1 convolution on channels-last maps. Unlike nn.Linear it keeps PyTorch's default initialization."""


class ConvMlp(nn.Module):
    """Parameters of an MLP of 1 x 1 convolutions; :class:`ConvBlock` applies it together with the preceding norm."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = PointwiseConv(dim, hidden)
        self.fc2 = PointwiseConv(hidden, dim)


class ConvBlock(nn.Module):
    """Masked convolution block of ConvMAE (Gao et al. 2022): x + conv1x1(dwconv5x5(visible * conv1x1(LN(x)))), MLP.

    The depthwise convolution reads visible values only, so masked tokens never influence visible ones.

    Attributes:
        checkpointing: recompute the convolutions in the backward pass too, not only the hidden layer.
    """

    checkpointing = False

    def __init__(self, dim: int, mlp_ratio: float, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=CONV_NORM_EPS)
        self.conv1 = PointwiseConv(dim, dim)
        self.dwconv = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.conv2 = PointwiseConv(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=CONV_NORM_EPS)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))
        self.drop_path1, self.drop_path2 = DropPath(drop_path), DropPath(drop_path)

    def forward(self, x: Tensor, depthwise: Depthwise) -> Tensor:
        """Dense or visible map, whichever ``depthwise`` takes -> map of the same shape."""
        x = x + self.drop_path1(maybe_checkpoint(self.checkpointing, self._convolve, x, depthwise))
        # The hidden layer would be the largest activation of the model; recomputing it takes a thirtieth of a step.
        return x + self.drop_path2(norm_mlp(self.norm2, self.mlp.fc1, self.mlp.fc2, x, keep_hidden=False))

    def _convolve(self, x: Tensor, depthwise: Depthwise) -> Tensor:
        return self.conv2(depthwise(self.dwconv, norm_linear(self.norm1, self.conv1, x)))


def set_checkpointing(module: nn.Module, enable: bool) -> None:
    """Enable or disable activation checkpointing of every part of ``module`` that has a ``checkpointing`` switch."""
    for part in module.modules():
        if hasattr(type(part), "checkpointing"):
            cast(Any, part).checkpointing = enable


class PatchEmbed(nn.Module):
    """Non-overlapping strided convolution as one matrix product, LayerNorm over channels, GELU (ConvMAE).

    ``proj`` is a convolution, for its weight layout and default initialization.
    """

    def __init__(self, in_dim: int, dim: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, stride, stride)
        self.norm = nn.LayerNorm(dim, eps=CONV_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """[..., a, b, C] -> [..., a/stride, b/stride, D]: dense or visible, channels last."""
        return F.gelu(self.norm(strided_conv(self.proj, x)))


def strided_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution whose stride is its kernel size, on channels-last maps: [..., a, b, C] -> [..., a/s, b/s, D]."""
    *lead, a, b, C = x.shape
    s = conv.stride[0]
    cells = x.reshape(*lead, a // s, s, b // s, s, C).transpose(-4, -3).reshape(*lead, a // s, b // s, s * s * C)
    return F.linear(cells, conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)


def init_linear(module: nn.Module) -> None:
    """MAE's initialization of one module: nn.Linear xavier-uniform with zero bias; others keep PyTorch's default."""
    if isinstance(module, nn.Linear) and not isinstance(module, PointwiseConv):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_flattened(conv: nn.Conv2d) -> None:
    """Xavier-uniform of a patch embedding, seen as a linear layer; its bias keeps PyTorch's default."""
    nn.init.xavier_uniform_(conv.weight.view(conv.weight.shape[0], -1))
