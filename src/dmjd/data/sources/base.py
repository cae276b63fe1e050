"""What every source of images is."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dmjd.images.decoding import ImageLike
from dmjd.images.reading import OpenImage, open_image


class Source(ABC):
    """An indexed set of images, with labels or without; picklable, so that worker processes can have it.

    A new kind of source sets the attributes and defines ``__len__``, ``stored`` and ``describe``.

    Attributes:
        name: what the user called it. in_chans, value_range: see :func:`~dmjd.images.reading.read_image`.
        labels: [n] int64 indices into ``classes``, or None. classes: names, empty without labels.
    """

    name: str
    in_chans: int = 3
    value_range: tuple[float, float] | None = None
    labels: np.ndarray | None = None
    classes: list[str]

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def stored(self, index: int) -> ImageLike:
        """Image ``index`` as it is kept: a path, encoded bytes, a PIL image or an array."""

    @abstractmethod
    def describe(self, index: int) -> str:
        """What messages call image ``index``: its path, or "row 17 of x.parquet"."""

    def read(self, index: int) -> np.ndarray:
        """Image ``index``: [H, W, in_chans] uint8 or float32 on the 0..255 scale.

        Raises:
            UnreadableImage: if it can't be used.
        """
        return self.open(index).read()

    def open(self, index: int) -> OpenImage:
        """Image ``index``, of known size but not always decoded yet.

        Raises:
            UnreadableImage: if it can't be used.
        """
        return open_image(self.stored(index), self.in_chans, self.value_range, self.describe(index))

    def save_listing(self, file: Path) -> None:  # noqa: B027 (most sets have nothing to keep)
        """Keep what had to be searched for in a file of the run; nothing for sets that need no search."""

    def fingerprint(self) -> str:
        """Short hash that changes when images come, go or change size; the same wherever the set lies."""
        return short_hash([str(len(self)), *self._identity()])

    def _identity(self) -> Iterable[str]:
        """The strings that tell this set from another of the same length."""
        return [self.name]


def short_hash(parts: Iterable[str]) -> str:
    """12 hexadecimal digits of a sequence of strings."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()[:12]
