"""Files that survive: atomic writes and safetensors with JSON metadata."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import safetensors


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Write ``path`` whole or not at all: yields a temporary file beside it, then fsync and rename.

    Raises:
        ValueError: when the disk is full or the folder cannot be written; what was there before stays.
    """
    temporary = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"could not write {path}: {error}. What was saved before is untouched") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Atomic write of a text file."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    """Atomic write of a binary file."""
    with atomic(path) as temporary:
        temporary.write_bytes(content)


METADATA_KEY = "dmjd"
