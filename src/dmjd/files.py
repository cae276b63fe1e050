"""Files: atomic writes, and safetensors with JSON metadata."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save, save_file
from torch import Tensor

METADATA_KEY = "dmjd"  # the key in a file's metadata that holds our JSON


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Write ``path`` completely or not at all: yields a temporary file in the same folder, then fsync and rename.

    Raises:
        ValueError: if the disk is full or the folder is not writable. An earlier file at ``path`` is kept.
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
    """Write a text file atomically, as UTF-8."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a binary file atomically."""
    with atomic(path) as temporary:
        temporary.write_bytes(content)


def read_safetensors(path: Path, kind: str = "safetensors file") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and metadata. No code in the file is executed.

    Args:
        path: the file.
        kind: kind of file, for error messages.

    Returns:
        The tensors, on the CPU, and the JSON metadata; ``{}`` for a file that dmjd did not write.

    Raises:
        ValueError: if the file is missing, cut short or of another format.
    """
    try:
        with safetensors.safe_open(path, "pt") as opened:
            text = (opened.metadata() or {}).get(METADATA_KEY)
        tensors = load_file(path)
        metadata = {} if text is None else json.loads(text)
    except (safetensors.SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a readable {kind} ({error}); it may be cut short") from None
    return tensors, metadata


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and JSON metadata atomically, in the format of :func:`safetensors_bytes`."""
    with atomic(path) as temporary:
        save_file(_on_cpu(tensors), temporary, metadata=_header(metadata))


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    """Tensors and JSON metadata as the bytes of a safetensors file. Equal content gives equal bytes."""
    return save(_on_cpu(tensors), metadata=_header(metadata))


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
