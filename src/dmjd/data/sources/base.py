"""The interface of a data source: an indexed set of images."""

import contextlib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from dmjd.config.invalid import BLENDED
from dmjd.data.order import Part
from dmjd.data.windows import ShardWindows
from dmjd.images.decoding import ImageLike
from dmjd.images.dicom import frame_of
from dmjd.images.invalid import InvalidPixels
from dmjd.images.reading import OpenImage, open_image
from dmjd.images.stored import UnreadableImage
from dmjd.regular import check_regular

_SAMPLED, _FIRST_BYTES = 64, 1 << 16  # of Source.content_sample


class RemoteOptions(NamedTuple):
    """How remote files are read.

    Attributes:
        cache_dir: folder for their copies; None: that of the user.
        cache_gb: size of the cache of shards in GB (10^9 bytes); None: no bound, all are fetched when a set is opened.
        shard_window: shards whose images are shuffled together; see :class:`~dmjd.data.windows.ShardWindows`.
        fetch_ahead: whether a training loader is to fetch the shards; else images of shards that are not in a bounded
            cache are fetched one by one.
    """

    cache_dir: str | None = None
    cache_gb: float | None = None
    shard_window: int | None = None
    fetch_ahead: bool = False


FETCHED_FIRST = RemoteOptions()


@dataclass(frozen=True)
class SourceOptions:
    """How a set is opened; see :func:`~dmjd.data.sources.registry.open_source`."""

    split: str = "train"
    labels: str = "none"
    in_chans: int = 3
    value_range: tuple[float, float] | None = None
    listing: Path | None = None
    masks: bool = False
    root: str | None = None
    path_column: str | None = None
    label_column: str | None = None
    max_unreadable: float | None = None
    nodata: str | None = None
    alpha: str = BLENDED
    remote: RemoteOptions = FETCHED_FIRST

    @property
    def with_labels(self) -> bool:
        """Whether labels are wanted."""
        return self.labels != "none"


class Changes(NamedTuple):
    """Names of the images that have changed, and how many were compared."""

    names: list[str]
    compared: int


class Source(ABC):
    """An indexed set of images, with or without labels; picklable, so that worker processes can read it.

    A new kind of source sets the attributes and defines ``__len__``, ``stored`` and ``describe``. To be opened by
    :func:`~dmjd.data.sources.registry.open_source` it also defines ``from_data`` and either ``names`` or ``matches``,
    and is added to the table in that module.

    Attributes:
        name: the name or path given by the user.
        in_chans, value_range, invalid: see :func:`~dmjd.images.reading.read_image`.
        labels: [n] int64 indices into ``classes``, or None; -1 for an image of a list that has no label.
        classes: class names; empty without labels.
        names: reserved names of sets of this kind, if any.
        kind: description of such data in messages.
        label_option: the only value of ``labels`` besides "none" that is accepted; None: all are.
        can_hold_masks: whether such sets can have segmentation masks.
        remote: whether such sets are on the network.
        may_grow: whether images may join such a set while a run trains on it; see :mod:`dmjd.data.growth`.
        listing: file that the list of images was read from; None: it is not from a file.
        removable: whether a run goes on after images were removed: the list of images is kept with the run.
        full_names: whether names of images hold the folder of a table, to tell the sources of a mixture apart.
        parts: the sources of a mixture, with their weights; empty for other sets.
        windows: for shards, in training, the windows in which images are shuffled; None: all together.
        split: the part of the data that the images are: "train", "val" or "test". Where there is no test part, the
            validation part serves as one.
    """

    names: ClassVar[tuple[str, ...]] = ()
    kind: ClassVar[str] = "a set of images"
    label_option: ClassVar[str | None] = None
    can_hold_masks: ClassVar[bool] = False
    remote: ClassVar[bool] = False
    may_grow: ClassVar[bool] = False

    name: str
    in_chans: int = 3
    value_range: tuple[float, float] | None = None
    invalid: InvalidPixels | None = None
    labels: np.ndarray | None = None
    listing: Path | None = None
    classes: list[str]
    removable: bool = False
    full_names: bool = False
    parts: tuple[Part, ...] = ()
    windows: ShardWindows | None = None
    split: str = "train"

    @classmethod
    def matches(cls, data: str, split: str) -> bool:
        """Whether ``data`` is a set of this kind and has this split; without network access."""
        return data in cls.names and split != "val"

    @classmethod
    def has_split(cls, data: str, split: str) -> bool:
        """Like :meth:`matches`, but certain; may access the network."""
        return cls.matches(data, split)

    @classmethod
    def from_data(cls, data: str, options: SourceOptions) -> "Source":
        """Open data that :meth:`matches`.

        Raises:
            ValueError: saying what is wrong with it.
        """
        raise TypeError(f"{cls.__name__} cannot be opened by name: it defines no from_data")

    @property
    def title(self) -> str:
        """The name in messages that tell the parts of the data apart."""
        return self.name

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def stored(self, index: int) -> ImageLike:
        """Image ``index`` as stored: a path, encoded bytes, a PIL image or an array."""

    @abstractmethod
    def describe(self, index: int) -> str:
        """Name of image ``index`` in messages: its path, or "row 17 of x.parquet"."""

    def class_of(self, index: int) -> str:
        """The class of image ``index``; empty if it has no label."""
        if self.labels is None or (label := int(self.labels[index])) < 0:
            return ""
        return self.classes[label]

    def read(self, index: int) -> np.ndarray:
        """Image ``index``: [H, W, in_chans] uint8 or float32 on the 0..255 scale, NaN where it is invalid.

        Raises:
            UnreadableImage: if it cannot be read.
        """
        return self.open(index).read()

    def open(self, index: int) -> OpenImage:
        """Image ``index``; its size is known, its pixels may not be decoded yet.

        Raises:
            UnreadableImage: if it cannot be read.
        """
        return open_image(self.stored(index), self.in_chans, self.value_range, self.describe(index), self.invalid)

    def prepare(self, indices: Iterable[int]) -> None:  # noqa: B027 (most sets have nothing to prepare)
        """Get ready to read these images soon, such as to fetch several at a time."""

    def home(self, index: int) -> int:
        """The image of this set whose source replaces image ``index`` if it cannot be read: itself, if it is of the
        set.
        """
        return index

    def save_listing(self, file: Path) -> None:  # noqa: B027 (most sets have nothing to save)
        """Save the list of images that a search found, so that a resumed run need not search again."""

    def fingerprint(self) -> str:
        """Short hash that changes when images are added, removed or change size; independent of the set's path."""
        return short_hash([str(len(self)), *self._identity()])

    def content_hash(self) -> str:
        """Short hash of the labels and the :meth:`content_sample`.

        With :meth:`fingerprint`, which an image or label of the same size does not change, it tells results on other
        data apart.
        """
        labels = [] if self.labels is None else [self.labels.tobytes().hex(), *self.classes]
        return short_hash([*labels, *self.content_sample().values()])

    def content_sample(self) -> dict[int, str]:
        """Index -> short hash of the first bytes, of at most 64 evenly spaced images; unreadable ones are left out."""
        hashes = {}
        sampled = np.linspace(0, len(self) - 1, min(len(self), _SAMPLED)).astype(int).tolist()
        self.prepare(sampled)
        for index in sampled:
            with contextlib.suppress(UnreadableImage, OSError):
                hashes[index] = hashlib.sha256(_first_bytes(self.stored(index))).hexdigest()[:12]
        return hashes

    def changes(self, fingerprint: str) -> Changes | None:
        """What differs from the set a run began with, whose fingerprint is given; None: it is another set."""
        return Changes([], len(self)) if fingerprint == self.fingerprint() else None

    def _identity(self) -> Iterable[str]:
        """Strings that distinguish this set from others of the same length."""
        return [self.name]


def _first_bytes(stored: ImageLike) -> bytes:
    if isinstance(stored, bytes):
        return stored[:_FIRST_BYTES]
    if isinstance(stored, str | Path):
        path = frame_of(stored)[0]
        check_regular(Path(path))
        with open(path, "rb") as file:
            return file.read(_FIRST_BYTES)
    return np.asarray(stored).tobytes()[:_FIRST_BYTES]


def short_hash(parts: Iterable[str]) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of a sequence of strings."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()[:12]
