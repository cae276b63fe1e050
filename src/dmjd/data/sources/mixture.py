"""Several sources as one set, of which each may have a weight: the share of the samples that is drawn from it."""

from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from dmjd.data.order import Part, shares
from dmjd.data.sources.base import Changes, Source
from dmjd.data.unreadable import Report
from dmjd.images.decoding import ImageLike
from dmjd.images.reading import OpenImage
from dmjd.images.stored import UnreadableImage

_BETWEEN = "+"  # the fingerprints of the sources

_TRIED = 8  # images of each source, before a run


class MixtureSource(Source):
    """The images of several sources, one after the other.

    Classes are those of all sources, by name; there are labels if all of them have some.

    Args:
        sources: at least two.
        weights: the share of the samples of each source, or None; see :func:`~dmjd.data.order.shares`.

    Attributes:
        sources: the sources. starts: the index of the first image of each.
    """

    kind = "several sets"

    def __init__(self, sources: Sequence[Source], weights: Sequence[float | None]) -> None:
        self.sources = list(sources)
        self.name = ", ".join(source.name for source in sources)
        self.in_chans, self.value_range = sources[0].in_chans, sources[0].value_range
        self.split, self.invalid = sources[0].split, sources[0].invalid
        self.removable = all(source.removable for source in sources)
        lengths = [len(source) for source in sources]
        self.parts = tuple(Part(length, weight) for length, weight in zip(lengths, weights, strict=True))
        *self.starts, self._length = accumulate(lengths, initial=0)
        self.labels, self.classes = _joined_labels(self.sources)

    def __len__(self) -> int:
        return self._length

    def stored(self, index: int) -> ImageLike:
        """The image as its source stores it."""
        source, inside = self._locate(index)
        return source.stored(inside)

    def prepare(self, indices: Iterable[int]) -> None:
        """:meth:`Source.prepare` of the images of each source."""
        by_source: dict[int, list[int]] = {}
        for index in indices:
            number = bisect_right(self.starts, index) - 1
            by_source.setdefault(number, []).append(index - self.starts[number])
        for number, inside in by_source.items():
            self.sources[number].prepare(inside)

    def open(self, index: int) -> OpenImage:
        """The image, opened by its source."""
        source, inside = self._locate(index)
        return source.open(inside)

    def read(self, index: int) -> np.ndarray:
        """The image, decoded by its source."""
        source, inside = self._locate(index)
        return source.read(inside)

    def describe(self, index: int) -> str:
        """The name of the image in its source."""
        source, inside = self._locate(index)
        return source.describe(inside)

    def _locate(self, index: int) -> tuple[Source, int]:
        """A source, and the index of the image in it."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self.starts, index) - 1
        return self.sources[number], index - self.starts[number]

    def save_listing(self, file: Path) -> None:
        """Save the list of each source; see :func:`listing_of`."""
        for number, source in enumerate(self.sources):
            source.save_listing(listing_of(file, number))

    def fingerprint(self) -> str:
        """The fingerprints of the sources, joined."""
        return _BETWEEN.join(source.fingerprint() for source in self.sources)

    def content_sample(self) -> dict[int, str]:
        """See :meth:`Source.content_sample`; of each source."""
        pairs = zip(self.starts, self.sources, strict=True)
        return {start + i: digest for start, source in pairs for i, digest in source.content_sample().items()}

    def changes(self, fingerprint: str) -> Changes | None:
        """See :meth:`Source.changes`."""
        before = self.divided(fingerprint)
        found = [source.changes(one) for source, one in zip(self.sources, before, strict=True)] if before else [None]
        if None in found:
            return None
        every = [one for one in found if one is not None]
        return Changes([name for one in every for name in one.names], sum(one.compared for one in every))

    def divided(self, fingerprint: str) -> list[str]:
        """The fingerprints of the sources in a joined one; empty if it is that of other sources."""
        before = fingerprint.split(_BETWEEN)
        return before if len(before) == len(self.sources) else []

    def lines(self) -> list[str]:
        """A line about each source: its images, and how often they are drawn."""
        total = len(self)
        return [
            f"{source.title}: {part.length} images, {100 * share:.3g} % of the samples, each image "
            f"{share * total / part.length:.3g} times an epoch"
            for source, part, share in zip(self.sources, self.parts, shares(self.parts), strict=True)
        ]

    def check_readable(self) -> None:
        """Check that each source has readable images: among many others, its own would hardly be missed.

        Raises:
            ValueError: naming the source.
        """
        for source in self.sources:
            problems = []
            for index in np.unique(np.linspace(0, len(source) - 1, min(len(source), _TRIED)).astype(int)).tolist():
                try:
                    source.read(index)
                    break
                except UnreadableImage as error:
                    problems.append(error)
            else:
                raise ValueError(
                    f"none of the {len(problems)} images of {source.name} that were tried can be read, "
                    f"{problems[0].name} for one: {problems[0].reason}"
                )

    def check_remains(self, unreadable: Collection[Report]) -> None:
        """Check that each source has images left besides the unreadable ones, (name, reason).

        Raises:
            ValueError: naming a source that has none, such as a disk that is gone.
        """
        reasons = dict(unreadable)
        for source in self.sources:
            if len(source) <= len(reasons) and all(source.describe(i) in reasons for i in range(len(source))):
                first = source.describe(0)
                raise ValueError(
                    f"no image of {source.name} can be read any more, {first} for one: {reasons[first]}; put them back "
                    "or repair them, the same command goes on"
                )


def listing_of(file: Path, number: int) -> Path:
    """The file that holds the list of images of a source, counted from 0: ``files.1.txt`` of ``files.txt``."""
    return file.with_name(f"{file.stem}.{number + 1}{file.suffix}")


def _joined_labels(sources: Sequence[Source]) -> tuple[np.ndarray | None, list[str]]:
    """The labels of all sources as indices into the classes of all; None and no classes if a source has none."""
    if any(source.labels is None for source in sources):
        return None, []
    classes = sorted({name for source in sources for name in source.classes})
    index_of = {name: index for index, name in enumerate(classes)}
    joined = []
    for source in sources:
        assert source.labels is not None
        number_of = np.array([*(index_of[name] for name in source.classes), -1], dtype=np.int64)  # -1: no label
        joined.append(number_of[source.labels])
    return np.concatenate(joined), classes
