"""Images in tar and zip files, which are indexed once and then read one by one, in any order."""

import os
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dmjd.data.sources.addresses import ends_with, is_url
from dmjd.data.sources.base import Changes, Source, SourceOptions, short_hash
from dmjd.data.sources.paths import COMPRESSED, EXTENSIONS, one_line
from dmjd.data.sources.progress import counted
from dmjd.data.sources.remote_shards import RemoteShards, RemoteWindows
from dmjd.data.sources.shard_cache import index_shards
from dmjd.data.sources.shard_files import FoundShards, find_shards, is_shards, read_member
from dmjd.data.sources.shard_index import Extent, ShardIndex, aligned, read_if_there
from dmjd.data.sources.shard_labels import folder_labels, member_labels
from dmjd.data.sources.transfer import ChangedFile
from dmjd.data.unreadable import MISSING
from dmjd.data.windows import ShardWindows
from dmjd.images.decoding import reason
from dmjd.images.reading import OF_THE_MACHINE
from dmjd.images.stored import UnreadableImage
from dmjd.text import printable
from dmjd.warning import DMJDWarning

INDEX_ENDING = ".arrow"  # of the index of a run, next to where a folder's list would be


class ShardSource(Source):
    """The images of tar and zip files, in the order of the sorted files and of their members.

    An image is a member with a known extension; see :func:`~dmjd.data.sources.shard_scan.scan_shard`. Labels are the
    first folder of the names ("folder"), or members such as ``a.cls`` next to ``a.jpg`` ("column").

    Args:
        name: the path or pattern given by the user.
        shards: the shards; see :func:`~dmjd.data.sources.shard_files.find_shards`.
        remote: what fetches the shards, one by one; None: they are files of this machine.
        options: how to open them. ``listing`` may be the list of a run, whose index has the same name and the ending
            ``.arrow`` (see :meth:`save_listing`). If it exists, the set holds the images the run began with, and those
            that are gone are unreadable.

    Raises:
        ValueError: if there are no images, a shard cannot be used, or an image has no label.
    """

    kind = "a set of tar or zip files"
    removable = True

    def __init__(
        self, name: str, shards: FoundShards, options: SourceOptions, remote: RemoteShards | None = None
    ) -> None:
        self.name, self.split = name, shards.split
        self.in_chans, self.value_range = options.in_chans, options.value_range
        self._remote = remote
        listing = None if options.listing is None else options.listing.with_suffix(INDEX_ENDING)
        self._listed = read_if_there(listing)
        self.listing = listing if self._listed is not None else None
        key = short_hash([name if is_url(name) else os.path.abspath(name), options.split])
        now = index_shards(shards.files, key, self._listed, remote)
        self._index = now if self._listed is None else aligned(self._listed, now)
        self._folder = shards.folder.removesuffix("/")
        gone = Path(shards.folder)  # its images are not read
        self._paths = [str(shards.files.get(shard.name, gone)) for shard in self._index.shards]
        self._check(now)
        self.classes: list[str] = []
        if options.labels == "folder":
            self.labels, self.classes = folder_labels(self._index, printable(name))
        elif options.labels == "column":
            self.labels, self.classes = member_labels(
                self._index, printable(name), self._label, self.describe, options.label_column
            )
        if options.remote.fetch_ahead:
            self.windows = self._in_windows(remote, options.remote.shard_window)

    @classmethod
    def matches(cls, data: str, split: str) -> bool:
        """Whether ``data`` is a shard, a folder of shards without images beside them, or a pattern of some."""
        return is_shards(data, split)

    @classmethod
    def from_data(cls, data: str, options: SourceOptions) -> "ShardSource":
        """Open a split of the shards ``data``."""
        if options.remote.cache_gb is not None and is_url(data) and not ends_with(data, COMPRESSED):
            remote = RemoteShards(data, options.remote.cache_gb, options.remote.cache_dir)
            if options.remote.fetch_ahead:
                remote.window_size(options.remote.shard_window)  # refuses a small cache before anything is fetched
            return cls(data, FoundShards(remote.folder, remote.paths, "train"), options, remote)
        found = find_shards(data, options.split, cache_dir=options.remote.cache_dir)
        compressed = [] if is_url(data) else [*find_shards(data, options.split, COMPRESSED).files.values()]
        if not found.files:
            name = printable(compressed[0] if compressed else data)
            raise ValueError(f"{name} is compressed as a whole, so single images can't be found in it: decompress it")
        if compressed:
            text = f"{len(compressed)} compressed tar files, {printable(compressed[0])} for one, are left out"
            warnings.warn(f"{text}: decompress them", DMJDWarning, stacklevel=3)
        return cls(data, found, options)

    def __len__(self) -> int:
        return len(self._index)

    def stored(self, index: int) -> bytes:
        """The encoded image.

        Raises:
            UnreadableImage: if it is damaged, or it or its shard is gone.
            ChangedFile: if the shard has changed since it was indexed.
        """
        shard, row = self._index.locate(index)
        extent = self._index.extent(shard, row)
        if extent.offset < 0:
            raise UnreadableImage(self.describe(index), MISSING)
        try:
            return self._member(shard, extent)
        except (OSError, ValueError) as error:
            if isinstance(error, ConnectionError | ChangedFile):
                raise
            if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
                raise
            raise UnreadableImage(self.describe(index), reason(error)) from None

    def _member(self, shard: int, extent: Extent) -> bytes:
        if self._remote is not None:
            return self._remote.member(Path(self._paths[shard]), self._index.shards[shard], extent)
        return read_member(self._paths[shard], self._index.shards[shard], extent)

    def _label(self, shard: int, extent: Extent) -> bytes:
        """The content of a label. All of a shard are read in a row, so the shard is fetched whole."""
        path = Path(self._paths[shard])
        if self._remote is None or self._remote.is_here(path):
            return self._member(shard, extent)
        with self._remote.needing(path):
            return self._member(shard, extent)

    def _in_windows(self, remote: RemoteShards | None, recorded: int | None) -> ShardWindows | None:
        """The windows in which images are shuffled while a run trains; None: all together."""
        lengths = tuple(shard.images for shard in self._index.shards)
        if remote is None:
            return ShardWindows(lengths, recorded) if recorded else None
        if size := remote.window_size(recorded):
            return ShardWindows(lengths, size, RemoteWindows(remote, [Path(path) for path in self._paths]))
        remote.need(remote.paths.values())
        for _ in counted(remote.fetch(remote.paths.values()), "fetching shards", len(remote.paths)):
            pass
        return None

    def describe(self, index: int) -> str:
        """Path or address of the shard and name in it, with a slash between; odd characters are escaped."""
        shard, row = self._index.locate(index)
        return one_line(f"{self._folder}/{self._index.shards[shard].name}/{self._index.name(shard, row)}")

    def save_listing(self, file: Path) -> None:
        """Write the index, with the ending ``.arrow``, unless it was read from there."""
        if self._listed is None:
            self._listed = self._index.write(file.with_suffix(INDEX_ENDING))

    def changes(self, fingerprint: str) -> Changes | None:
        """See :meth:`Source.changes`. All images are compared, by name and size."""
        if (same := super().changes(fingerprint)) is not None:
            return same
        if self._listed is None or self._hash(self._listed) != fingerprint:
            return None
        changed = np.flatnonzero(self._listed.sizes() != self._index.sizes()).tolist()
        return Changes([self.describe(index) for index in changed], len(self))

    def _identity(self) -> Iterable[str]:
        return [self._index.identity()]

    @staticmethod
    def _hash(index: ShardIndex) -> str:
        """The fingerprint for an index."""
        return short_hash([str(len(index)), index.identity()])

    def _check(self, now: ShardIndex) -> None:
        """Warn about damaged shards and what was left out; ValueError if there is nothing else.

        Args:
            now: the index of the shards as they are.
        """
        name, shards = printable(self.name), now.shards
        useless = [(s, s.problem or "it holds no images") for s in shards if s.problem or not s.images]
        left_out = [shard for shard in shards if shard.left_out]
        first = f"{printable(useless[0][0].name)}: {useless[0][1]}" if useless else ""
        if not len(self):
            extensions = " ".join(EXTENSIONS)
            raise ValueError(
                f"no images found in {name}: {len(shards)} shards ({first}); known extensions: {extensions}"
            )
        if useless:
            kept = f", after {useless[0][0].images} images, which count" if useless[0][0].images else ""
            text = f"{len(useless)} of {len(shards)} shards of {name} are damaged or hold no images ({first}{kept})"
            warnings.warn(text, DMJDWarning, stacklevel=5)
        if left_out:
            text = f"{len(left_out)} of {len(shards)} shards of {name} hold members that are left out"
            one = f"{printable(left_out[0].name)}: {left_out[0].left_out}"
            warnings.warn(f"{text} ({one})", DMJDWarning, stacklevel=5)
