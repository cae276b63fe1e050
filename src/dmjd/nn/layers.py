"""What timm.layers lacks: the masked convolution block of ConvViT, attention for a part of the tokens, initialization.

Convolutional stages keep channels last. A *dense* map is [B, H, W, D]; a *visible* map is [R, V, s, s, D]: for each
of R rows (views times images) V visible tokens of s x s cells. Everything but the depthwise convolution is pointwise
or confined to one token, so it is written once for both forms.
"""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch.nn.functional as F
from timm.layers import DropPath
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dmjd.nn.recompute import attention, norm_linear, norm_mlp

CONV_NORM_EPS = 1e-5

TRANSFORMER_NORM_EPS = 1e-6

TransformerNorm = partial(nn.LayerNorm, eps=TRANSFORMER_NORM_EPS)

# How the 5 x 5 depthwise convolution is applied to a map of either form.
Depthwise = Callable[[nn.Conv2d, Tensor], Tensor]


class TransformerBlock(Block):
    """timm's pre-norm block with MAE's settings (qkv bias, eps 1e-6) and its parameter names.

    Its own forward pass, because the last block of a decoder is asked for the masked tokens only, and because
    :mod:`dmjd.nn.recompute` keeps less for the backward pass.

    Attributes:
        checkpointing: whether attention and hidden layer are computed again in the backward pass instead of kept.
    """

    checkpointing = False

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float = 0.0) -> None:
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"{num_heads} attention heads do not divide the width {dim}")
        norm = cast(type[nn.Module], TransformerNorm)  # timm wants a class; any maker of modules does
        super().__init__(dim, num_heads, mlp_ratio, qkv_bias=True, drop_path=drop_path, norm_layer=norm)

    def forward(self, x: Tensor, skip: int = 0) -> Tensor:  # type: ignore[override]
        """[B, N, D] -> [B, N - skip, D]: the first ``skip`` tokens are attended to, but not computed themselves."""
        x = x[:, skip:] + self.drop_path1(kept_or_again(self.checkpointing, self._attend, x, skip))
        fc1, fc2 = cast(nn.Linear, self.mlp.fc1), cast(nn.Linear, self.mlp.fc2)
        return x + self.drop_path2(norm_mlp(cast(nn.LayerNorm, self.norm2), fc1, fc2, x, not self.checkpointing))

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


def kept_or_again(again: bool, layers: Callable[..., Tensor], *args: object) -> Tensor:
    """layers(*args), its activations kept for the backward pass or computed again there; nothing in it is random."""
    return checkpoint(layers, *args, use_reentrant=False, preserve_rng_state=False) if again else layers(*args)


def block_flops(num_tokens: int, dim: int, mlp_ratio: float, skip: int = 0) -> int:
    """Floating-point operations of a transformer block, twice its multiply-adds.

    Keys and values 2 D^2 of every token; query and projection 2 D^2, MLP 2 r D^2 and attention 2 N D of every token
    that is not skipped.
    """
    per_query = 2 * dim * dim + 2 * int(mlp_ratio * dim) * dim + 2 * num_tokens * dim
    return 2 * (num_tokens * 2 * dim * dim + (num_tokens - skip) * per_query)


class PointwiseConv(nn.Linear):
    """A 1 x 1 convolution on channels-last maps; its own class because it keeps PyTorch's default initialization."""


class ConvMlp(nn.Module):
    """MLP of 1 x 1 convolutions on channels-last maps; :class:`ConvBlock` applies it together with the norm before."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = PointwiseConv(dim, hidden)
        self.fc2 = PointwiseConv(hidden, dim)


class ConvBlock(nn.Module):
    """Masked convolution block of ConvMAE (Gao et al. 2022): x + conv1x1(dwconv5x5(visible * conv1x1(LN(x)))), MLP.

    The depthwise convolution sees visible values only, so masked positions never influence visible ones.

    Attributes:
        checkpointing: whether the convolutions too are computed again in the backward pass, not only the hidden layer.
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
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, depthwise: Depthwise) -> Tensor:
        """Same shape in and out, dense or visible, as ``depthwise`` understands it."""
        x = x + self.drop_path(kept_or_again(self.checkpointing, self._convolve, x, depthwise))
        # The hidden layer of the cells would be the largest activation of all; its product is a thirtieth of a step.
        return x + self.drop_path(norm_mlp(self.norm2, self.mlp.fc1, self.mlp.fc2, x, keep_hidden=False))

    def _convolve(self, x: Tensor, depthwise: Depthwise) -> Tensor:
        return self.conv2(depthwise(self.dwconv, norm_linear(self.norm1, self.conv1, x)))


def set_checkpointing(module: nn.Module, enable: bool) -> None:
    """Have every block in ``module`` compute its activations again in the backward pass, or keep them."""
    for part in module.modules():
        if isinstance(part, TransformerBlock | ConvBlock):
            part.checkpointing = enable


class PatchEmbed(nn.Module):
    """Strided convolution without overlap, as one matrix product, then LayerNorm over channels and GELU (ConvMAE).

    The weight lives in ``proj`` with a convolution's layout and default initialization.
    """

    def __init__(self, in_dim: int, dim: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, stride, stride)
        self.norm = nn.LayerNorm(dim, eps=CONV_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """[..., a, b, C] -> [..., a/stride, b/stride, D]: dense or visible, channels last."""
        return F.gelu(self.norm(strided_conv(self.proj, x)))


def strided_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution whose stride is its kernel side, on channels-last maps: [..., a, b, C] -> [..., a/s, b/s, D]."""
    *lead, a, b, C = x.shape
    s = conv.stride[0]
    cells = x.reshape(*lead, a // s, s, b // s, s, C).transpose(-4, -3).reshape(*lead, a // s, b // s, s * s * C)
    return F.linear(cells, conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)


def init_linear(module: nn.Module) -> None:
    """MAE's initialization of one module: nn.Linear xavier-uniform, zero bias; all else keeps PyTorch's default."""
    if isinstance(module, nn.Linear) and not isinstance(module, PointwiseConv):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_flattened(conv: nn.Conv2d) -> None:
    """Xavier-uniform of a convolution seen as the linear layer it is; its bias keeps PyTorch's default."""
    nn.init.xavier_uniform_(conv.weight.view(conv.weight.shape[0], -1))
