"""The order in which images are drawn: permutations of each source, and the interleaving of several sources.

Both are functions of the number of a sample, so that training can begin at any one without saved state.
"""

import heapq
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dmjd.rng import STREAM_EPOCH, hash64

_WHOLE = 1 << 30  # what weights are fractions of, as integers; products with positions fit in 64 bits


class Part(NamedTuple):
    """A source in a mixture: its number of images, and its weight, the share of the samples; None: see shares."""

    length: int
    weight: float | None = None


def shares(parts: Sequence[Part]) -> list[float]:
    """The share of the samples that is drawn from each part; they sum to 1.

    Parts without a weight share what is left in proportion to their numbers of images. If all have one, the weights are
    divided by their sum.
    """
    given = sum(part.weight for part in parts if part.weight is not None)
    images = sum(part.length for part in parts if part.weight is None)
    if not images:
        return [(part.weight or 0) / given for part in parts]
    return [(1 - given) * part.length / images if part.weight is None else part.weight for part in parts]


class Permutations:
    """The images of one source, in an endless sequence of permutations: its epochs.

    Args:
        seed: seed of the order.
        length: number of images.
        first: index of the first one in the set.
    """

    def __init__(self, seed: int, length: int, first: int = 0) -> None:
        self._seed, self._length, self._first = seed, length, first
        self._recent: dict[int, Tensor] = {}  # epoch -> its order; two of them, of 8 bytes per image

    def draw(self, ordinals: Tensor) -> tuple[Tensor, Tensor]:
        """Ascending positions in the sequence [b] int64 -> epochs [b] and indices into the set [b], int64."""
        epochs, positions = ordinals // self._length, ordinals % self._length
        begin, end = int(epochs[0]), int(epochs[-1]) + 1
        if end - begin > 2:  # a set that is smaller than the batch
            orders = permutation(self._seed, torch.arange(begin, end)[:, None], self._length, self._first)
            return epochs, orders[epochs - begin, positions] + self._first
        indices = torch.empty_like(ordinals)
        for epoch in range(begin, end):
            here = epochs == epoch
            indices[here] = self._order(epoch)[positions[here]]
        return epochs, indices + self._first

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._recent:
            former = {e: order for e, order in self._recent.items() if e == epoch - 1}
            self._recent = former | {epoch: self._permutation(epoch)}
        return self._recent[epoch]

    def _permutation(self, epoch: int) -> Tensor:
        """The order of an epoch."""
        return permutation(self._seed, epoch, self._length, self._first)


def permutation(seed: int, epoch: int | Tensor, n: int, first: int = 0) -> Tensor:
    """The order of an epoch of the images from ``first`` on: [n] int64 from 0; for epochs [e, 1], [e, n]."""
    return hash64(STREAM_EPOCH, seed, epoch, torch.arange(first, first + n)).argsort(dim=-1)


class Joined(NamedTuple):
    """Images that belong to a source from an epoch on: the index of the first one in the set, and their number."""

    epoch: int
    first: int
    length: int


class GrowingPermutations:
    """:class:`Permutations` of a source that images join: an epoch is as long as there are images.

    Args:
        seed, length, first: see :class:`Permutations`; of the images that the source began with.
        look: called with each epoch from 1 on, once and before its first image is drawn, which calls :meth:`join` if
            there are new images.
    """

    def __init__(self, seed: int, length: int, first: int, look: Callable[[int], None]) -> None:
        self._seed, self._look = seed, look
        self._joined = [Joined(0, first, length)]
        self._spans = [(0, 0, length)]  # from a position on: position, epoch, length of an epoch
        self._fixed = 0  # the last epoch whose images are known
        self._recent: dict[int, Tensor] = {}  # epoch -> its order

    def join(self, joined: Joined) -> None:
        """Add images from an epoch on, which must not come before those of an earlier call."""
        self._fixed = max(self._fixed, joined.epoch)
        if not joined.length:
            return
        start, epoch, length = self._spans[-1]
        if joined.epoch <= epoch:
            raise ValueError(f"images join at epoch {joined.epoch}, after those of epoch {epoch}")
        self._joined.append(joined)
        self._spans.append((start + (joined.epoch - epoch) * length, joined.epoch, length + joined.length))

    def reach(self, first: int, last: int) -> None:
        """Fix the images of each epoch up to that of position ``last``; all before position ``first`` were drawn."""
        if first > 0:
            self._fixed = max(self._fixed, self._epoch_of(first - 1))
        while self._fixed < self._epoch_of(last):
            epoch = self._fixed + 1
            self._look(epoch)
            self._fixed = epoch

    def _epoch_of(self, position: int) -> int:
        return int(self._locate(torch.tensor([position]))[0])

    def _locate(self, ordinals: Tensor) -> tuple[Tensor, Tensor]:
        """Positions in the sequence [b] -> epochs [b] and positions in them [b]."""
        starts, epochs, lengths = torch.tensor(self._spans).T.contiguous()
        span = torch.searchsorted(starts, ordinals, right=True) - 1
        inside = ordinals - starts[span]
        return epochs[span] + inside // lengths[span], inside % lengths[span]

    def draw(self, ordinals: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Permutations.draw`; :meth:`reach` has been called for these positions."""
        epochs, positions = self._locate(ordinals)
        indices = torch.empty_like(ordinals)
        for epoch in epochs.unique().tolist():
            here = epochs == epoch
            indices[here] = self._order(epoch)[positions[here]]
        return epochs, indices

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._recent:
            images = torch.cat(
                [torch.arange(one.first, one.first + one.length) for one in self._joined if one.epoch <= epoch]
            )
            order = images[hash64(STREAM_EPOCH, self._seed, epoch, images).argsort()]
            former = {e: order for e, order in self._recent.items() if e == epoch - 1}
            self._recent = former | {epoch: order}
        return self._recent[epoch]


class Interleaving:
    """Which source each sample is drawn from, evenly spread over any stretch of samples.

    Two sources: of any number of samples in a row, each source has its share to within one. More: sources are joined in
    pairs, the rarest first as in Huffman's code, and the rule holds for the two parts of each pair. A source's error is
    then less than the sum of its size relative to itself and to the pairs around it but the whole, whose sizes grow
    like Fibonacci's numbers: 1 + 1 + 1/2 + 1/3 + 1/5 + ... < 3.36. If no source has a weight, as many samples as there
    are images hold each image once.

    Args:
        parts: the sources, at least two.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        sizes = [part.length for part in parts]
        if any(part.weight is not None for part in parts) or sum(sizes) > 2 * _WHOLE:
            sizes = [max(1, round(share * _WHOLE)) for share in shares(parts)]
        heap: list[tuple[int, int, _Pair | int]] = [(size, i, i) for i, size in enumerate(sizes)]
        heapq.heapify(heap)
        while len(heap) > 1:
            (small, one, left), (large, other, right) = heapq.heappop(heap), heapq.heappop(heap)
            heapq.heappush(heap, (small + large, min(one, other), _Pair(left, right, small, small + large)))
        self._tree = heap[0][2]

    def place(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Sample numbers [b] int64 -> number of the source [b], and how many samples of it come before [b]; int64."""
        return _place(self._tree, numbers)


class _Pair(NamedTuple):
    """Two sources or pairs. Of ``whole`` samples in a row, ``part`` are of the left one."""

    left: "_Pair | int"
    right: "_Pair | int"
    part: int
    whole: int

    def before(self, numbers: Tensor) -> Tensor:
        """How many of the first samples are of the left one, for numbers of samples [b]: the nearest integers."""
        rounds, rest = numbers // self.whole, numbers % self.whole
        return rounds * self.part + (rest * self.part + self.whole // 2) // self.whole


def _place(node: _Pair | int, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """See :meth:`Interleaving.place`."""
    if isinstance(node, int):
        return torch.full_like(numbers, node), numbers
    left = node.before(numbers)
    is_left = node.before(numbers + 1) > left
    sources, ordinals = torch.empty_like(numbers), torch.empty_like(numbers)
    for child, here, inside in ((node.left, is_left, left), (node.right, ~is_left, numbers - left)):
        sources[here], ordinals[here] = _place(child, inside[here])
    return sources, ordinals
