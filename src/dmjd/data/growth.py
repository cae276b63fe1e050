"""Sets that grow: at each epoch the images that are new join. What joined when is recorded with the run.

The images that a run began with keep their indices; those that join are numbered from there on, in the order in which
they were found. The images of an epoch are fixed, and recorded, before the first of them is drawn, so that a resumed
run draws the same ones.
"""

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Protocol, TypeVar

import msgspec
import numpy as np

from dmjd.checked_json import parse_json
from dmjd.data.order import GrowingPermutations, Joined
from dmjd.data.sources.base import Source
from dmjd.data.sources.folder import FolderSource
from dmjd.data.sources.mixture import MixtureSource
from dmjd.data.sources.paths import one_line
from dmjd.data.sources.subset import SubsetSource
from dmjd.files import append_lines, write_text
from dmjd.images.decoding import ImageLike
from dmjd.images.reading import OpenImage
from dmjd.text import printable

GROWTH_FILE = "joined.jsonl"  # in a run folder

T = TypeVar("T")

Place = tuple[int, str]  # number of a source, and the path of an image


class Segment(msgspec.Struct):
    """A line of the record: the images that a source has from an epoch on, besides those it had before.

    ``root`` is the folder of the paths, relative to that of the source; see :meth:`FolderSource.present`.
    """

    epoch: Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
    paths: list[str]
    source: Annotated[int, msgspec.Meta(ge=0)] = 0
    root: str = "."


class Shared(Protocol):
    """Returns, in all processes, what a function returns in the first one."""

    def __call__(self, make: Callable[[], T]) -> T:
        """Call ``make`` in the first process."""


def alone(make: Callable[[], T]) -> T:
    """:class:`Shared` for a single process."""
    return make()


class Growth:
    """The images that join a set while a run trains on it.

    Args:
        source: the images that the run began with: a folder or list, or a mixture of them.
        lengths: of each source, how many images the run trains on.
        seed: seed of the order.
        file: the record, which is read, and written by the process that looks for new images.
        looking: look for new images at each epoch; otherwise only those in the record count.
        from_first: shares what the first process finds with all others.
        say, warn: called with messages.

    Raises:
        ValueError: if the record is damaged, or a source cannot grow.
    """

    def __init__(
        self,
        source: Source,
        lengths: Sequence[int],
        seed: int,
        file: Path,
        *,
        looking: bool = True,
        from_first: Shared = alone,
        say: Callable[[str], None] = lambda _: None,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.sources = [one for one in _parts(source) if isinstance(one, FolderSource)]
        if len(self.sources) < len(_parts(source)):
            raise ValueError(f"{source.title} is {source.kind}, which does not grow")
        self._file, self._looking, self._from_first, self._say, self._warn = file, looking, from_first, say, warn
        self._base = sum(lengths)
        self._places: list[Place] = []
        self._failed: set[int] = set()
        firsts = np.cumsum([0, *lengths[:-1]]).tolist()
        self.orders = [
            GrowingPermutations(seed, length, first, partial(self._look, number))
            for number, (length, first) in enumerate(zip(lengths, firsts, strict=True))
        ]
        for segment in self._from_first(lambda: read_segments(file)):
            self._take(segment)

    @property
    def count(self) -> int:
        """Images that have joined."""
        return len(self._places)

    def among(self, indices: np.ndarray) -> dict[int, Place]:
        """Source and path of those of the drawn images that have joined, by index."""
        return {i: self._places[i - self._base] for i in indices.tolist() if i >= self._base}

    def joined(self, base: Source) -> Source:
        """The images that have joined ``base``, which the run began with, as a set."""
        indices = np.arange(self._base, self._base + self.count)
        return SubsetSource(WithJoined(base, self.sources, self.among(indices)), indices)

    def _take(self, segment: Segment) -> None:
        """Take over what was found for an epoch."""
        if segment.source >= len(self.sources):
            raise ValueError(f"{self._file} is of other sources: it names number {segment.source + 1}")
        order, folder = self.orders[segment.source], self.sources[segment.source].folder_of(segment.root)
        try:
            order.join(Joined(segment.epoch, self._base + self.count, len(segment.paths)))
        except ValueError as error:
            raise ValueError(f"{self._file} is damaged: {error}") from None
        self._places += [(segment.source, os.path.join(folder, path)) for path in segment.paths]

    def _look(self, number: int, epoch: int) -> None:
        """Find the images that are new at an epoch of a source, in the first process, and record them."""
        if not self._looking:
            return
        segment = self._from_first(lambda: self._find(number, epoch))
        self._take(segment)
        if segment.paths:
            total = len(self.sources[number]) + sum(place[0] == number for place in self._places)
            title = self.sources[number].title
            self._say(f"epoch {epoch} of {title}: {len(segment.paths)} new image(s) join, {total} in all")

    def _find(self, number: int, epoch: int) -> Segment:
        source = self.sources[number]
        found = Segment(epoch, [], number)
        try:
            with warnings.catch_warnings(action="ignore"):  # shown when the set was opened
                root, paths = source.present()
            folder = source.folder_of(root)
            known = source.known(root)
            known.update(os.path.relpath(path, folder) for n, path in self._places if n == number)
            known = {source.identity(folder, path) for path in known}
            new = [path for path in dict.fromkeys(paths) if source.identity(folder, path) not in known]
            found = Segment(epoch, new, number, root)
            self._failed.discard(number)
        except (ValueError, OSError) as error:
            if number not in self._failed:
                self._warn(f"no new images are looked for in {source.title} at epoch {epoch}: {error}")
            self._failed.add(number)
        append_lines(self._file, [_line(found)])
        return found


def _line(segment: Segment) -> str:
    """A line of the record; names that are no valid text are kept as escapes, as the list of a run has them."""
    return json.dumps(msgspec.structs.asdict(segment))


def read_segments(file: Path) -> list[Segment]:
    """The record of a run; none if there is no file. A last line that a kill cut short was not used, and is deleted.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read ({error})") from None
    whole, _, rest = text.rpartition("\n")
    if rest:
        write_text(file, whole + "\n" if whole else "")
    segments = [
        parse_json(line, Segment, f"{file}, line {number}") for number, line in enumerate(whole.splitlines(), start=1)
    ]
    for segment in segments:
        for path in segment.paths:
            if os.path.isabs(path) or ".." in path.split("/") or "\0" in path:
                raise ValueError(f"{file} holds {printable(path)}, which may lie outside of the folder")
    return segments


def _parts(source: Source) -> list[Source]:
    return source.sources if isinstance(source, MixtureSource) else [source]


class WithJoined(Source):
    """A set together with images that have joined it, for one batch.

    Its length and parts are those of the set: images in the place of unreadable ones are drawn from those that were
    there at the start.

    Args:
        base: the set.
        sources: its sources.
        places: source and path by index, of the images that have joined.
    """

    def __init__(self, base: Source, sources: Sequence[FolderSource], places: Mapping[int, Place]) -> None:
        self._set, self._sources, self._places = base, sources, places
        self.name, self.in_chans, self.value_range = base.name, base.in_chans, base.value_range
        self.invalid, self.parts, self.classes = base.invalid, base.parts, []

    def __len__(self) -> int:
        return len(self._set)

    def stored(self, index: int) -> ImageLike:
        """The image's path, or as the set stores it."""
        return Path(self._places[index][1]) if index in self._places else self._set.stored(index)

    def open(self, index: int) -> OpenImage:
        """See :meth:`Source.open`."""
        if index not in self._places:
            return self._set.open(index)
        number, path = self._places[index]
        return self._sources[number].open_path(path)

    def read(self, index: int) -> np.ndarray:
        """See :meth:`Source.read`."""
        return self.open(index).read() if index in self._places else self._set.read(index)

    def describe(self, index: int) -> str:
        """The image's path, or its name in the set."""
        return one_line(self._places[index][1]) if index in self._places else self._set.describe(index)

    def home(self, index: int) -> int:
        """See :meth:`Source.home`: the first image of the source that it has joined."""
        if index not in self._places:
            return index
        return sum(part.length for part in self.parts[: self._places[index][0]])
