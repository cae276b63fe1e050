"""Feature maps at four resolutions from any encoder, and decoders on them.

An encoder's own maps are used if they have the right stride (ConvViT has three). The others are its last map, up- or
downsampled: the simple feature pyramid of ViTDet (Li et al. 2022). Shapes: B image, D width, h, w token grid.
"""

import math
from collections import OrderedDict
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork

from dmjd.encoders.base import Encoder
from dmjd.nn.dropout import ChannelDropout

LEVELS = 4

_GROUP_CHANNELS = 16  # per group of a group norm, if the width allows

_POOL_SIZES = (1, 2, 3, 6)  # of pyramid pooling, in cells per side


def strides_of(encoder: Encoder) -> list[float]:
    """Strides in pixels of the maps of a :class:`Pyramid`, finest first.

    The finest is the encoder's own, if it has maps of several strides. Otherwise it is a quarter of the patch, but at
    least 4 pixels, or the patch if that is smaller.
    """
    P, own = encoder.patch_size, _own_maps(encoder)
    finest = min(own) if len(own) > 1 else P / 2 ** min(2, max(0, math.floor(math.log2(P / 4))))
    return [finest * 2**level for level in range(LEVELS)]


def _own_maps(encoder: Encoder) -> dict[float, int]:
    """Stride in pixels -> index of the encoder's last map of that stride."""
    return {info["reduction"]: index for index, info in enumerate(encoder.feature_info)}


class EncoderMaps(nn.Module):
    """Base of the modules that turn images into feature maps of an encoder.

    Args:
        encoder: any encoder.
        frozen: do not train it, and run it in evaluation mode.

    Attributes:
        widths: channels of the maps, finest first.
        strides: their strides in pixels.
    """

    widths: list[int]
    strides: list[float]

    def __init__(self, encoder: Encoder, frozen: bool = False) -> None:
        super().__init__()
        self.encoder, self.frozen = encoder, frozen
        encoder.norm.requires_grad_(False)  # used in pre-training only; the maps have their own norms
        if frozen:
            encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> "EncoderMaps":
        """Set the training mode, except for a frozen encoder."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def encode(self, images: Tensor, indices: list[int]) -> list[Tensor]:
        """Maps [B, width, h, w] of the encoder for normalized images [B, C, H, W]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.encoder.forward_intermediates(images, indices=indices, intermediates_only=True)
        return cast(list[Tensor], maps)


class LastMap(EncoderMaps):
    """The encoder's last map, normalized."""

    def __init__(self, encoder: Encoder, frozen: bool = False) -> None:
        super().__init__(encoder, frozen)
        self.widths, self.strides = [encoder.embed_dim], [float(encoder.patch_size)]
        self.norm = LayerNorm2d(encoder.embed_dim)

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, C, H, W] normalized -> one map [B, D, h, w]."""
        return [self.norm(self.encode(images, [-1])[0])]


class Pyramid(EncoderMaps):
    """Four normalized maps, each of twice the stride of the one before; see :func:`strides_of`."""

    def __init__(self, encoder: Encoder, frozen: bool = False) -> None:
        super().__init__(encoder, frozen)
        self.strides, own, last = strides_of(encoder), _own_maps(encoder), encoder.feature_info[-1]
        self.sources = [own.get(stride, len(encoder.feature_info) - 1) for stride in self.strides]
        factors = [1.0 if stride in own else last["reduction"] / stride for stride in self.strides]
        widths = [encoder.feature_info[source]["num_chs"] for source in self.sources]
        self.widths = [width // int(max(1, factor)) for width, factor in zip(widths, factors, strict=True)]
        self.resize = nn.ModuleList(_resize(width, factor) for width, factor in zip(widths, factors, strict=True))
        self.norms = nn.ModuleList(LayerNorm2d(width) for width in self.widths)

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, C, H, W] normalized, sides divisible by the patch -> four maps [B, width, H / stride, W / stride]."""
        indices = sorted(set(self.sources))
        maps = dict(zip(indices, self.encode(images, indices), strict=True))
        resized = (resize(maps[source]) for resize, source in zip(self.resize, self.sources, strict=True))
        return [norm(x) for norm, x in zip(self.norms, resized, strict=True)]


def _resize(width: int, factor: float) -> nn.Module:
    """ViTDet's resizing: one or two deconvolutions up, each halving the width; max pooling down."""
    if factor == 1:
        return nn.Identity()
    if factor < 1:
        side = round(1 / factor)
        return nn.MaxPool2d(side, side, ceil_mode=True)
    up = nn.ConvTranspose2d(width, width // 2, 2, 2)
    if factor == 2:
        return up
    return nn.Sequential(up, LayerNorm2d(width // 2), nn.GELU(), nn.ConvTranspose2d(width // 2, width // 4, 2, 2))


def group_norm(width: int) -> nn.Module:
    """A norm that, unlike batch norm, does not depend on the batch or the number of processes."""
    return nn.GroupNorm(width // math.gcd(width, _GROUP_CHANNELS), width)


class UPerNet(nn.Module):
    """Decoder of unified perceptual parsing (Xiao et al. 2018).

    Pyramid pooling of the coarsest map, a feature pyramid network, and fusion of all levels at the finest one.

    Args:
        widths: channels of the maps, finest first.
        dim: width of the decoder, a multiple of 16.
        num_classes: K.
    """

    def __init__(self, widths: list[int], dim: int, num_classes: int) -> None:
        super().__init__()
        top = widths[-1]
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), Conv2dNormActivation(top, dim // 4, 1, norm_layer=group_norm))
            for side in _POOL_SIZES
        )
        self.pooled = Conv2dNormActivation(top + len(_POOL_SIZES) * (dim // 4), dim, 3, norm_layer=group_norm)
        self.fpn = FeaturePyramidNetwork([*widths[:-1], dim], dim, norm_layer=group_norm)
        self.fuse = Conv2dNormActivation(len(widths) * dim, dim, 3, norm_layer=group_norm)
        self.classify = nn.Sequential(ChannelDropout(0.1), nn.Conv2d(dim, num_classes, 1))

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps [B, width, h, w], finest first -> logits [B, K, h, w] of the finest."""
        top = maps[-1]
        pools = [_resized(pool(top), top) for pool in self.pools]
        top = self.pooled(torch.cat([top, *pools], dim=1))
        levels = self.fpn(OrderedDict((str(i), x) for i, x in enumerate([*maps[:-1], top]))).values()
        fused = self.fuse(torch.cat([_resized(x, maps[0]) for x in levels], dim=1))
        return self.classify(fused)


class LinearDecoder(nn.Module):
    """One linear layer on the encoder's last map, to measure the features with little learned on top.

    Args:
        width: channels of the map.
        num_classes: K.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """[map [B, width, h, w]] -> logits [B, K, h, w]."""
        return self.classify(maps[0])


def _resized(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)
