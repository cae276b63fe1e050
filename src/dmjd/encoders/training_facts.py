"""How an encoder was trained and how well it does, read from the folder that it was loaded from."""

import contextlib
import json
from pathlib import Path
from typing import Any, TypedDict

from dmjd.checked_json import check_json, read_json
from dmjd.encoders.folders import CONFIG, OURS, is_encoder_folder
from dmjd.encoders.headers import (
    CHECKPOINTS,
    DEVICE_KEY,
    NUM_IMAGES_KEY,
    WEIGHTS_KEY,
    Header,
    read_header,
    read_headers,
)
from dmjd.result_files import BASELINES, EVALUATION, headline, is_number, read_evaluation

PARTS = ("result", "random_init", "raw_pixels")  # of a result


class Scores(TypedDict):
    """The main score of an evaluation, 0 to 1: that of the encoder and those of its baselines, None if not measured."""

    metric: str
    data: str | None
    scores: dict[str, float | None]


class TrainingFacts(TypedDict, total=False):
    """What is known about the training of an encoder.

    Attributes:
        weights: hash of the weights that the facts are about.
        changed: whether the encoder's weights are others.
        data, num_images, img_size, recipe, init, steps, epochs, seconds, version: of the run. Paths are names only.
        images_seen: in all epochs.
        device: that the run was trained on, in words.
        evaluations: task -> scores.
    """

    weights: str
    changed: bool
    data: str
    num_images: int
    img_size: list[int]
    recipe: str
    init: str
    steps: int
    epochs: float
    seconds: float
    images_seen: int
    device: str
    evaluations: dict[str, Scores]


def read_facts(origin: Path | None, weights: str) -> TrainingFacts:
    """What is known about weights; whatever is missing or damaged is left out.

    Args:
        origin: what they were loaded from: a run folder, a file in it, a folder of an exported encoder, or None.
        weights: their hash. Results that were measured on other weights are left out.
    """
    if origin is None:
        return {"weights": weights, "evaluations": {}}
    run = origin
    if not origin.is_dir():
        run = origin.parent.parent if origin.parent.name == CHECKPOINTS else origin.parent
    if is_encoder_folder(run):
        return _of_folder(run, weights)
    facts = _settings(run) | _progress(origin, run, weights)
    facts["weights"] = weights
    facts["evaluations"] = _evaluations(run, weights)
    return facts


class TrainingCost(TypedDict):
    """What a training took: minutes on a device (in words), and images seen, repeated ones too; None if unknown."""

    minutes: float | None
    device: str | None
    images: int | None


def training_cost(origin: Path | None, weights: str) -> TrainingCost:
    """What the training of weights took, by the folder they were loaded from; see :func:`read_facts`."""
    facts = read_facts(origin, weights)
    if facts.get("changed"):  # those of the newest checkpoint, not of these weights
        facts = {"weights": weights}
    seconds = facts.get("seconds")
    minutes = None if seconds is None else round(seconds / 60, 2)
    return {"minutes": minutes, "device": facts.get("device"), "images": facts.get("images_seen")}


def _of_folder(folder: Path, weights: str) -> TrainingFacts:
    """The facts that an exported encoder carries."""
    try:
        stored = read_json(folder / CONFIG, dict[str, Any])[OURS].get("training", {})
        facts = check_json(stored, TrainingFacts, str(folder / CONFIG))
    except (OSError, ValueError, AttributeError):
        facts = {"weights": weights}
    if facts.get("weights") not in (weights, None):
        facts |= {"weights": weights, "changed": True, "evaluations": {}}
    return facts | {"evaluations": facts.get("evaluations", {}) | _evaluations(folder, weights)}


def _settings(run: Path) -> TrainingFacts:
    facts: TrainingFacts = {}
    try:
        config = read_json(run / "config.json", dict[str, Any])
    except (OSError, ValueError):
        return facts
    for name in ("recipe", "data", "init"):
        value = config.get(name)
        texts = value if isinstance(value, list) else [value]
        if all(isinstance(text, str) for text in texts):
            facts[name] = ", ".join(map(_name, texts))
    return facts


def _name(source: str) -> str:
    """The last part of a path: where images lie on somebody's disk is not for others."""
    return Path(source).name if source.startswith(("/", "~", ".")) or Path(source).exists() else source


def _progress(origin: Path, run: Path, weights: str) -> TrainingFacts:
    """Size and duration of the training, from the checkpoint that the weights belong to, else from the newest."""
    headers: list[Header] = []
    if origin.parent.name == CHECKPOINTS:
        with contextlib.suppress(OSError, ValueError):
            headers = [read_header(origin)]
    else:
        headers, _ = read_headers(run / CHECKPOINTS)
    same = [header for header in headers if header.metadata.get(WEIGHTS_KEY) == weights]
    if not (headers := same or headers):
        return {}
    metadata, facts = headers[0].metadata, TrainingFacts(steps=headers[0].step)
    if metadata.get(WEIGHTS_KEY) not in (weights, None):  # version 0.1 did not record them
        facts["changed"] = True
    if isinstance(count := metadata.get(NUM_IMAGES_KEY), int):
        facts["num_images"] = count
    seconds = metadata["progress"].get("seconds")
    if is_number(seconds):
        facts["seconds"] = float(seconds)
    if isinstance(seen := metadata["progress"].get("images"), int):
        facts["images_seen"] = seen
    if isinstance(device := metadata.get(DEVICE_KEY), str):
        facts["device"] = device
    with contextlib.suppress(KeyError, TypeError, ValueError):
        facts["img_size"] = [int(side) for side in metadata["encoder"]["options"]["img_size"]]
    epochs = _epochs(run / "metrics.jsonl", headers[0].step)
    return facts if epochs is None else facts | {"epochs": epochs}


def _epochs(metrics: Path, step: int) -> float | None:
    """Passes over the data until a step."""
    try:
        lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict) and entry.get("step") == step and is_number(entry.get("epoch")):
                return float(entry["epoch"])
    return None


def _evaluations(run: Path, weights: str) -> dict[str, Scores]:
    """Main scores of the results that were measured on the weights."""
    found: dict[str, Scores] = {}
    for file in sorted((run / EVALUATION).glob("*.json")):
        if file.name == BASELINES:
            continue
        try:
            content = read_evaluation(file)
        except (OSError, ValueError):
            continue
        metric = headline(content["result"])
        if metric is None or content.get("encoder") != weights:
            continue
        scores = {part: (content.get(part) or {}).get(metric) for part in PARTS}
        data = content.get("data", {}).get("test")
        found[file.stem] = {
            "metric": metric,
            "data": _name(data) if isinstance(data, str) else None,
            "scores": {part: score if is_number(score) else None for part, score in scores.items()},
        }
    return found
