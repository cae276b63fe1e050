"""Remote shards in a cache of bounded size. They are fetched ahead in training; other reads take what they need."""

import contextlib
import os
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path

from dmjd.data.sources.addresses import names_of
from dmjd.data.sources.bounded_cache import AT_ONCE, BoundedCache
from dmjd.data.sources.paths import cache_folder
from dmjd.data.sources.remote import addresses_of, check_space, described, in_order
from dmjd.data.sources.shard_files import read_member_once, unpacked
from dmjd.data.sources.shard_index import Extent, Shard
from dmjd.data.sources.transfer import ChangedFile, read_range
from dmjd.text import printable


class RemoteShards:
    """The shards of an address; picklable.

    Args:
        url: the address; see :func:`~dmjd.data.sources.remote.fetch`.
        cache_gb: bound of the cache, in GB (10^9 bytes).
        cache_dir: folder of the cache; None: that of the user.

    Attributes:
        folder: the address of the folder that holds the shards, as messages show it.
        paths: name below the folder -> where the copy lies, whether it is here or not, in the order of the names.

    Raises:
        ValueError: if a shard does not exist, its size is not known, or the cache cannot hold two of them.
    """

    def __init__(self, url: str, cache_gb: float, cache_dir: str | None = None) -> None:
        self._name = printable(url)
        addresses = addresses_of(url)
        files = described(addresses)
        if unknown := next((file for file in files if file.size is None), None):
            raise ValueError(f"the server does not tell the size of {printable(unknown.address)}: leave --cache-gb out")
        self._cache = BoundedCache(cache_folder("bounded", "remote shards are kept", cache_dir), round(cache_gb * 1e9))
        self._files = {self._cache.path(file): file for file in files}
        self.folder, names = names_of(addresses)
        self.paths = in_order(zip(names, self._files, strict=True))
        sizes = self._sizes
        self._check_bound(sum(sizes[-2:]), "to fetch a shard while another one is read" if sizes[1:] else "to hold it")
        missing = sum(file.size or 0 for path, file in self._files.items() if not file.is_at(path))
        check_space(self._cache.folder, min(missing, self._cache.bound))

    @property
    def _sizes(self) -> list[int]:
        """The bytes of all shards, ascending."""
        return sorted(file.size or 0 for file in self._files.values())

    def _check_bound(self, needed: int, purpose: str) -> None:
        if needed > self._cache.bound:
            raise ValueError(
                f"a cache of {self._cache.bound / 1e9:g} GB is too small for {self._name}, which needs "
                f"{_rounded_up(needed)} GB {purpose}: give --cache-gb {_rounded_up(needed)} or more"
            )

    def window_size(self, recorded: int | None) -> int:
        """The number of shards whose images are shuffled together; 0: all of them.

        Two windows fit in the cache, the one that is read and the next one.

        Args:
            recorded: that of the run that is resumed, or given by the user; None: as many as fit.

        Raises:
            ValueError: if so many do not fit.
        """
        sizes = self._sizes
        if recorded:
            count = min(2 * recorded, len(sizes))
            self._check_bound(sum(sizes[-count:]), f"for the two windows of {recorded} shards (--shard-window)")
            return recorded
        if sum(sizes) <= self._cache.bound:
            return 0
        if recorded == 0:
            self._check_bound(sum(sizes), "to shuffle all images together, as the run began or --shard-window 0 says")
        fitting, total = 0, 0
        for size in reversed(sizes):
            total += size
            fitting += total <= self._cache.bound
        return max(1, fitting // 2)

    @property
    def fetched_at_once(self) -> int:
        """How many shards of any size fit in the cache at once, at most a few."""
        return max(1, min(AT_ONCE, self._cache.bound // max(1, self._sizes[-1])))

    def stamp(self, path: Path) -> tuple[int, int]:
        """Bytes and version of a shard, the size and time of change of its copy."""
        file = self._files[path]
        return file.size or 0, file.version

    def needing(self, path: Path) -> contextlib.AbstractContextManager[Path]:
        """The copy of a shard, which is fetched if it is missing, and stays meanwhile."""
        return self._cache.needing(self._files[path])

    def need(self, paths: Iterable[Path]) -> None:
        """Keep the copies of these shards, present or fetched later, from now on, and no others."""
        self._cache.need(self._files[path] for path in paths if path in self._files)

    def fetch(self, paths: Iterable[Path]) -> Generator[None, None, None]:
        """Fetch shards that are needed and missing; yields after each. Those that the server has no more do not count.

        Raises:
            ValueError: if one cannot be fetched.
        """
        files = [(path, self._files[path]) for path in paths if path in self._files]
        yield from self._cache.fetch_all([file for path, file in files if not file.is_at(path)])

    def is_here(self, path: Path) -> bool:
        """Whether the copy of a shard is in the cache."""
        return self._files[path].is_at(path)

    def arrived(self, paths: Iterable[Path]) -> int:
        """The bytes of shards that are here so far, whichever process fetches them."""
        total = 0
        for path in paths:
            with contextlib.suppress(OSError):
                total += sum(
                    entry.stat().st_size
                    for entry in os.scandir(path.parent)
                    if entry.name == path.name
                    or (entry.name.startswith(f".{path.name}.") and entry.name.endswith(".tmp"))
                )
        return total

    def member(self, path: Path, shard: Shard, extent: Extent) -> bytes:
        """The content of a member: from the copy of its shard, else its bytes alone are fetched.

        Raises:
            ValueError: if the member is damaged.
            ConnectionError: if it cannot be fetched.
            ChangedFile: if the shard on the server is not the one that was scanned.
        """
        try:
            return read_member_once(path, shard, extent)
        except (OSError, ChangedFile):  # it made room for another one, is of another version, or its disk fails
            pass
        file = self._files[path]
        return unpacked(read_range(file, extent.offset, extent.packed), extent)


class RemoteWindows:
    """A :class:`~dmjd.data.windows.ShardStore` of remote shards, numbered by their paths."""

    def __init__(self, remote: RemoteShards, paths: Sequence[Path]) -> None:
        self._remote, self._paths = remote, paths

    def need(self, shards: Iterable[int]) -> None:
        """See :meth:`RemoteShards.need`."""
        self._remote.need(self._paths[shard] for shard in shards)

    def fetch(self, shards: Sequence[int]) -> Generator[None, None, None]:
        """See :meth:`RemoteShards.fetch`."""
        return self._remote.fetch([self._paths[shard] for shard in shards])

    def arrived(self, shards: Sequence[int]) -> int:
        """See :meth:`RemoteShards.arrived`."""
        return self._remote.arrived(self._paths[shard] for shard in shards)


def _rounded_up(size: int) -> str:
    """Bytes in GB with three digits, not less."""
    unit = 10 ** max(0, len(str(size)) - 3)
    return f"{-(-size // unit) * unit / 1e9:g}"
