"""Files: atomic writes, locks, and safetensors with JSON metadata and a digest. All writing goes through this file."""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import safetensors
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from dmjd.checked_json import parse_json
from dmjd.regular import check_regular, irregular
from dmjd.system import OPEN_FILES_STAY, is_left_behind, lock

METADATA_KEY = "dmjd"  # the key in a file's metadata that holds our JSON

DIGEST_KEY = "sha256"  # the key in our JSON that holds the digest of the file

_OPEN = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)

_NO_DIGEST = "0" * 64

_MAX_HEADER = 100 << 20  # bytes; larger ones are refused by safetensors too

_DIGEST = re.compile(rb'\\"' + DIGEST_KEY.encode() + rb'\\": \\"([0-9a-f]{64})\\"')  # in the header: JSON within JSON

_DIGEST_ENTRY = re.compile(rb"(, )?" + _DIGEST.pattern + rb"(?(1)|(?:, )?)")  # with a comma

_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp")  # names that `atomic` gives to temporary files


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Write ``path`` completely or not at all: yields a temporary file in the same folder, then fsync and rename.

    The temporary file is locked, so that :func:`remove_leftovers` knows those of processes that were killed. Those of
    the same ``path`` are deleted first. A new file gets the permissions that the umask leaves, others keep theirs.

    Raises:
        ValueError: if the disk is full or the folder is not writable. An earlier file at ``path`` is kept.
    """
    temporary = None
    try:
        check_replaceable(path)
        remove_leftovers(path.parent, path.name)
        handle, temporary = _open_temporary(path.parent, path.name)
        with os.fdopen(handle, "rb") as file:
            mode = os.fstat(handle).st_mode
            if OPEN_FILES_STAY:
                file.close()
            else:
                with contextlib.suppress(OSError):  # a file system without locks
                    lock(file)
            yield temporary
            with temporary.open("r+b" if OPEN_FILES_STAY else "rb") as written:
                os.fsync(written.fileno())
            # Set again, because safetensors replaces the temporary file by one that is the owner's alone.
            temporary.chmod((path.stat().st_mode if path.exists() else mode) & 0o777)
            os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"could not write {path}: {error}. What was saved before is untouched") from error
    finally:
        if temporary is not None:
            remove(temporary)


def _sync_folder(folder: Path) -> None:
    """Write the names in a folder to the disk; Windows does so by itself and opens no folders."""
    if OPEN_FILES_STAY:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open_temporary(folder: Path, name: str) -> tuple[int, Path]:
    """Create a temporary file for the file of this name; returns its descriptor and path.

    ``tempfile.mkstemp`` would take all permissions from others, and the umask cannot be read without changing it for
    other threads.
    """
    while True:
        path = folder / f".{name}.{secrets.token_hex(4)}.tmp"
        with contextlib.suppress(FileExistsError):
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _OPEN, 0o666), path


def check_replaceable(path: Path) -> None:
    """Raise a ValueError if there is something else than a file, such as a folder, in the place of a file to write."""
    if path.exists() and (kind := irregular(path)):
        raise ValueError(f"could not write {path}: it is {kind}, not a file; move it")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as UTF-8; bytes of names that are not UTF-8 are escaped."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a binary file atomically."""
    with atomic(path) as temporary:
        temporary.write_bytes(content)


def copy_file(file: Path, target: Path) -> None:
    """Copy a file, atomically."""
    with atomic(target) as temporary:
        shutil.copyfile(file, temporary)


def append_lines(path: Path, lines: Sequence[str]) -> None:
    """Append lines to a text file: all of them, or, if that fails, none.

    Raises:
        ValueError: if the file cannot be written.
    """
    content = "".join(f"{line}\n" for line in lines).encode()
    try:
        with path.open("a+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":  # a half line that a kill left
                    content = b"\n" + content
            try:
                rest = memoryview(content)
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                file.truncate(end)
                raise
    except OSError as error:
        raise ValueError(f"could not write {path}: {error.strerror}") from error


def make_folder(folder: Path) -> None:
    """Create a folder and those above it, unless they exist; ValueError if that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"could not write {folder}: {error.strerror}") from None


def check_writable(path: Path, flag: str = "--out", folder: bool = False) -> None:
    """Check before long work that its result can be written. Nothing is created: missing folders count as writable.

    Args:
        path: the file that will be written, or a folder.
        flag: what the user gave it by, for error messages.
        folder: whether ``path`` is a folder.

    Raises:
        ValueError: if ``path`` is of the wrong kind, or nothing can be written to its folder.
    """
    try:
        where, inside = (path, ".") if folder else (path.parent, path.name)
        while not where.exists():
            where, inside = where.parent, where.name
        if path.is_dir() and not folder:
            raise ValueError(f"{flag} {path} is a folder; give a file")
        if path.is_file() and folder:
            raise ValueError(f"{flag} {path} is a file; give a folder")
        if path.exists() and not (path.is_dir() or path.is_file()):
            raise ValueError(f"{flag} {path} is not a regular file")
        remove_leftovers(where, inside)
        handle, temporary = _open_temporary(where, inside)
        os.close(handle)
        os.unlink(temporary)
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be written: {error.strerror}; give a path on a writable disk") from None


def move(path: Path, target: Path) -> None:
    """Rename a file or folder to a path that does not exist on the same disk; ValueError if that is impossible."""
    try:
        os.rename(path, target)
    except OSError as error:
        raise ValueError(f"could not move {path} to {target}: {error.strerror}") from None


def remove(path: Path) -> None:
    """Delete a file, if it exists and may be deleted."""
    with contextlib.suppress(OSError):
        path.unlink()


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Delete the temporary files that killed processes left in a folder. Those of living processes are locked and stay.

    Args:
        folder: the folder; it need not exist.
        name: only those of the file of this name; None: all.
    """
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            ours = _TEMPORARY.fullmatch(entry.name) and (name is None or entry.name.startswith(f".{name}."))
            if ours and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    if is_left_behind(entry.path):
                        os.unlink(entry.path)


def try_lock(path: Path) -> IO[str] | None:
    """Lock a file for this process: open, created if missing; None if another process holds the lock.

    Closing the file, or the end of the process and of the children that inherited it, releases the lock.

    Raises:
        OSError: if the file cannot be opened.
    """
    check_regular(path)
    file = path.open("a+", encoding="utf-8")  # "w" would erase what the owner wrote
    try:
        lock(file)
    except BlockingIOError:
        file.close()
        return None
    except OSError:
        file.close()
        raise
    return file


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file, which is created if missing; waits for other processes.

    On a file system without locks, nothing is held.

    Raises:
        ValueError: if the file cannot be opened.
    """
    try:
        check_regular(path)
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"could not write {path}: {error.strerror}") from None
    with file:
        with contextlib.suppress(OSError):
            lock(file, wait=True)
        yield


def read_safetensors(path: Path, kind: str = "safetensors file") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and metadata, and check the digest of a file that has one. No code in the file is executed.

    Args:
        path: the file.
        kind: kind of file, for error messages.

    Returns:
        The tensors, on the CPU, and the JSON metadata; ``{}`` for a file that dmjd did not write.

    Raises:
        ValueError: if the file is missing, cut short, of another format, or does not match its digest.
    """
    metadata = read_metadata(path, kind)
    try:
        if not _matches_digest(path):
            raise ValueError(f"{path} is damaged: its content does not match its digest; use a copy or write it again")
        return load_file(path), metadata
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, RuntimeError) as error:  # an unknown data type
        raise ValueError(f"{path} is not a readable {kind} ({error}); it may be cut short") from None


def read_metadata(path: Path, kind: str = "safetensors file") -> dict[str, Any]:
    """Read the JSON metadata alone, which takes no time; see :func:`read_safetensors`. The digest is not checked."""
    try:
        if path.exists() and not path.is_file():
            raise OSError("not a regular file")
        with safetensors.safe_open(path, "pt") as opened:
            text = (opened.metadata() or {}).get(METADATA_KEY)
        metadata = {} if text is None else parse_json(text, dict[str, Any], "metadata")
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable {kind} ({error}); it may be cut short") from None
    metadata.pop(DIGEST_KEY, None)
    return metadata


def read_digest(path: Path) -> str | None:
    """The digest in the header of a safetensors file, 64 hexadecimal digits; None if it has none or is no such file."""
    try:
        check_regular(path)
        with path.open("rb") as file:
            return digest_of(file.read(min(8 + int.from_bytes(file.read(8), "little"), _MAX_HEADER)))
    except OSError:
        return None


def digest_of(content: bytes) -> str | None:
    """The digest that stands in the bytes of a safetensors file."""
    match = _DIGEST.search(content)
    return match[1].decode() if match is not None else None


def _matches_digest(path: Path) -> bool:
    """Whether a file has the digest that its header holds; True if it holds none: another program wrote it."""
    with path.open("rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
        if (match := _DIGEST.search(header)) is None:
            return True
        digest = hashlib.sha256(length + _with_digest(header, match, _NO_DIGEST))
        return hashlib.file_digest(file, lambda: digest).hexdigest() == match[1].decode()


def _with_digest(header: bytes, match: re.Match[bytes], digest: str) -> bytes:
    return header[: match.start(1)] + digest.encode() + header[match.end(1) :]


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and JSON metadata atomically, in the format of :func:`safetensors_bytes`."""
    with atomic(path) as temporary:
        save_file(_on_cpu(tensors), temporary, metadata=_header({**metadata, DIGEST_KEY: _NO_DIGEST}))
        with temporary.open("r+b") as file:
            length = file.read(8)
            header = file.read(int.from_bytes(length, "little"))
            digest = hashlib.sha256(length + header)
            hashlib.file_digest(file, lambda: digest)
            file.seek(len(length))
            file.write(_signed(header, digest.hexdigest()))


def safetensors_bytes(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], others: Mapping[str, str] | None = None
) -> bytes:
    """Tensors and JSON metadata as the bytes of a safetensors file. Equal content gives equal bytes.

    The metadata holds the SHA-256 of the file, in which the digest's own digits count as zeros.

    Args:
        tensors: by name.
        metadata: JSON types.
        others: further entries of the file's metadata, for other libraries.
    """
    content = save(_on_cpu(tensors), metadata=_header({**metadata, DIGEST_KEY: _NO_DIGEST}))
    end = 8 + int.from_bytes(content[:8], "little")
    if others:  # added here, because safetensors does not keep their order
        header = json.loads(content[8:end])
        header["__metadata__"] |= dict(others)
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        content = len(text).to_bytes(8, "little") + text + content[end:]
        end = 8 + len(text)
    return content[:8] + _signed(content[8:end], hashlib.sha256(content).hexdigest()) + content[end:]


def _signed(header: bytes, digest: str) -> bytes:
    match = _DIGEST.search(header)
    assert match is not None
    return _with_digest(header, match, digest)


def content_hash(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """Hexadecimal SHA-256 of tensors and metadata: that of the file which version 0.1 wrote, without a digest."""
    return hashlib.sha256(save(_on_cpu(tensors), metadata=_header(metadata))).hexdigest()


def content_hash_of(content: bytes) -> str:
    """:func:`content_hash` of what :func:`safetensors_bytes` returned; saves the memory and time to write it again."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = _DIGEST_ENTRY.sub(b"", content[8:end], count=1).rstrip(b" ")
    header += b" " * (-len(header) % 8)
    found = hashlib.sha256(len(header).to_bytes(8, "little") + header)
    found.update(memoryview(content)[end:])
    return found.hexdigest()


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu().contiguous() for key, value in tensors.items()}


def _header(metadata: Mapping[str, Any]) -> dict[str, str]:
    # One key only: safetensors does not keep the order of several, and equal content must give equal bytes.
    return {METADATA_KEY: json.dumps(metadata, sort_keys=True)}


def tuples_to_lists(values: Mapping[str, Any]) -> dict[str, Any]:
    """Replace tuples by lists, for JSON. Inverse: :func:`lists_to_tuples`."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def lists_to_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Replace lists, as read from JSON, by tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
