"""``metrics.jsonl``: one JSON object per line, whole after kills and full disks."""

from pathlib import Path
from typing import Any

from dmjd.checked_json import parse_json
from dmjd.files import write_bytes
from dmjd.regular import check_regular


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Read the lines of a metrics file that are objects with a "step"; others, such as half a line, are left out.

    Raises:
        ValueError: if the file cannot be read.
    """
    return [values for _, values in _lines(file) if values is not None]


def _lines(file: Path) -> list[tuple[bytes, dict[str, Any] | None]]:
    """The lines of a file, each with its content or None if that is not a line of metrics."""
    try:
        check_regular(file)
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}; move it away") from None
    return [(line, _values(line)) for line in lines if line.strip()]


def _values(line: bytes) -> dict[str, Any] | None:
    try:
        values = parse_json(line, dict[str, Any], "line")
    except ValueError:
        return None
    step = values.get("step")
    return values if isinstance(step, int) and not isinstance(step, bool) else None


def cut_metrics(file: Path, step: int) -> int:
    """Delete the lines of steps after ``step``, which will be repeated, and damaged lines.

    Returns:
        How many damaged lines there were, besides a last one that a kill cut short.

    Raises:
        ValueError: if the file cannot be read or written.
    """
    if not file.exists():
        return 0
    lines = _lines(file)
    content = b"".join(line + b"\n" for line, values in lines if values is not None and values["step"] <= step)
    if content != file.read_bytes():
        write_bytes(file, content)
    return sum(values is None for _, values in lines[:-1])
