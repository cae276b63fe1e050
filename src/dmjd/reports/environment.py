"""The machine and versions that a run was trained with, kept in its folder: ``environment.json``."""

import contextlib
import json
from pathlib import Path
from typing import Any

import torch

from dmjd.checked_json import read_json
from dmjd.engine.device import machine
from dmjd.evaluation.results import versions
from dmjd.files import write_text

ENVIRONMENT_FILE = "environment.json"


def write_environment(run: Path, device: torch.device, num_processes: int) -> None:
    """Record machine and versions in a run folder; those of an earlier part of the run are replaced.

    A failure is ignored: a training does not depend on it.
    """
    facts = {"device": device.type, "processes": num_processes, **machine(device), **versions()}
    with contextlib.suppress(ValueError):
        write_text(run / ENVIRONMENT_FILE, json.dumps(facts, indent=2) + "\n")


def read_environment(run: Path) -> dict[str, Any]:
    """What :func:`write_environment` wrote; empty if it is missing, as in runs of former versions, or damaged."""
    try:
        return read_json(run / ENVIRONMENT_FILE, dict[str, Any])
    except (OSError, ValueError):
        return {}


def machine_text(environment: dict[str, Any]) -> str | None:
    """The machine in a few words; None if it is not recorded."""
    processor = environment.get("gpu") or environment.get("cpu")
    if not processor:
        return None
    cores = environment.get("cores")
    count = environment.get("processes")
    parts = [str(processor)]
    if not environment.get("gpu") and cores:
        parts.append(f"{cores} core{'s' * (cores != 1)}")
    if isinstance(count, int) and count > 1:
        parts.append(f"{count} processes")
    return ", ".join(parts)
