"""Copies of single remote images, in a folder that the processes of a machine share and whose size may be bounded."""

import contextlib
import hashlib
import os
import struct
import time
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dmjd.data.sources.transfer import MissingRemoteFile, read_whole
from dmjd.files import locked, make_folder
from dmjd.text import printable

AT_ONCE = 16  # requests of a process: they wait for the network, not for each other

_HEADER = struct.Struct("<QI")  # of a copy: bytes of the image, and their CRC-32

_WRITING = 600  # seconds that an image may take to be written

_KEPT = 0.8  # of the bound, after copies made room: room is made for many images at once


class ImageCache:
    """The copies; picklable. An image that is not here is fetched. The oldest copies make room for others.

    Args:
        folder: the folder, which exists. bound: bytes of all copies together; None: no bound.
    """

    def __init__(self, folder: Path, bound: int | None) -> None:
        self._folder, self._bound = str(folder), bound

    def read(self, address: str) -> bytes:
        """An encoded image.

        Raises:
            MissingRemoteFile: if the server does not have it.
            ConnectionError: if it does not arrive in several attempts.
            ValueError: if the disk is full.
        """
        path = self._path(address)
        content = _read(path)
        if content is None:
            content = read_whole(address)
            self._store(path, content)
        return content

    def size(self, address: str) -> int | None:
        """The bytes of an image that is here; None: it is not."""
        with contextlib.suppress(OSError):
            return os.stat(self._path(address)).st_size - _HEADER.size
        return None

    def fetch(self, addresses: Iterable[str]) -> None:
        """Fetch images that are missing, several at a time. Those that the server does not have are left out.

        Raises:
            ConnectionError, ValueError: as for :meth:`read`.
        """
        missing = [address for address in addresses if not os.path.exists(self._path(address))]
        if len(missing) > 1:
            with ThreadPoolExecutor(min(AT_ONCE, len(missing))) as pool:
                try:
                    list(pool.map(self._fetch, missing))
                finally:
                    pool.shutdown(cancel_futures=True)

    def _fetch(self, address: str) -> None:
        with contextlib.suppress(MissingRemoteFile):  # found again, and told, when it is read
            self.read(address)

    def _path(self, address: str) -> str:
        name = hashlib.sha256(address.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        return f"{self._folder}/{name[:2]}/{name[2:]}"

    def _store(self, path: str, content: bytes) -> None:
        """Keep a copy, whole or not at all; without fsync, since a damaged copy is noticed and fetched again."""
        length = len(content) + _HEADER.size
        if self._bound is not None:
            if length > self._bound:
                return
            self._make_room(length)
        temporary = f"{path}.{os.urandom(4).hex()}.tmp"
        try:
            make_folder(Path(path).parent)
            with open(temporary, "wb") as file:
                file.write(_HEADER.pack(len(content), zlib.crc32(content)) + content)
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.remove(temporary)
            reason = (error.strerror or str(error)).lower()
            raise ValueError(
                f"the cache {printable(self._folder)} can't take an image of {length} bytes ({reason}): free some "
                "space, or give --cache-dir a folder on a larger disk, or --cache-gb a smaller size"
            ) from None

    def _make_room(self, length: int) -> None:
        """Count the bytes of a copy that is to come, and delete others if they are too many."""
        total_file = Path(self._folder, ".bytes")
        with locked(Path(self._folder, ".lock")):
            try:
                total = int(total_file.read_text()) + length
            except (OSError, ValueError):
                total = sum(size for _, size, _ in self._copies()) + length
            if self._bound is not None and total > self._bound:
                total = self._sweep(int(_KEPT * self._bound) - length) + length
            total_file.write_text(str(total))

    def _sweep(self, most: int) -> int:
        """Delete the oldest copies until the others take so many bytes at most; returns what they take."""
        copies = sorted(self._copies())
        total = sum(size for _, size, _ in copies)
        fresh = time.time_ns() - _WRITING * 10**9
        for changed, size, path in copies:
            if total <= most:
                break
            if path.endswith(".tmp") and changed > fresh:  # another process is writing it
                continue
            with contextlib.suppress(OSError):
                os.remove(path)
            total -= size
        return total

    def _copies(self) -> Iterator[tuple[int, int, str]]:
        """Time, bytes and path of each copy; also of what killed processes left behind."""
        for folder, _, names in os.walk(self._folder):
            for name in names if folder != self._folder else ():
                with contextlib.suppress(OSError):
                    status = os.stat(path := os.path.join(folder, name))
                    yield status.st_mtime_ns, status.st_size, path


def _read(path: str) -> bytes | None:
    """The content of a copy; None if there is none, or it is damaged."""
    try:
        with open(path, "rb") as file:
            copy = file.read()
        size, crc = _HEADER.unpack_from(copy)
    except (OSError, struct.error):
        return None
    content = copy[_HEADER.size :]
    return content if (len(content), zlib.crc32(content)) == (size, crc) else None
