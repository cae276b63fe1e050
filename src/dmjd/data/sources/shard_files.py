"""Find shards, and read single members of them. Few files are open at a time, however many shards there are."""

import functools
import glob
import os
import stat
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dmjd.data.sources.addresses import ends_with, is_url
from dmjd.data.sources.paths import (
    COMPRESSED,
    EXTENSIONS,
    SHARDS,
    existing_path,
    expanded,
    files_of_split,
    permission_checked,
    split_folder,
)
from dmjd.data.sources.remote import fetch
from dmjd.data.sources.shard_index import Extent, Shard
from dmjd.data.sources.transfer import ChangedFile
from dmjd.images.stored import MAX_BYTES
from dmjd.text import printable

_MOST_OPEN = 64  # files of a process

_MOST_AT_ONCE = 1 << 30  # bytes of a read; systems read at most 2 GiB at once

_MAGIC = "*?["  # characters of patterns


class FoundShards(NamedTuple):
    """Shards.

    Attributes:
        folder: the folder or address that their names are relative to.
        files: name, with "/" -> file, sorted.
        split: what they are.
    """

    folder: str
    files: dict[str, Path]
    split: str


def find_shards(data: str, split: str, endings: tuple[str, ...] = SHARDS, cache_dir: str | None = None) -> FoundShards:
    """The shards of a split; without a test part, the validation part is the test part.

    Args:
        data: a shard, a folder of shards (or with such folders train/ and test/), a pattern such as ``a/*.tar``, or the
            address of remote shards, which are fetched (see :func:`~dmjd.data.sources.remote.fetch`).
        split: "train", "val" or "test". Shards may be named after it: ``train-000.tar`` next to ``test-000.tar``.
        endings: of their names, in small letters.
        cache_dir: folder of the cache for remote shards; None: that of the user.

    Raises:
        ValueError: if permission to read a folder is missing.
    """
    if is_url(data):
        return FoundShards(*fetch(data, cache_dir) if _is_remote(data, split, endings) else ("", {}), split)
    path = existing_path(data)
    if path is not None and path.is_file():
        files = [path] if path.name.lower().endswith(endings) and split == "train" else []
        return _found(path.parent, files, split)
    if path is not None:
        whole = split_folder(path, "train") == ("train", path)  # else it has folders train/ and test/
        found = ("train", path) if whole else split_folder(path, split)
        if found is None:
            return _found(path, [], split)
        taken, folder = found
        with permission_checked(folder):
            files = _shards_in(folder, endings) or _shards_in(folder / "data", endings)  # as in hub repositories
        folder = files[0].parent if files else folder
        if whole:
            taken, files = files_of_split(files, split)
        return _found(folder, files, taken)
    if "\0" in data or not any(character in data for character in _MAGIC):
        return _found(Path(), [], split)
    pattern = expanded(data)
    matching = sorted(Path(name) for name in glob.glob(str(pattern), recursive=True) if name.lower().endswith(endings))
    folder = pattern.parent
    while any(character in str(folder) for character in _MAGIC):
        folder = folder.parent
    taken, files = files_of_split(matching, split)
    return _found(folder, files, taken)


def _found(folder: Path, files: Sequence[Path], split: str) -> FoundShards:
    return FoundShards(str(folder), {file.relative_to(folder).as_posix(): file for file in files}, split)


def _is_remote(url: str, split: str, endings: tuple[str, ...]) -> bool:
    return split == "train" and ends_with(url, endings)


def _shards_in(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if e.name.lower().endswith(endings) and not e.name.startswith(".")]
    return sorted(file for name in names if not (file := folder / name).is_dir())


def is_shards(data: str, split: str) -> bool:
    """Whether there are shards of this split. A folder that holds images too is a folder of images."""
    if is_url(data):
        return _is_remote(data, split, SHARDS + COMPRESSED)
    found = find_shards(data, split, SHARDS + COMPRESSED)
    path, folder = existing_path(data) if found.files else None, Path(found.folder)
    if path is None or path.is_file():
        return bool(found.files)
    return not _holds_images(folder.parent if folder.name == "data" and folder != path else folder)


def _holds_images(folder: Path) -> bool:
    """Whether an image lies anywhere below a folder, links included; stops at the first."""
    seen, pending = set(), [str(folder)]
    while pending:
        try:
            status = os.stat(current := pending.pop())
            entries = [entry for entry in os.scandir(current) if not entry.name.startswith(".")]
        except OSError:  # told by whoever reads the folder
            continue
        if (status.st_dev, status.st_ino) not in seen:
            seen.add((status.st_dev, status.st_ino))
            if any(entry.name.lower().endswith(EXTENSIONS) for entry in entries):
                return True
            pending += [entry.path for entry in entries if os.path.isdir(entry.path)]
    return False


def read_member(path: str, shard: Shard, extent: Extent) -> bytes:
    """The content of a member, by one read.

    Raises:
        ChangedFile: if the shard has changed since it was scanned.
        OSError: if it is gone or cannot be read.
        ValueError: if the member is damaged.
    """
    _check_size(extent)
    return unpacked(_opened(path, shard.size, shard.mtime).read(extent.packed, extent.offset), extent)


def read_member_once(path: Path, shard: Shard, extent: Extent) -> bytes:
    """Like :func:`read_member`, without keeping the shard open: one that is deleted takes no room on the disk."""
    _check_size(extent)
    return unpacked(_OpenShard(str(path), shard.size, shard.mtime).read(extent.packed, extent.offset), extent)


def _check_size(extent: Extent) -> None:
    if max(extent.packed, extent.size) > MAX_BYTES:
        raise ValueError("it takes more than 4 GiB")


def unpacked(content: bytes, extent: Extent) -> bytes:
    """The content of a member, from its bytes in the shard.

    Raises:
        ValueError: if it is damaged.
    """
    if len(content) < extent.packed:
        raise ValueError("the shard ends before the image does")
    if extent.size >= 0:
        try:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, extent.size + 1)
        except zlib.error as error:
            raise ValueError(str(error)) from None
        if len(content) != extent.size:
            raise ValueError("it unpacks to another size than the shard says")
    if extent.crc >= 0 and zlib.crc32(content) != extent.crc:
        raise ValueError("its content does not match the CRC-32 that the shard says")
    return content


class _OpenShard:
    """An open file. It is closed when the last thread that reads it is done, and not before."""

    def __init__(self, path: str, size: int, mtime: int) -> None:
        self._descriptor = -1
        # Without O_NONBLOCK, opening a FIFO would wait for ever.
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        self._lock = threading.Lock()
        self._path, self._stamp = path, (size, mtime)
        self._check()

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def _check(self) -> None:
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode) or (status.st_size, status.st_mtime_ns) != self._stamp:
            text = f"{printable(self._path)} has changed while it was read; the same command takes it as it is now"
            raise ChangedFile(text)

    def read(self, length: int, offset: int) -> bytes:
        """Bytes at an offset; fewer at the end of the file."""
        content = self._read_all(length, offset)
        self._check()  # after reading: it may have been written over meanwhile
        return content

    def _read_all(self, length: int, offset: int) -> bytes:
        content = self._read(min(length, _MOST_AT_ONCE), offset)
        while len(content) < length and (
            more := self._read(min(length - len(content), _MOST_AT_ONCE), offset + len(content))
        ):
            content += more
        return content

    def _read(self, length: int, offset: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self._descriptor, length, offset)
        with self._lock:  # Windows
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            return os.read(self._descriptor, length)


@functools.lru_cache(maxsize=_MOST_OPEN)
def _opened(path: str, size: int, mtime: int) -> _OpenShard:
    """An open shard; the least recently used ones are closed."""
    return _OpenShard(path, size, mtime)
