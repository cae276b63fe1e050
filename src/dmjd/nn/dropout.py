"""Stochastic depth and channel dropout drawn from image keys.

torch draws them from a generator, so that what an image loses depends on its position in the batch, on the number of
processes and on accumulation. Here it is a function of the image's key and of the layer.
"""

import torch
from torch import Tensor, nn

from dmjd.rng import STREAM_DROPOUT, at_least, hash64


class KeyedDropout(nn.Module):
    """Base of layers that drop parts of a row in training.

    A forward pass in training uses the bits that :func:`set_row_keys` gave it, once. Without them, it draws from
    torch's generator.

    Args:
        rate: probability of dropping, in [0, 1).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.bits: Tensor | None = None  # [R] int64

    def row_bits(self, x: Tensor) -> Tensor:
        """[R] int64 hashes, one for each row of ``x``: those of :func:`set_row_keys`, or new random ones."""
        bits, self.bits = self.bits, None
        if bits is None:
            return torch.randint(-(2**63), 2**63 - 1, (len(x),), device=x.device)
        if len(bits) != len(x):
            raise ValueError(f"row keys were set for {len(bits)} rows, the input has {len(x)}")
        return bits

    def _scale(self, x: Tensor, bits: Tensor) -> Tensor:
        """``x`` with dropped entries zero and others divided by the probability of keeping them."""
        kept = at_least(bits, self.rate).to(x.dtype) / (1 - self.rate)
        return x * kept.view(kept.shape + (1,) * (x.dim() - kept.dim()))

    def extra_repr(self) -> str:
        """The rate, for ``print``."""
        return f"rate={self.rate:g}"


class DropPath(KeyedDropout):
    """Stochastic depth (Huang et al. 2016): drops whole rows of a residual branch, [R, ...] of any shape."""

    def forward(self, x: Tensor) -> Tensor:
        """[R, ...] -> the same shape."""
        return self._scale(x, self.row_bits(x)) if self.training and self.rate else x


class ChannelDropout(KeyedDropout):
    """Drops whole channels of each row, as ``nn.Dropout2d`` does."""

    def forward(self, x: Tensor) -> Tensor:
        """[R, C, h, w] -> the same shape."""
        if not (self.training and self.rate):
            return x
        channels = torch.arange(x.shape[1], device=x.device)
        return self._scale(x, hash64(self.row_bits(x)[:, None], channels))


def active_dropouts(module: nn.Module) -> list[KeyedDropout]:
    """The layers in ``module`` that drop something in the next forward pass."""
    return [m for m in module.modules() if isinstance(m, KeyedDropout) and m.training and m.rate]


def set_row_keys(module: nn.Module, keys: Tensor) -> None:
    """Say which image each row of the next forward pass shows.

    Args:
        module: holds :class:`KeyedDropout` layers; each draws differently.
        keys: [R] int64, on the module's device.
    """
    layers = active_dropouts(module)
    if layers:
        numbers = torch.arange(len(layers), device=keys.device)
        for layer, bits in zip(layers, hash64(STREAM_DROPOUT, keys, numbers[:, None]), strict=True):
            layer.bits = bits
