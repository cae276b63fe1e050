"""Earlier trainings of the same task that a new one does not continue, and why not."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dmjd.checked_json import read_json
from dmjd.encoders.headers import CHECKPOINTS

_SHOWN = 4  # differing settings in a message

_CHANGED = {
    "data": "other images or labels",
    "encoder": "other weights of the encoder",
    "classes": "other classes",
    "validation": "other images to validate on while it trains",
}


def find_similar(folder: Path, identity: Mapping[str, Any]) -> str | None:
    """Why a new training does not continue an earlier one, for a message; None if there is none that a user may expect.

    These are unfinished trainings, and finished ones that differ in nothing but the data or the images for validation.

    Args:
        folder: folder of the new training, ``<start>-seed<seed>-<key>``.
        identity: everything that the training depends on.
    """
    new = json.loads(json.dumps(identity, default=str))  # as the former one was stored
    files = folder.parent.glob(f"{folder.name.rpartition('-')[0]}-*/config.json")
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        try:
            differences = list(_differences(read_json(file, dict[str, Any]), new))
        except ValueError:
            continue
        finished = (file.parent / "result.json").exists()
        begun = any((file.parent / CHECKPOINTS).glob("*.safetensors"))
        if {*differences} <= {_CHANGED["data"], _CHANGED["validation"]} if finished else begun:
            described = "; ".join(differences[:_SHOWN]) or "it is of another version of dmjd"
            more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
            kind = "finished" if finished else "unfinished"
            return f"it differs from the {kind} one in {file.parent}, which is kept: {described}{more}"
    return None


def _differences(former: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for name, value in new.items():
        old = former.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            yield from _differences(old, value)
        elif old != value:
            yield _CHANGED.get(name, f"{name}: {old} -> {value}")
