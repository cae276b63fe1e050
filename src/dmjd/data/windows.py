"""The order of a set larger than its cache: shards are shuffled and cut into windows, whose images are shuffled.

Like every order of this package it is a function of seed and epoch, so that training can begin at any sample.
"""

import warnings
from collections.abc import Generator, Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from dmjd.data.order import Permutations
from dmjd.rng import STREAM_EPOCH, STREAM_SHARD, hash64
from dmjd.warning import DMJDWarning


class ShardStore(Protocol):
    """Where shards, which are numbered, come from."""

    def need(self, shards: Iterable[int]) -> None:
        """Keep these shards, present or fetched later, from now on, and no others."""

    def fetch(self, shards: Sequence[int]) -> Generator[None, None, None]:
        """Fetch the shards that are missing; yields after each."""

    def arrived(self, shards: Sequence[int]) -> int:
        """The bytes of the shards that are here so far."""


class ShardWindows(NamedTuple):
    """The shards of a set whose images are shuffled window by window.

    Attributes:
        lengths: images of each shard, in the order of the set.
        size: shards whose images are shuffled together.
        store: fetches the shards while they are read; None: all are on this machine.
    """

    lengths: tuple[int, ...]
    size: int
    store: ShardStore | None = None

    def of_rows(self, rows: np.ndarray) -> "ShardWindows":
        """The windows of a subset of the images, given by their indices in ascending order [m]."""
        ends = np.searchsorted(rows, np.cumsum(self.lengths))
        return self._replace(lengths=tuple(np.diff(ends, prepend=0).tolist()))

    def warn_if_below(self, batch_size: int) -> None:
        """Warn if a step has more images than a window holds on average, unless one window holds all."""
        filled = sum(map(bool, self.lengths))
        held = self.size * sum(self.lengths) / max(1, filled)
        if batch_size > held and self.size < filled:
            warnings.warn(
                f"a step takes {batch_size} images, and a window of {self.size} shard(s) holds {held:.0f}: most are "
                "fetched one by one, which is slow. Begin a run with a larger --cache-gb, or a smaller --batch-size",
                DMJDWarning,
                stacklevel=3,
            )


class WindowedPermutations(Permutations):
    """Permutations of the images of a set, window by window.

    Windows are counted over all epochs. In each epoch, shards without images are in none.
    """

    def __init__(self, seed: int, windows: ShardWindows) -> None:
        super().__init__(seed, sum(windows.lengths))
        self._windows, self._lengths = windows, torch.tensor(windows.lengths)
        self._filled = self._lengths.nonzero()[:, 0]
        self._per_epoch = -(-len(self._filled) // windows.size)

    def draw(self, ordinals: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Permutations.draw`."""
        epochs, positions = ordinals // self._length, ordinals % self._length
        indices = torch.empty_like(ordinals)
        for epoch in epochs.unique().tolist():
            here = epochs == epoch
            indices[here] = self._order(epoch)[positions[here]]
        return epochs, indices

    def window(self, ordinal: int) -> int:
        """The number of the window that a position in the sequence of permutations lies in."""
        epoch, position = divmod(ordinal, self._length)
        shards = self._shards(epoch)
        ends = self._lengths[shards].cumsum(0)[self._windows.size - 1 :: self._windows.size].contiguous()
        return epoch * self._per_epoch + int(torch.searchsorted(ends, position, right=True))

    def shards(self, window: int) -> list[int]:
        """The shards of a window."""
        epoch, number = divmod(window, self._per_epoch)
        size = self._windows.size
        return self._shards(epoch)[number * size : (number + 1) * size].tolist()

    def _shards(self, epoch: int) -> Tensor:
        """The order of the shards."""
        return self._filled[hash64(STREAM_SHARD, self._seed, epoch, self._filled).argsort()]

    def _permutation(self, epoch: int) -> Tensor:
        window_of = torch.zeros(len(self._lengths), dtype=torch.int64)
        window_of[self._shards(epoch)] = torch.arange(len(self._filled)) // self._windows.size
        windows = window_of.repeat_interleave(self._lengths)
        order = hash64(STREAM_EPOCH, self._seed, epoch, torch.arange(self._length)).argsort()
        return order[windows[order].argsort(stable=True)]
