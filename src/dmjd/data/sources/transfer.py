"""Transfers of remote files through fsspec: tried again when they fail, and checked."""

import base64
import errno
import functools
import hashlib
import math
import os
import re
import time
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from dmjd.data.sources.addresses import is_http, without_secrets
from dmjd.data.sources.base import short_hash
from dmjd.files import atomic, make_folder
from dmjd.text import file_name, printable

_ATTEMPTS, _FIRST_WAIT, _LONGEST_WAIT = 6, 1.0, 30.0  # seconds before the second attempt, doubled for each other one

_SILENCE = 60.0  # seconds without a byte after which a server is given up

_FINAL = (401, 403, 404, 410)  # replies of a server that another attempt does not change

_NOT_GIVEN = (403, 404, 410)  # of these: for this file. S3 replies 403 where there is none, and its list is not public

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)  # the same of the disk of the cache

# What servers tell about the content of a file, the most reliable first; several machines may serve one file.
_CONTENT = ("sha256", "md5Hash", "crc32c", "Content-MD5", "content_md5", "Digest", "ETag", "etag", "blob_id")

_TIMES = ("Last-Modified", "LastModified", "last_modified", "updated", "mtime")

_TAGS = ("ETag", "Last-Modified")  # headers of HTTP, the more reliable first

_UNCHECKED = 10.0  # seconds for which parts of a file are read, without HTTP, before it is described again

_SECONDS = 1 << 30

_CHANGED = "it has changed on the server; the same command takes the new file"

_CHECKED: dict["RemoteFile", float] = {}  # when a file was described again

T = TypeVar("T")


class _ChangedError(Exception):
    """A file is not the one that the server described before; found in an attempt."""


class _ReplacedError(ValueError):
    """The same, as the result of :func:`retried`."""


class ChangedFile(OSError):  # noqa: N818, the name is clear without "Error"
    """A file that was replaced while it was read: its images are not those that were listed."""


class MissingRemoteFile(ValueError):  # noqa: N818, the name is clear without "Error"
    """A file that its server does not have, or does not give."""


class RemoteFile(NamedTuple):
    """A file on a server.

    Attributes:
        address: the whole address.
        size: its bytes; None: the server does not tell.
        version: a time in ns that stands for the content, as far as the server tells: checksum, ETag or time of change.
            It is given to the copy as its time of change.
        digest: (name of the algorithm, hexadecimal digits) of the content; None: the server does not tell.
        tag: name and value of the header that stands for the content in replies over HTTP; None: there is none.
    """

    address: str
    size: int | None
    version: int
    digest: tuple[str, str] | None = None
    tag: tuple[str, str] | None = None

    def is_at(self, path: Path) -> bool:
        """Whether a file is a copy of this version."""
        try:
            status = path.stat()
        except OSError:
            return False
        return self.size in (None, status.st_size) and status.st_mtime_ns == self.version

    @property
    def local_name(self) -> str:
        """Where a copy lies in a cache: much as on the server, and a hash of the address, which is unmistakable."""
        url = urllib.parse.urlsplit(self.address)
        parts = [url.scheme, url.hostname or "", *urllib.parse.unquote(url.path).split("/")]  # without user, password
        folders = [file_name(part, 100) for part in parts[:-1] if part]
        stem, ending = os.path.splitext(file_name(parts[-1], 200))
        return os.path.join(*folders, f"{stem}-{short_hash([self.address])}{ending}")


def opened(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it.

    Raises:
        ValueError: if a package for it is missing.
    """
    protocol, _, rest = address.partition("://")
    system = _system(protocol.lower(), re.split("[/?#]", rest, maxsplit=1)[0], os.getpid())
    return system, system._strip_protocol(f"{protocol.lower()}://{rest}")


@functools.lru_cache(maxsize=8)
def _system(protocol: str, host: str, pid: int) -> Any:
    """A file system for this process: one that another process opened does not work after a fork."""
    import fsspec  # slow to import

    options = {}
    if is_http(f"{protocol}://"):
        try:
            import aiohttp

            # Its own limit is five minutes for a file, however large.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE, sock_read=_SILENCE)
            trace = aiohttp.TraceConfig()
            trace.on_request_end.append(_keep_headers)
            options = {"client_kwargs": {"timeout": timeout, "trace_configs": [trace]}}
        except ImportError:
            raise ValueError(f"{protocol}:// needs aiohttp: pip install 'dmjd[remote]'") from None
    name = f"{protocol}://{host}"
    try:
        return fsspec.core.url_to_fs(name, **options)[0]
    except (ImportError, ValueError) as error:
        raise ValueError(f"{printable(name)} can't be fetched ({error}); see pip install 'dmjd[remote]'") from None


async def _keep_headers(_: Any, context: Any, reply: Any) -> None:
    """Keep the headers of a reply for :func:`read_range`, whose file system returns the content alone."""
    if context.trace_request_ctx is not None:
        context.trace_request_ctx.append(reply.response.headers)


def stated(address: str, attempts: int | None = None) -> RemoteFile:
    """A file as its server describes it.

    Raises:
        ValueError: if there is no such file, or the server does not answer.
    """
    system, path = opened(address)
    return _described_by(address, retried(address, lambda: system.info(path), attempts))


def _described_by(address: str, info: Mapping[str, Any]) -> RemoteFile:
    """A file as the facts of its server say."""
    facts = next(([str(info[key])] for key in (*_CONTENT, *_TIMES) if info.get(key)), [])
    lfs = info.get("lfs") or {}  # of Hugging Face
    sha256 = lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)
    md5 = info.get("md5Hash") or info.get("Content-MD5")
    digest = ("sha256", str(sha256)) if sha256 else ("md5", _hexadecimal(md5)) if md5 else None
    number = int(short_hash([str(info["size"]), *(digest or facts)]), 16) % _SECONDS
    tag = next(((name, str(info[name])) for name in _TAGS if info.get(name)), None)
    return RemoteFile(address, info["size"], 2 * number * 10**9, digest, tag)


def _hexadecimal(digest: str) -> str:
    """A digest in base64, as headers have it."""
    try:
        return base64.b64decode(digest).hex()
    except ValueError:
        return digest


def copy(file: RemoteFile, target: Path) -> None:
    """Copy a file to this machine, whole or not at all; its time of change is the version.

    Raises:
        ValueError: if it does not arrive whole in several attempts, or another one would not help: if the file on the
            server is another one by now.
    """
    retried(file.address, lambda: _copy(file, target), needed=file.size)


def _copy(file: RemoteFile, target: Path) -> None:
    system, path = opened(file.address)
    make_folder(target.parent)  # it may have been deleted
    with atomic(target) as temporary:
        system.get_file(path, str(temporary))
        system.invalidate_cache(path)  # of what it said before
        if _described_by(file.address, system.info(path)).version != file.version:
            raise _ChangedError(_CHANGED)
        got = temporary.stat().st_size
        if file.size is not None and got != file.size:
            raise ConnectionError(f"{got} of {file.size} bytes arrived")
        if file.digest is not None:
            algorithm, expected = file.digest
            with temporary.open("rb") as content:
                if hashlib.file_digest(content, algorithm).hexdigest() != expected.lower():
                    raise ConnectionError(f"what arrived does not match the {algorithm} that the server tells")
        os.utime(temporary, ns=(file.version, file.version))


def read_range(file: RemoteFile, offset: int, length: int) -> bytes:
    """Some bytes of a file.

    Raises:
        ConnectionError: if they do not arrive in several attempts.
        ChangedFile: if the file on the server is another one by now.
    """

    def action() -> bytes:
        system, path = opened(file.address)
        headers: list[Mapping[str, str]] = []
        # Uncompressed, as the size and the tag of the file are.
        more = {"trace_request_ctx": headers, "headers": {"Accept-Encoding": "identity"}}
        more = more if is_http(file.address) else {}
        content = bytes(system.cat_file(path, start=offset, end=offset + length, **more))
        _check_same(file, headers[-1] if headers else None)
        if len(content) > length:  # a server that knows no ranges sends all
            content = content[offset : offset + length]
        if len(content) != length:
            raise ConnectionError(f"{len(content)} of {length} bytes arrived")
        return content

    if not length:
        return b""
    try:
        return retried(file.address, action)
    except _ReplacedError as error:
        raise ChangedFile(str(error)) from None
    except ValueError as error:
        raise ConnectionError(str(error)) from None  # the machine's, not the image's


def _check_same(file: RemoteFile, headers: Mapping[str, str] | None) -> None:
    """Raise an error if a reply is about another file than was described.

    Other protocols than HTTP do not tell with a part of a file, so the file is described again from time to time.
    """
    if headers is None:
        system, path = opened(file.address)
        if time.monotonic() - _CHECKED.get(file, -math.inf) > _UNCHECKED:
            system.invalidate_cache(path)  # of what it said before
            changed = _described_by(file.address, system.info(path)).version != file.version
            _CHECKED[file] = time.monotonic()
        else:
            changed = False
    else:
        name, before = file.tag or ("", "")
        now = headers.get(name, before)
        size = headers.get("Content-Range", "").rpartition("/")[2]
        changed = now.removeprefix("W/") != before.removeprefix("W/")
        changed |= size.isdigit() and file.size is not None and int(size) != file.size
    if changed:
        raise _ChangedError(_CHANGED)


def read_whole(address: str) -> bytes:
    """The content of a file. Its size is checked by HTTP itself.

    Raises:
        MissingRemoteFile: if the server does not have it.
        ConnectionError: if it does not arrive in several attempts.
    """

    def action() -> bytes:
        system, path = opened(address)
        return bytes(system.cat_file(path))

    try:
        return retried(address, action)
    except MissingRemoteFile:
        raise
    except ValueError as error:
        raise ConnectionError(str(error)) from None


def retried(address: str, action: Callable[[], T], attempts: int | None = None, needed: int | None = None) -> T:
    """The result of an action, which is tried several times, with longer and longer waits.

    Args:
        address: of the file, for messages. action: what is tried.
        attempts: how often; None: six times.
        needed: bytes that it writes to the disk of the cache.

    Raises:
        MissingRemoteFile: if it is about a file that the server does not have.
        ValueError: if the last attempt fails otherwise, or another one would not help.
    """
    wait, attempts = _FIRST_WAIT, attempts or _ATTEMPTS
    for attempt in range(1, attempts + 1):
        try:
            return action()
        except Exception as error:  # clients raise errors of dozens of types
            cause = _cause(error)
            if attempt == attempts or _is_final(cause):
                tries = f", {attempt} attempts" if attempt > 1 else ""
                name = printable(without_secrets(address))
                missing = _is_missing(cause) or _status(cause) in _NOT_GIVEN
                changed = isinstance(cause, _ChangedError)
                kind = MissingRemoteFile if missing else _ReplacedError if changed else ValueError
                cure = _disk_cure(needed) if _is_of_disk(cause) else ""
                raise kind(f"{name} can't be fetched ({_reason(cause)}{tries}){cure}") from None
        time.sleep(wait)
        wait = min(2 * wait, _LONGEST_WAIT)
    raise AssertionError("the loop returns or raises")


def _cause(error: BaseException) -> BaseException:
    """The error behind an error: clients turn most into FileNotFoundError, and atomic writes into ValueError."""
    while error.__cause__ is not None and isinstance(error, FileNotFoundError | ValueError):
        error = error.__cause__
    return error


def _is_final(error: BaseException) -> bool:
    final = isinstance(error, PermissionError | ImportError | _ChangedError) or _status(error) in _FINAL
    return final or _is_of_disk(error) or _is_missing(error)


def _is_of_disk(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in _DISK


def _disk_cure(needed: int | None) -> str:
    size = "space" if needed is None else f"{needed / 1e9:.2g} GB for it"
    return f": free {size}, or give --cache-dir a folder on a larger disk, or --cache-gb a smaller size"


def _is_missing(error: BaseException) -> bool:
    """Whether the server has no such file. Errors of this machine's files have a number."""
    return isinstance(error, FileNotFoundError) and error.errno is None


def _status(error: BaseException) -> int | None:
    """The reply of a server that an error is about."""
    return getattr(error, "status", None)


def _reason(error: BaseException) -> str:
    if _is_missing(error):
        return "no such file"
    if isinstance(error, OSError) and _is_of_disk(error):
        return f"the disk of the cache: {(error.strerror or str(error)).lower()}"
    status = _status(error)
    text = f"the server replied {status}" if status else str(error) or type(error).__name__
    return printable(text.splitlines()[0])[:200]
