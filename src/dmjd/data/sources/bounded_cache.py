"""A folder for copies of remote files whose size is bounded, shared by the processes of a machine.

Each process has a lease: a file that it keeps locked while it lives, with the names of the copies that it needs and of
those that it is fetching. Copies that no living process needs make room for others, the oldest first.
"""

import contextlib
import json
import os
import re
import threading
import time
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import msgspec

from dmjd.checked_json import parse_json
from dmjd.data.sources.transfer import RemoteFile, copy
from dmjd.data.workers import TIMEOUT, wait_limit
from dmjd.files import locked, make_folder, remove, remove_leftovers, try_lock
from dmjd.text import printable

_LEASES = ".leases"  # folder

_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}\.tmp", re.DOTALL)  # of the file of this name

_POLL = 0.2  # seconds between two looks for room

AT_ONCE = 4  # files


_GUARD = threading.RLock()  # of the leases of this process

if hasattr(os, "register_at_fork"):  # a child that is forked meanwhile would hold the lock of the cache
    os.register_at_fork(before=_GUARD.acquire, after_in_parent=_GUARD.release, after_in_child=_GUARD.release)


class _Lease(msgspec.Struct):
    """What a process needs, and the bytes of what it is fetching; names are paths below the folder."""

    needed: list[str] = []
    coming: dict[str, int] = {}


class BoundedCache:
    """Copies of remote files that take at most so many bytes together; picklable.

    Args:
        folder: the folder, which exists. bound: bytes.
    """

    def __init__(self, folder: Path, bound: int) -> None:
        self.folder, self.bound = folder, bound
        self._reset()

    def _reset(self) -> None:
        self._own, self._pid = _Lease(), os.getpid()
        self._file: IO[str] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "bound": self.bound}  # another process has a lease of its own

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._reset()

    def path(self, file: RemoteFile) -> Path:
        """Where the copy of a file lies, if it is here."""
        return self.folder / file.local_name

    def need(self, files: Iterable[RemoteFile]) -> None:
        """Keep the copies of these files, present or fetched later, from now on, and no others."""
        with self._alone():
            self._own.needed = [file.local_name for file in files]
            self._write()

    @contextlib.contextmanager
    def needing(self, file: RemoteFile) -> Iterator[Path]:
        """A copy of a file, which is fetched if it is missing, and stays meanwhile."""
        with self._alone():
            self._own.needed.append(file.local_name)
            self._write()
        try:
            self.fetch(file)
            yield self.path(file)
        finally:
            with self._alone():
                self._own.needed.remove(file.local_name)
                self._write()

    def fetch(self, file: RemoteFile) -> None:
        """Fetch a file that is needed, unless its copy is here, once room for it was made.

        Raises:
            ValueError: if it cannot be fetched, or other processes need all room for too long.
        """
        target = self.path(file)
        make_folder(target.parent)
        while not file.is_at(target):
            # Not waited for: children of a process that is done may still hold the lock.
            if (lock := _try_lock(target.with_name(f".{target.name}.lock"))) is None:
                time.sleep(_POLL)
                continue
            with lock:
                if not file.is_at(target):
                    self._fetch(file, target)

    def _fetch(self, file: RemoteFile, target: Path) -> None:
        self._reserve(file)
        try:
            copy(file, target)
        finally:
            with self._alone():
                self._own.coming.pop(file.local_name, None)
                self._write()

    def fetch_all(self, files: Iterable[RemoteFile]) -> Generator[None, None, None]:
        """:meth:`fetch` several files, a few at a time."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            try:
                yield from pool.map(self.fetch, files)
            finally:
                pool.shutdown(cancel_futures=True)

    def _reserve(self, file: RemoteFile) -> None:
        """Make room for a file, and claim it."""
        size, until = file.size or 0, time.monotonic() + wait_limit()
        while True:
            with self._alone():
                if self._made_room(file.local_name, size):
                    self._own.coming[file.local_name] = size
                    self._write()
                    return
            if time.monotonic() >= until:
                raise ValueError(
                    f"the cache {printable(self.folder)} of {self.bound / 1e9:g} GB has held shards that processes "
                    f"still need for {wait_limit() / 60:g} minute(s): give a larger --cache-gb, or another "
                    f"--cache-dir to each run (or a longer {TIMEOUT}, in minutes)"
                )
            time.sleep(_POLL)

    def _made_room(self, name: str, size: int) -> bool:
        """Whether a file fits, after removing what nobody needs."""
        leases = list(self._leases())
        needed = {one for lease in leases for one in lease.needed}
        coming = {one: length for lease in leases for one, length in lease.coming.items()}
        copies = sorted(self._copies(coming), key=lambda row: row[2])
        used = sum(length for other, length, _ in copies if other not in coming and other != name)
        used += sum(length for other, length in coming.items() if other != name)
        for other, length, _ in copies:
            if used + size <= self.bound:
                break
            if other not in needed and other not in coming and other != name:
                remove(self.folder / other)
                used -= length
        if used + size > self.bound:
            return False
        if name not in coming:
            remove(self.folder / name)  # a former version of the file
        return True

    def _copies(self, coming: Mapping[str, int]) -> Iterator[tuple[str, int, int]]:
        """Name, bytes and time of fetching of each copy; what killed processes left behind is deleted."""
        for folder, folders, names in os.walk(self.folder):
            folders[:] = [name for name in folders if name != _LEASES]
            below = os.path.relpath(folder, self.folder)
            for name in names:
                if (match := _TEMPORARY.fullmatch(name)) and os.path.normpath(f"{below}/{match[1]}") not in coming:
                    remove_leftovers(Path(folder), match[1])
                if not name.startswith("."):
                    with contextlib.suppress(OSError):
                        status = os.stat(os.path.join(folder, name))
                        yield os.path.normpath(f"{below}/{name}"), status.st_size, status.st_ctime_ns

    def _leases(self) -> Iterator[_Lease]:
        """Those of living processes; others are deleted."""
        yield self._own
        own = None if self._file is None else self._file.name
        for path in (self.folder / _LEASES).glob("*.json"):
            if str(path) == own:
                continue
            with contextlib.suppress(OSError, ValueError):
                if (file := try_lock(path)) is not None:
                    file.close()
                    remove(path)
                else:
                    yield parse_json(path.read_bytes(), _Lease, path.name)

    def _write(self) -> None:
        """Write the lease."""
        if self._file is None or not os.path.exists(self._file.name):
            make_folder(self.folder / _LEASES)
            path = self.folder / _LEASES / f"{os.getpid()}-{os.urandom(4).hex()}.json"
            self._file = _try_lock(path)
            assert self._file is not None
            weakref.finalize(self, _give_up, self._file, os.getpid())
        try:
            self._file.truncate(0)
            self._file.write(json.dumps(msgspec.to_builtins(self._own)))
            self._file.flush()
        except OSError as error:
            raise ValueError(f"could not write {printable(self._file.name)}: {error.strerror}") from None

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Alone among the processes and threads of the machine, for a moment."""
        if self._pid != os.getpid():  # a process that was forked
            self._reset()
        make_folder(self.folder)  # it may have been deleted
        with _GUARD, locked(self.folder / ".lock"):
            yield


def _try_lock(path: Path) -> IO[str] | None:
    """:func:`~dmjd.files.try_lock`; ValueError where there are no locks."""
    try:
        return try_lock(path)
    except OSError as error:
        raise ValueError(
            f"{printable(path)} can't be locked ({error.strerror}): give --cache-dir a folder on a local disk"
        ) from None


def _give_up(file: IO[str], pid: int) -> None:
    """Delete a lease, in the process that has it."""
    if os.getpid() == pid:
        remove(Path(file.name))
    with contextlib.suppress(OSError):
        file.close()
