"""Results as they come: one JSON file per part, written after each entry, that continues what an earlier visit left.

Entries are named. Those of earlier visits are read from ``benchmarks/results/gpu/`` and kept, so that the file of a
later visit replaces that of an earlier one.
"""

import json
import os
import platform
import time
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

RESULTS = ROOT / "benchmarks" / "results" / "gpu"


class Clock:
    """The seconds that a part may take.

    Args:
        seconds: from now on.
    """

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds left, negative when time is up."""
        return self._until - time.monotonic()


class Record:
    """The results of a part.

    Args:
        part: name of the part, and of its file.
        out: folder for the file of this visit.
        earlier: folder with the file of earlier visits.

    Attributes:
        entries: name -> result.
    """

    def __init__(self, part: str, out: Path, earlier: Path = RESULTS) -> None:
        self.file = out / f"{part}.json"
        self.entries: dict[str, Any] = {}
        self._head: dict[str, Any] = {}
        for folder in (earlier, out):
            if (file := folder / f"{part}.json").exists():
                content = json.loads(file.read_text(encoding="utf-8"))
                self.entries |= content.pop("entries")
                self._head |= content

    def describe(self, **head: Any) -> None:
        """Write what is not an entry, such as machine and versions."""
        self._head |= head
        self._write()

    def put(self, name: str, result: Any) -> None:
        """Write an entry."""
        self.entries[name] = result
        self._write()

    def _write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        content = {"date": date.today().isoformat(), **self._head, "entries": self.entries}
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.file)


def versions() -> dict[str, str]:
    """Versions of the packages that a result may depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "torchvision", "timm", "lightning", "transformers", "numpy", "datasets"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
