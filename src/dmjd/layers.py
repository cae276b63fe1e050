"""What timm.layers lacks: the masked convolution block of ConvViT, dense and visible-only, and initialisation.

Convolutional stages keep channels last. A *dense* map is [B, H, W, D]; a *visible* map is [R, V, s, s, D]: for each
of R rows (views times images) V visible tokens of s x s cells. Everything but the depthwise convolution is pointwise
or confined to one token, so it is written once for both forms.
"""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from dmjd.tokens import gather_tokens

CONV_NORM_EPS = 1e-5
TRANSFORMER_NORM_EPS = 1e-6

TransformerNorm = partial(nn.LayerNorm, eps=TRANSFORMER_NORM_EPS)
# How the 5 x 5 depthwise convolution is applied to a map of either form.
Depthwise = Callable[[nn.Conv2d, Tensor], Tensor]


def transformer_block(dim: int, num_heads: int, mlp_ratio: float, drop_path: float = 0.0) -> Block:
    """timm's pre-norm block with MAE's settings (qkv bias, eps 1e-6): [B, N, D] -> [B, N, D]."""
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"{num_heads} attention heads do not divide the width {dim}")
    norm = cast(type[nn.Module], TransformerNorm)  # timm wants a class; any maker of modules does
    return Block(dim, num_heads, mlp_ratio, qkv_bias=True, drop_path=drop_path, norm_layer=norm)


def block_flops(num_tokens: int, dim: int, mlp_ratio: float) -> int:
    """Twice a transformer block's multiply-adds: a token 4 D^2 (qkv, projection) + 2 r D^2 (MLP); attention 2 N^2 D."""
    per_token = 4 * dim * dim + 2 * int(mlp_ratio * dim) * dim
    return 2 * (num_tokens * per_token + 2 * num_tokens * num_tokens * dim)


class PointwiseConv(nn.Linear):
    """A 1 x 1 convolution on channels-last maps; its own class because it keeps PyTorch's default initialisation."""


class ConvMlp(nn.Module):
    """MLP of 1 x 1 convolutions on channels-last maps: [..., D] -> [..., D]."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = PointwiseConv(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = PointwiseConv(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape in and out."""
        return self.fc2(self.act(self.fc1(x)))


class ConvBlock(nn.Module):
    """Masked convolution block of ConvMAE (Gao et al. 2022): x + conv1x1(dwconv5x5(visible * conv1x1(LN(x)))), MLP.

    The depthwise convolution sees visible values only, so masked positions never influence visible ones.
    """

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
        x = x + self.drop_path(self.conv2(depthwise(self.dwconv, self.conv1(self.norm1(x)))))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def dense_depthwise(conv: nn.Conv2d, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Depthwise convolution of a dense map [B, H, W, D]; ``mask`` [B, H, W] bool hides cells (True = masked)."""
    if mask is not None:
        x = x.masked_fill(mask.unsqueeze(-1), 0.0)
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def visible_depthwise(conv: nn.Conv2d, x: Tensor, ids: Tensor, grid: tuple[int, int]) -> Tensor:
    """Depthwise convolution of a visible map [R, V, s, s, D] with its tokens in their places and zeros elsewhere.

    Args:
        conv: the depthwise convolution.
        x: [R, V, s, s, D]. ids: [R, V] int64 raster ids. grid: (h, w) tokens.

    Returns:
        [R, V, s, s, D].
    """
    R, _, s, _, D = x.shape
    h, w = grid
    rows = torch.arange(R, device=ids.device).unsqueeze(1)
    canvas = x.new_zeros(R, h * w, s, s, D).index_put((rows, ids), x)  # R, N, s, s, D
    canvas = canvas.view(R, h, w, s, s, D).transpose(2, 3).reshape(R, h * s, w * s, D)
    y = dense_depthwise(conv, canvas)  # R, h*s, w*s, D
    y = y.reshape(R, h, s, w, s, D).transpose(2, 3).reshape(R, h * w, s * s * D)
    return gather_tokens(y, ids).view_as(x)


class PatchEmbed(nn.Module):
    """Strided convolution without overlap, as one matrix product, then LayerNorm over channels and GELU (ConvMAE).

    The weight lives in ``proj`` with a convolution's layout and default initialisation.
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
    """MAE's initialisation of one module: nn.Linear xavier-uniform, zero bias; all else keeps PyTorch's default."""
    if isinstance(module, nn.Linear) and not isinstance(module, PointwiseConv):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_flattened(conv: nn.Conv2d) -> None:
    """Xavier-uniform of a convolution seen as the linear layer it is; its bias keeps PyTorch's default."""
    nn.init.xavier_uniform_(conv.weight.view(conv.weight.shape[0], -1))
