"""Results of evaluations as files in a run folder."""

import contextlib
import itertools
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dmjd import __version__
from dmjd.data.sources.base import Source, short_hash
from dmjd.encoders.base import Encoder
from dmjd.encoders.weights import encoder_metadata, weights_hash
from dmjd.files import write_text

BASELINES = "baselines.json"


def data_fingerprint(train: Source, test: Source) -> str:
    """Identifier of the images of both sets."""
    return f"{train.fingerprint()}/{test.fingerprint()}"


def versions() -> dict[str, str]:
    """Versions that a result may depend on."""
    return {"dmjd": __version__, "torch": torch.__version__, "python": platform.python_version()}


def key_of(encoder: Encoder, *parts: Any) -> str:
    """12-digit hash of the version, the encoder's architecture and preprocessing (not its weights), and ``parts``."""
    return short_hash(
        json.dumps(part, sort_keys=True, default=str) for part in (encoder_metadata(encoder), __version__, *parts)
    )


def write_result(folder: Path, task: str, result: Mapping[str, Any]) -> None:
    """Write ``evaluation/<task>.json``; a different earlier result is kept as ``earlier/<task>-<n>.json``."""
    evaluation = folder / "evaluation"
    file, content = evaluation / f"{task}.json", json.dumps(result, indent=2) + "\n"
    evaluation.mkdir(parents=True, exist_ok=True)
    if file.exists() and (before := file.read_text(encoding="utf-8")) != content:
        earlier = evaluation / "earlier"
        earlier.mkdir(exist_ok=True)
        free = next(n for n in itertools.count(1) if not (earlier / f"{task}-{n}.json").exists())
        write_text(earlier / f"{task}-{free}.json", before)
    write_text(file, content)


class Baselines:
    """Results of baselines, kept in a run folder so that each configuration is measured once.

    Args:
        folder: the run folder; None: nothing is written.
    """

    def __init__(self, folder: Path | None) -> None:
        self._file = folder / "evaluation" / BASELINES if folder is not None else None
        self._results: dict[str, dict[str, Any]] = {}
        if self._file is not None:
            with contextlib.suppress(OSError, ValueError):  # missing or damaged: they are recomputed
                self._results = json.loads(self._file.read_text(encoding="utf-8"))

    def get(self, key: str) -> dict[str, Any] | None:
        """The result of a configuration, or None."""
        return self._results.get(key)

    def put(self, key: str, result: dict[str, Any]) -> None:
        """Store the result of a configuration."""
        self._results[key] = result
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._file, json.dumps(self._results, indent=2, sort_keys=True) + "\n")


def read_result(file: str | Path, encoder: Encoder) -> dict[str, Any] | None:
    """Read an earlier result of the same weights with default settings; None if there is none.

    Args:
        file: ``<run>/evaluation/<task>.json``.
        encoder: the encoder to compare with.
    """
    try:
        result = json.loads(Path(file).read_text(encoding="utf-8"))
        same = result["encoder"] == weights_hash(encoder) and not result["overrides"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # missing, or written by another version
    return result if same else None
