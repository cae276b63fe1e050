"""Unreadable images: each is replaced by another and counted once."""

import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import TypeVar

import torch
from torch import Tensor

from dmjd.data.order import Part
from dmjd.images.stored import UnreadableImage
from dmjd.rng import STREAM_REPLACE, hash64

_ATTEMPTS = 100

_SHOWN = 5  # an error on the command line has at most ten lines

Report = tuple[str, str]  # name and reason

MISSING = "no such file or directory"  # the reason of an image that was removed

T = TypeVar("T")


def replacement(indices: Tensor, keys: Tensor, attempt: int, num_images: int, parts: Sequence[Part] = ()) -> Tensor:
    """[B] int64 indices and keys -> [B] int64: what replaces unreadable images at this attempt (from 0).

    An image of a mixture is replaced by one of the same source, so that the sources keep their weights; after half of
    the attempts by any.
    """
    numbers = hash64(STREAM_REPLACE, keys, attempt)
    if len(parts) < 2 or attempt >= _ATTEMPTS // 2:
        return numbers % num_images
    lengths = torch.tensor([part.length for part in parts], device=indices.device)
    ends = lengths.cumsum(0)
    own = torch.searchsorted(ends, indices, right=True)
    return ends[own] - lengths[own] + numbers % lengths[own]


def read_or_replace(
    read: Callable[[int], T],
    index: int,
    key: int,
    num_images: int,
    parts: Sequence[Part] = (),
    home: int | None = None,
) -> tuple[T, list[Report]]:
    """Read an image, or the first readable one among the replacements drawn from its key.

    Args:
        read: reads the image of an index.
        index: of the image. key: of the image, for its replacements.
        num_images: size of the set. parts: the sources of a mixture; see :func:`replacement`.
        home: an image of the source that gives the replacements; None: that of ``index``.

    Returns:
        The result of ``read``, and (name, reason) of each image that could not be read.

    Raises:
        UnreadableImage: if a hundred attempts fail.
    """
    unreadable: list[Report] = []
    for attempt in range(_ATTEMPTS):
        try:
            return read(index), unreadable
        except UnreadableImage as error:
            unreadable.append((error.name, error.reason))
        former = index if home is None or attempt else home
        index = int(replacement(torch.tensor([former]), torch.tensor([key]), attempt, num_images, parts))
    raise _nothing_readable(unreadable)


def replace_unreadable(indices: Tensor, keys: Tensor, readable: Tensor, parts: Sequence[Part] = ()) -> Tensor:
    """Apply the rule of :func:`read_or_replace` to many images at once, if it is known which are readable.

    Args:
        indices: [B] int64.
        keys: [B] int64.
        readable: [n] bool.
        parts: the sources of a mixture.

    Returns:
        [B] int64, all readable.
    """
    for attempt in range(_ATTEMPTS):
        unreadable = ~readable[indices]
        if not unreadable.any():
            return indices
        others = replacement(indices, keys, attempt, len(readable), parts)
        indices = torch.where(unreadable, others, indices)
    raise _nothing_readable([])


def _nothing_readable(unreadable: list[Report]) -> UnreadableImage:
    name, reason = unreadable[0] if unreadable else ("the set", "")
    return UnreadableImage(name, f"{reason}; and every image tried in its place is unreadable".lstrip("; "))


def _allowed(max_unreadable: float | None, num_images: int) -> int:
    return max(10, math.ceil(num_images / 100)) if max_unreadable is None else tolerated(max_unreadable, num_images)


def tolerated(max_unreadable: float, num_images: int) -> int:
    """A number of images, given as such or as a share below 1."""
    if max_unreadable >= 1:
        return int(max_unreadable)
    return math.floor(Fraction(str(max_unreadable)) * num_images)  # in floats 0.29 of 100 is less than 29


class UnreadableImages:
    """The unreadable images of a run, each counted once.

    Args:
        known: (name, reason) pairs to start with, from ``reports`` of an interrupted run.
        removed: names of images that were removed because they were unreadable; they do not count as too many.
    """

    def __init__(self, known: Iterable[Report] = (), removed: Iterable[str] = ()) -> None:
        self._reasons = dict(known)
        self._removed = set(removed)

    @property
    def reports(self) -> list[Report]:
        """(name, reason) of each image, in the order in which they were found."""
        return list(self._reasons.items())

    @property
    def count(self) -> int:
        """The number of unreadable images."""
        return len(self._reasons)

    def add(self, reports: Iterable[Report]) -> list[Report]:
        """Add reports; returns those that are new."""
        new = []
        for name, reason in reports:
            if name not in self._reasons:
                self._reasons[name] = reason
                new.append((name, reason))
        return new

    def add_and_warn(self, reports: Iterable[Report], warn: Callable[[str], None]) -> None:
        """Add reports, and warn about each new one."""
        for name, reason in self.add(reports):
            warn(f"unreadable, replaced by another image: {name}: {reason}")

    def exceed(self, max_unreadable: float | None, num_images: int) -> bool:
        """Whether there are more than tolerated; arguments as for :meth:`check`."""
        return len(self._counted()) > _allowed(max_unreadable, num_images)

    def check(self, max_unreadable: float | None, num_images: int, cure: str = "Repair or remove them.") -> None:
        """Raise an error if too many images are unreadable.

        Args:
            max_unreadable: largest number allowed, or a share below 1; None: the larger of 10 and 1 % of the set.
            num_images: size of the set.
            cure: what to do about unreadable images, the last line of the error.

        Raises:
            ValueError: listing the first five.
        """
        if not self.exceed(max_unreadable, num_images):
            return
        counted = self._counted()
        lines = [f"  {name}: {reason}" for name, reason in counted[:_SHOWN]]
        if len(counted) > _SHOWN:
            lines.append(f"  and {len(counted) - _SHOWN} more")
        raise ValueError(
            f"{len(counted)} of {num_images} images can't be read, more than max_unreadable = "
            f"{_allowed(max_unreadable, num_images)}:\n" + "\n".join(lines) + f"\n{cure}"
        )

    def _counted(self) -> list[Report]:
        """All but those that were removed."""
        return [(name, reason) for name, reason in self._reasons.items() if name not in self._removed]

    def cure(self, removable: bool) -> str:
        """What to do if too many images of a pre-training run are unreadable.

        Args:
            removable: whether the run goes on after images were removed.
        """
        missing = all(reason == MISSING for _, reason in self._counted())
        what = "Put them back" if missing else "Repair or remove them" if removable else "Repair them"
        return f"{what}, or raise --max-unreadable; the same command goes on."
