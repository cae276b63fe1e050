"""Maps at four resolutions from any encoder, and the decoders that read them.

ConvViT has three of its own (its stages) and gets a coarser one; ViT's last map is brought to four by up- and
downsampling, the simple feature pyramid of ViTDet (Li et al. 2022). Shapes: B image, D width, h, w token grid.
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork

from dmjd.encoders.base import Encoder

LEVELS = 4

CELLS = 4  # of ConvViT's first stage on a side of a token

_GROUP = 16  # channels of a group norm's group, where the width allows

_POOLS = (1, 2, 3, 6)  # pyramid pooling's, in cells a side


def strides_of(encoder: Encoder) -> list[float]:
    """Pixels of a cell of each of a :class:`Pyramid`'s maps, finest first.

    The finest has a quarter of the patch. A plain ViT of a patch below 16 is upsampled less: 4 pixels, or the patch.
    """
    P = encoder.patch_size
    finest = P / CELLS if encoder.scales else P / 2 ** min(2, max(0, math.floor(math.log2(P / 4))))
    return [finest * 2**level for level in range(LEVELS)]


class EncoderMaps(nn.Module):
    """An encoder whose maps are used, not its tokens.

    Args:
        encoder: any. frozen: keep its weights and run it in evaluation mode.

    Attributes:
        widths: channels of the maps given, finest first. strides: pixels of a cell of each.
    """

    widths: list[int]
    strides: list[float]

    def __init__(self, encoder: Encoder, frozen: bool = False) -> None:
        super().__init__()
        self.encoder, self.frozen = encoder, frozen
        encoder.norm.requires_grad_(False)  # of pre-training; the maps have norms of their own
        if frozen:
            encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> "EncoderMaps":
        """Training mode, but for an encoder that is frozen."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def encode(self, images: Tensor, count: int) -> list[Tensor]:
        """The last ``count`` maps [B, width, h, w] of normalized images [B, C, H, W]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.encoder.forward_intermediates(images, indices=count, intermediates_only=True)  # type: ignore[operator]
        return list(maps)


class LastMap(EncoderMaps):
    """The encoder's own last map, normalized."""

    def __init__(self, encoder: Encoder, frozen: bool = False) -> None:
        super().__init__(encoder, frozen)
        self.widths, self.strides = [encoder.embed_dim], [float(encoder.patch_size)]
        self.norm = LayerNorm2d(encoder.embed_dim)

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, C, H, W] normalized -> one map [B, D, h, w]."""
        return [self.norm(self.encode(images, 1)[0])]


class Pyramid(EncoderMaps):
    """Four normalized maps, each half as fine as the one before; see :func:`strides_of`."""

    def __init__(self, encoder: Encoder, frozen: bool = False) -> None:
        super().__init__(encoder, frozen)
        P, D = encoder.patch_size, encoder.embed_dim
        self.strides = strides_of(encoder)
        stages = [P / cells for _, cells in encoder.scales]  # the encoder's own maps need no resizing
        factors = [1.0 if stride in stages else P / stride for stride in self.strides]
        own = [width for width, _ in encoder.scales]
        self.widths = own + [D // int(max(1, factor)) for factor in factors[len(own) :]]
        self.resize = nn.ModuleList(_resize(D, factor) for factor in factors)
        self.norms = nn.ModuleList(LayerNorm2d(width) for width in self.widths)

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, C, H, W] normalized, sides divisible by the patch -> four maps [B, width, H / stride, W / stride]."""
        maps = self.encode(images, 1 + len(self.encoder.scales))
        maps += [maps[-1]] * (LEVELS - len(maps))
        resized = (resize(x) for resize, x in zip(self.resize, maps, strict=True))
        return [norm(x) for norm, x in zip(self.norms, resized, strict=True)]


def _resize(width: int, factor: float) -> nn.Module:
    """ViTDet's: one or two deconvolutions up, each halving the width; max pooling down."""
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
    """A norm that, unlike batch norm, is the same for any batch and any number of processes."""
    return nn.GroupNorm(width // math.gcd(width, _GROUP), width)


class UPerNet(nn.Module):
    """Unified perceptual parsing's decoder (Xiao et al. 2018): pyramid pooling of the coarsest map, a feature pyramid
    network, and all levels fused at the finest.

    Args:
        widths: of the maps, finest first. dim: of the decoder, a multiple of 16. num_classes: K.
    """

    def __init__(self, widths: list[int], dim: int, num_classes: int) -> None:
        super().__init__()
        top = widths[-1]
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), Conv2dNormActivation(top, dim // 4, 1, norm_layer=group_norm))
            for side in _POOLS
        )
        self.pooled = Conv2dNormActivation(top + len(_POOLS) * (dim // 4), dim, 3, norm_layer=group_norm)
        self.fpn = FeaturePyramidNetwork([*widths[:-1], dim], dim, norm_layer=group_norm)
        self.fuse = Conv2dNormActivation(len(widths) * dim, dim, 3, norm_layer=group_norm)
        self.classify = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(dim, num_classes, 1))

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps [B, width, h, w], finest first -> logits [B, K, h, w] of the finest."""
        top = maps[-1]
        pools = [_resized(pool(top), top) for pool in self.pools]
        top = self.pooled(torch.cat([top, *pools], dim=1))
        levels = self.fpn(OrderedDict((str(i), x) for i, x in enumerate([*maps[:-1], top]))).values()
        fused = self.fuse(torch.cat([_resized(x, maps[0]) for x in levels], dim=1))
        return self.classify(fused)


class LinearDecoder(nn.Module):
    """One linear layer on the encoder's own last map: what the features hold, and little learned besides.

    Args:
        width: of the map. num_classes: K.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """[map [B, width, h, w]] -> logits [B, K, h, w]."""
        return self.classify(maps[0])


def _resized(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)
