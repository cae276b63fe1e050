"""A subset of a source."""

from collections.abc import Iterable, Sequence

import numpy as np

from dmjd.data.order import Part
from dmjd.data.sources.base import Source
from dmjd.images.decoding import ImageLike
from dmjd.images.reading import OpenImage


class SubsetSource(Source):
    """The images ``rows`` of a source, with its classes.

    Args:
        source: the whole set.
        rows: [m] indices into it, in the order of the subset.
        parts: what the rows are of each source of a mixture, if they are to be drawn by its weights.
        trained: whether the rows, in ascending order, are those to train on: their shards are fetched ahead.
    """

    def __init__(
        self, source: Source, rows: Sequence[int] | np.ndarray, parts: tuple[Part, ...] = (), trained: bool = False
    ) -> None:
        self.source, self.rows, self.parts = source, np.asarray(rows, dtype=np.int64), parts
        self.name, self.in_chans, self.value_range = source.name, source.in_chans, source.value_range
        self.classes, self.split, self.invalid = source.classes, source.split, source.invalid
        self.labels = None if source.labels is None else source.labels[self.rows]
        self.windows = source.windows.of_rows(self.rows) if trained and source.windows is not None else None

    @property
    def title(self) -> str:
        """That of the whole set."""
        return self.source.title

    def __len__(self) -> int:
        return len(self.rows)

    def stored(self, index: int) -> ImageLike:
        """Image ``rows[index]`` as the source stores it."""
        return self.source.stored(int(self.rows[index]))

    def prepare(self, indices: Iterable[int]) -> None:
        """:meth:`Source.prepare` of the source."""
        self.source.prepare(self.rows[list(indices)].tolist())

    def open(self, index: int) -> OpenImage:
        """Image ``rows[index]``, opened by the source."""
        return self.source.open(int(self.rows[index]))

    def read(self, index: int) -> np.ndarray:
        """Image ``rows[index]``, decoded by the source."""
        return self.source.read(int(self.rows[index]))

    def describe(self, index: int) -> str:
        """The name of image ``rows[index]`` in messages."""
        return self.source.describe(int(self.rows[index]))

    def _identity(self) -> Iterable[str]:
        return [self.source.fingerprint(), self.rows.tobytes().hex()]


def labeled_images(source: Source) -> Source:
    """The images that have a label, of a set where some may have none; sets without any labels are left as they are."""
    if source.labels is None or not (source.labels < 0).any():
        return source
    return SubsetSource(source, np.flatnonzero(source.labels >= 0))
