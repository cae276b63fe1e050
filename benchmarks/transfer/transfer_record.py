"""Records of the transfer studies: seconds of training, names of data sets without their paths."""

import json
from pathlib import Path
from typing import Any


def training_seconds(folder: Path) -> float:
    """Seconds of the optimizer steps of a run, including waiting for images, excluding evaluation."""
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return float([line["seconds"] for line in lines if "seconds" in line][-1])


def portable(data: dict[str, Any]) -> dict[str, Any]:
    """An evaluation's description of its data, with paths shortened to their last part."""
    return {k: Path(v).name if k in ("train", "test") else v for k, v in data.items()}


def write_record(file: Path, content: dict[str, Any]) -> None:
    """The record as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
