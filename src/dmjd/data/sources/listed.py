"""Sets whose images have names that a run records, and whose sizes tell whether they are still the same."""

from abc import abstractmethod
from collections.abc import Iterable

import numpy as np

from dmjd.data.sources.base import Changes, Source, short_hash

_SIZES_IN_FINGERPRINT = 256


class ListedSource(Source):
    """A set whose fingerprint holds all names and the sizes of some images.

    All sizes would take minutes to read on a network drive.
    """

    _listed_sizes: list[int] | None = None  # those of the sampled images when the run began, if its listing was read

    def changes(self, fingerprint: str) -> Changes | None:
        """See :meth:`Source.changes`. Only the images whose sizes are in the fingerprint are compared."""
        if (same := super().changes(fingerprint)) is not None:
            return same
        if self._listed_sizes is None or short_hash([str(len(self)), *self._parts(self._listed_sizes)]) != fingerprint:
            return None
        sampled = list(zip(self._sampled(), self._listed_sizes, self._sizes(), strict=True))
        return Changes([self.describe(index) for index, before, now in sampled if before != now], len(sampled))

    @abstractmethod
    def _name_of(self, index: int) -> str:
        """What the fingerprint knows an image by."""

    @abstractmethod
    def _sizes(self) -> Iterable[int]:
        """Bytes of the :meth:`_sampled` images; -1 for one that is missing."""

    def _sampled(self) -> list[int]:
        """The images whose sizes are in the fingerprint."""
        count = min(len(self), _SIZES_IN_FINGERPRINT)
        return [int(i) for i in np.linspace(0, len(self) - 1, count).astype(int)]

    def _identity(self) -> Iterable[str]:
        return self._parts(self._sizes())

    def _parts(self, sizes: Iterable[int]) -> Iterable[str]:
        yield from map(self._name_of, range(len(self)))
        yield from map(str, sizes)
