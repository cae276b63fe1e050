"""Results of evaluations as files of a run."""

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
    """Changes with the images of either set."""
    return f"{train.fingerprint()}/{test.fingerprint()}"


def versions() -> dict[str, str]:
    """Of what a result may depend on."""
    return {"dmjd": __version__, "torch": torch.__version__, "python": platform.python_version()}


def key_of(encoder: Encoder, *parts: Any) -> str:
    """12 digits of this version, an encoder's architecture and preprocessing (not its weights), and any settings."""
    return short_hash(
        json.dumps(part, sort_keys=True, default=str) for part in (encoder_metadata(encoder), __version__, *parts)
    )


def write_result(folder: Path, task: str, result: Mapping[str, Any]) -> None:
    """``evaluation/<task>.json`` of a run folder; another that was there is kept as ``earlier/<task>-<n>.json``."""
    place = folder / "evaluation"
    file, content = place / f"{task}.json", json.dumps(result, indent=2) + "\n"
    place.mkdir(parents=True, exist_ok=True)
    if file.exists() and (before := file.read_text(encoding="utf-8")) != content:
        (place / "earlier").mkdir(exist_ok=True)
        free = next(n for n in itertools.count(1) if not (place / "earlier" / f"{task}-{n}.json").exists())
        write_text(place / "earlier" / f"{task}-{free}.json", before)
    write_text(file, content)


class Baselines:
    """Results of baselines kept with a run, so that a configuration is measured once.

    Args:
        folder: the run folder, or None to keep nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._file = folder / "evaluation" / BASELINES if folder is not None else None
        self._known: dict[str, dict[str, Any]] = {}
        if self._file is not None:
            with contextlib.suppress(OSError, ValueError):  # not there yet, or damaged: they are made anew
                self._known = json.loads(self._file.read_text(encoding="utf-8"))

    def get(self, key: str) -> dict[str, Any] | None:
        """The result of a configuration, or None."""
        return self._known.get(key)

    def put(self, key: str, result: dict[str, Any]) -> None:
        """Keep the result of a configuration."""
        self._known[key] = result
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._file, json.dumps(self._known, indent=2, sort_keys=True) + "\n")


def read_result(file: str | Path, encoder: Encoder) -> dict[str, Any] | None:
    """An earlier result of this very encoder on its run's own data with the default settings, or None.

    Args:
        file: ``<run>/evaluation/<task>.json``. encoder: as it is now.
    """
    try:
        result = json.loads(Path(file).read_text(encoding="utf-8"))
        same = result["encoder"] == weights_hash(encoder) and not result["overrides"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there, or not written by this version: it is made anew
    return result if same else None
