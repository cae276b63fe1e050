"""Remote files (``https://``, ``s3://``, ``hf://``, ...) through fsspec: fetched whole, once, into a cache."""

import errno
import functools
import os
import re
import shutil
import time
import urllib.parse
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from dmjd.data.sources.base import short_hash
from dmjd.data.sources.paths import cache_folder
from dmjd.data.sources.progress import counted
from dmjd.files import atomic, locked, make_folder
from dmjd.text import file_name, printable
from dmjd.warning import DMJDWarning

_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")

_ATTEMPTS, _FIRST_WAIT, _LONGEST_WAIT = 6, 1.0, 30.0  # seconds before the second attempt, doubled for each other one

_AT_ONCE = 4  # files

_MOST_FILES = 1_000_000  # of an address

_SILENCE = 60.0  # seconds without a byte after which a server is given up

_SPARE = 1 << 28  # bytes that are left free on the disk of the cache

_FINAL = (401, 403, 404, 410)  # replies of a server that another attempt does not change

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # the same of the disk of the cache

T = TypeVar("T")


def is_url(data: str) -> bool:
    """Whether ``data`` is the address of remote files."""
    return _URL.match(data) is not None


def fetch(url: str) -> list[Path]:
    """Local copies of remote files, sorted. Files that are in the cache, in their remote size, are not fetched again.

    Processes of a machine share the cache, and fetch a file once.

    Args:
        url: an address; ``{000..099}`` stands for the numbers of a range, and ``*`` for any characters where the server
            lists files (S3 and the like, and Hugging Face).

    Raises:
        ValueError: naming the file that cannot be fetched, after several attempts, and why; or if the disk is too full.
    """
    system, paths = _expanded(url)
    folder = cache_folder("remote", "remote files are kept")
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        targets = [folder / _local_name(system, path) for path in paths]
        sizes = _sizes(pool, system, paths, targets)
        missing = [row for row in zip(paths, sizes, targets, strict=True) if not _is_there(row[2], row[1])]
        _check_space(folder, sum(size or 0 for _, size, _ in missing))
        fetched = pool.map(lambda row: _fetch_one(system, *row), missing)
        try:
            for _ in counted(fetched, "fetching files, once", len(missing)):
                pass
        finally:
            pool.shutdown(cancel_futures=True)
    return sorted(targets)


def _sizes(pool: ThreadPoolExecutor, system: Any, paths: list[str], targets: list[Path]) -> list[int | None]:
    """The sizes of the files on the server. If it does not answer and all are in the cache, those of the copies."""
    here = all(target.exists() for target in targets)
    try:
        attempts = 1 if here else _ATTEMPTS
        return list(pool.map(lambda path: _retried(path, lambda: system.info(path)["size"], attempts), paths))
    except ValueError as error:
        if not here:
            raise
        warnings.warn(f"{error}; the copies in the cache are used", DMJDWarning, stacklevel=2)
        return [target.stat().st_size for target in targets]


def _expanded(url: str) -> tuple[Any, list[str]]:
    """The file system, and the paths that an address stands for.

    Raises:
        ValueError: if a package for it is missing, or there are none.
    """
    import fsspec  # slow to import

    options = {}
    if url.lower().startswith(("http://", "https://")):
        try:
            import aiohttp

            # Its own limit is five minutes for a file, however large.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE, sock_read=_SILENCE)
            options = {"client_kwargs": {"timeout": timeout}}
        except ImportError:
            raise ValueError(f"{printable(url)} needs aiohttp: pip install 'dmjd[remote]'") from None
    addresses = list(_ranges(url))
    try:
        system, _ = fsspec.core.url_to_fs(addresses[0], **options)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{printable(url)} can't be fetched ({error}); see pip install 'dmjd[remote]'") from None
    paths = [system._strip_protocol(address) for address in addresses]
    if "*" in url:
        paths = [found for path in paths for found in sorted(_retried(path, functools.partial(system.glob, path)))]
    if not paths:
        raise ValueError(f"there is no {printable(url)}")
    return system, paths


def _ranges(url: str) -> Iterator[str]:
    """``a-{08..10}`` -> ``a-08``, ``a-09``, ``a-10``."""
    match = _RANGE.search(url)
    if match is None:
        yield url
        return
    first, last = match.groups()
    if not 0 <= int(last) - int(first) < _MOST_FILES:
        raise ValueError(f"{printable(url)}: a range such as {{000..099}} names 1 to {_MOST_FILES:,} files, in order")
    for number in range(int(first), int(last) + 1):
        yield from _ranges(f"{url[: match.start()]}{number:0{len(first)}d}{url[match.end() :]}")


def _local_name(system: Any, path: str) -> str:
    """Where a file lies in the cache: much as on the server, and a hash of its address, which alone is unmistakable."""
    address = system.unstrip_protocol(path)
    url = urllib.parse.urlsplit(address)
    parts = [url.scheme, url.hostname or "", *urllib.parse.unquote(url.path).split("/")]  # without user and password
    folders = [file_name(part, 100) for part in parts[:-1] if part]
    stem, ending = os.path.splitext(file_name(parts[-1], 200))  # the order of the names on the server stays
    return os.path.join(*folders, f"{stem}-{short_hash([address])}{ending}")


def _fetch_one(system: Any, path: str, size: int | None, target: Path) -> None:
    """Fetch a file, unless another process did meanwhile."""
    make_folder(target.parent)
    with locked(target.with_name(f".{target.name}.lock")):
        if not _is_there(target, size):
            _retried(path, lambda: _copy(system, path, size, target))


def _copy(system: Any, path: str, size: int | None, target: Path) -> None:
    with atomic(target) as temporary:
        system.get_file(path, str(temporary))
        got = temporary.stat().st_size
        if size is not None and got != size:
            raise ConnectionError(f"{got} of {size} bytes arrived")


def _is_there(target: Path, size: int | None) -> bool:
    try:
        return (size is None and target.exists()) or target.stat().st_size == size
    except OSError:
        return False


def _retried(path: str, action: Callable[[], T], attempts: int = _ATTEMPTS) -> T:
    """The result of an action, which is tried several times, with longer and longer waits.

    Raises:
        ValueError: if the last attempt fails, or another one would not help.
    """
    wait = _FIRST_WAIT
    for attempt in range(1, attempts + 1):
        try:
            return action()
        except Exception as error:  # clients raise errors of dozens of types
            cause = _cause(error)
            if attempt == attempts or _is_final(cause):
                tries = f", {attempt} attempts" if attempt > 1 else ""
                raise ValueError(f"{printable(path)} can't be fetched ({_reason(cause)}{tries})") from None
        time.sleep(wait)
        wait = min(2 * wait, _LONGEST_WAIT)
    raise AssertionError("the loop returns or raises")


def _cause(error: BaseException) -> BaseException:
    """The error behind an error: clients turn most into FileNotFoundError, and atomic writes into ValueError."""
    while error.__cause__ is not None and isinstance(error, FileNotFoundError | ValueError):
        error = error.__cause__
    return error


def _is_final(error: BaseException) -> bool:
    full = isinstance(error, OSError) and error.errno in _DISK
    return full or isinstance(error, FileNotFoundError | PermissionError | ImportError) or _status(error) in _FINAL


def _status(error: BaseException) -> int | None:
    """The reply of a server that an error is about."""
    return getattr(error, "status", None)


def _reason(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    status = _status(error)
    text = f"the server replied {status}" if status else str(error) or type(error).__name__
    return printable(text.splitlines()[0])[:200]


def _check_space(folder: Path, needed: int) -> None:
    """ValueError if so many bytes do not fit on the disk of the cache."""
    free = shutil.disk_usage(folder).free - _SPARE
    if needed > free:
        raise ValueError(
            f"the remote files take {needed / 1e9:.1f} GB more, and {printable(folder)} has room for "
            f"{max(free, 0) / 1e9:.1f} GB: set XDG_CACHE_HOME to a folder on a larger disk"
        )
