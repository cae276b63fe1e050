"""Remote files that are copied as a whole: shards and tables."""

import functools
import shutil
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from dmjd.data.sources.addresses import names_of, ranges
from dmjd.data.sources.paths import cache_folder
from dmjd.data.sources.progress import counted
from dmjd.data.sources.transfer import RemoteFile, copy, opened, retried, stated
from dmjd.files import locked, make_folder
from dmjd.text import printable
from dmjd.warning import DMJDWarning

_AT_ONCE = 4  # files

_ASKED_AT_ONCE = 16  # sizes

_SPARE = 1 << 28  # bytes that are left free on the disk of the cache

T = TypeVar("T")


class Copies(NamedTuple):
    """Copies of remote files.

    Attributes:
        folder: the address of the folder that holds them on the server, as messages show it.
        files: name below the folder -> copy, in the order of the names.
    """

    folder: str
    files: dict[str, Path]


def fetch(url: str, cache_dir: str | None = None) -> Copies:
    """Local copies of remote files. Files that are in the cache in their remote version are not fetched again.

    Processes of a machine share the cache, and fetch a file once.

    Args:
        url: an address; ``{000..099}`` stands for the numbers of a range, and ``*`` for any characters where the server
            lists files (S3 and the like, and Hugging Face).
        cache_dir: folder of the cache; None: that of the user.

    Raises:
        ValueError: naming the file that cannot be fetched, after several attempts, and why; or if the disk is too full.
    """
    folder = cache_folder("remote", "remote files are kept", cache_dir)
    addresses = addresses_of(url)
    files = _described(addresses, folder)
    targets = [folder / file.local_name for file in files]
    missing = [(file, target) for file, target in zip(files, targets, strict=True) if not file.is_at(target)]
    check_space(folder, sum(file.size or 0 for file, _ in missing))
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        fetched = pool.map(lambda row: _fetch_one(*row), missing)
        try:
            for _ in counted(fetched, "fetching files, once", len(missing)):
                pass
        finally:
            pool.shutdown(cancel_futures=True)
    root, names = names_of(addresses)
    return Copies(root, in_order(zip(names, targets, strict=True)))


def in_order(named: Iterable[tuple[str, T]]) -> dict[str, T]:
    """Files by their names, sorted like the paths of local ones."""
    return dict(sorted(named, key=lambda row: row[0].split("/")))


def described(addresses: list[str], attempts: int | None = None) -> list[RemoteFile]:
    """The files as their servers describe them; see :func:`~dmjd.data.sources.transfer.stated`."""
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        try:
            asked = pool.map(lambda address: stated(address, attempts), addresses)
            return list(counted(asked, "asking for the sizes of files", len(addresses)))
        finally:
            pool.shutdown(cancel_futures=True)


def _described(addresses: list[str], folder: Path) -> list[RemoteFile]:
    """The files on the server. If it does not answer and all are in the cache, they are the copies."""
    targets = [folder / RemoteFile(address, None, 0).local_name for address in addresses]
    here = all(target.exists() for target in targets)
    try:
        return described(addresses, 1 if here else None)
    except ValueError as error:
        if not here:
            raise
        warnings.warn(f"{error}; the copies in the cache are used", DMJDWarning, stacklevel=3)
        kept = [(address, target.stat()) for address, target in zip(addresses, targets, strict=True)]
        return [RemoteFile(address, status.st_size, status.st_mtime_ns) for address, status in kept]


def addresses_of(url: str) -> list[str]:
    """The addresses that one with ``{000..099}`` or ``*`` stands for.

    Raises:
        ValueError: if a package for it is missing, or there are none.
    """
    written = list(ranges(url))
    system, _ = opened(written[0])
    paths = [opened(address)[1] for address in written]
    if "*" in url:
        paths = [found for path in paths for found in sorted(retried(path, functools.partial(system.glob, path)))]
    if not paths:
        raise ValueError(f"there is no {printable(url)}")
    return [system.unstrip_protocol(path) for path in paths]


def _fetch_one(file: RemoteFile, target: Path) -> None:
    """Fetch a file, unless another process did meanwhile."""
    make_folder(target.parent)
    with locked(target.with_name(f".{target.name}.lock")):
        if not file.is_at(target):
            copy(file, target)


def check_space(folder: Path, needed: int) -> None:
    """ValueError if so many bytes do not fit on the disk of the cache."""
    free = shutil.disk_usage(folder).free - _SPARE
    if needed > free:
        raise ValueError(
            f"the remote files take {needed / 1e9:.1f} GB more, and {printable(folder)} has room for "
            f"{max(free, 0) / 1e9:.1f} GB: give --cache-dir a folder on a larger disk, or --cache-gb a smaller size"
        )
