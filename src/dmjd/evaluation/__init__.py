"""Evaluation of a trained encoder on labelled pictures, beside a randomly initialised one and raw pixels."""

import dataclasses
import difflib
import hashlib
import inspect
import json
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from dmjd import __version__
from dmjd.build import LISTING, open_data, open_test_data, read_config
from dmjd.checkpoint import write_text
from dmjd.config import PretrainConfig
from dmjd.data import Source, align_labels
from dmjd.devices import keep_freed_memory, pick_device
from dmjd.encoders import Encoder, create_encoder, encoder_bytes, load_encoder
from dmjd.evaluation.features import (
    Features,
    check_labels,
    extract,
    extract_all,
    known_preprocess,
    pooled,
    raw_pixels,
)
from dmjd.evaluation.knn import knn
from dmjd.evaluation.linear import linear_probe, probe_schedule
from dmjd.evaluation.online import OnlineKnn

__all__ = [
    "TASKS",
    "Features",
    "OnlineKnn",
    "evaluate",
    "evaluate_all",
    "extract",
    "extract_all",
    "fresh_encoder",
    "knn",
    "linear_probe",
    "probe_schedule",
    "read_result",
    "results_table",
]

# name: evaluator(train features, test features, *, device, and its own settings) -> {"top1", "top5"}
TASKS: dict[str, Callable[..., dict[str, float]]] = {"knn": knn, "linear": linear_probe}


def evaluate(
    task: str,
    run: str | Path,
    *,
    data: str | Path | None = None,
    test_data: str | Path | None = None,
    labels: str | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    num_workers: int | None = None,
    batch_size: int = 256,
    precision: str = "fp32",
    **options: Any,
) -> dict[str, Any]:
    """Measure a trained encoder, and by the same protocol in the same pass its two baselines.

    Args:
        task: "knn" or "linear".
        run: a run folder; or an encoder file or checkpoint, together with ``data``.
        data: labelled training set of the classifier; None = what the run was pre-trained on, with its ``test_data``.
        test_data: test set; None = the test part of ``data``.
        labels: "none", "folder" or "column"; None = as the run.
        out: folder that gets ``evaluation/<task>.json``; None = the run folder.
        seed: of the randomly initialised encoder, and of the probe's weights and order.
        device: "auto", "cpu" or "cuda". num_workers: reading processes; None = by the machine.
        batch_size: pictures at once. precision: of the features, "fp32" or "bf16" (autocast), for all encoders alike.
        options: settings of the task: ``k``, ``temperature`` (knn); ``epochs``, ``blr``, ``weight_decay`` (linear).

    Returns:
        What is written to the file: "result", "random_init" and "raw_pixels" with accuracies 0 to 1 under "top1" and
        "top5", "configuration", "data", "seed", "versions", ...

    Raises:
        ValueError: for an unknown task or setting, a folder that is no run, or data that is unlabelled, has one class
            or no test part.
    """
    results = evaluate_all(
        {task: options},
        run,
        data=data,
        test_data=test_data,
        labels=labels,
        out=out,
        seed=seed,
        device=device,
        num_workers=num_workers,
        batch_size=batch_size,
        precision=precision,
    )
    return results[task]


def evaluate_all(
    tasks: Mapping[str, Mapping[str, Any]],
    run: str | Path,
    *,
    data: str | Path | None = None,
    test_data: str | Path | None = None,
    labels: str | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    num_workers: int | None = None,
    batch_size: int = 256,
    precision: str = "fp32",
) -> dict[str, dict[str, Any]]:
    """Several tasks on one pass over the features: task -> settings in, task -> result out; see :func:`evaluate`."""
    settings = {task: _settings(task, options, seed) for task, options in tasks.items()}
    run, place = Path(run).expanduser(), pick_device(device)
    keep_freed_memory(place)
    given = {"data": data, "test_data": test_data, "labels": labels}
    overrides = {name: str(v) if isinstance(v, Path) else v for name, v in given.items() if v is not None}
    config = read_config(run) if run.is_dir() or not run.exists() else PretrainConfig()
    encoder = load_encoder(run, place)
    train, test, test_labels = _open(config, run, encoder, overrides)
    reading = {"batch_size": batch_size, "num_workers": num_workers}
    features = _features(encoder, train, test, test_labels, seed, precision, **reading)
    folder = Path(out).expanduser() if out is not None else run if run.is_dir() else None
    results = {}
    for task, options in tasks.items():
        results[task] = {
            "task": task,
            **{name: TASKS[task](*pair, device=place, **settings[task]) for name, pair in features.items()},
            "configuration": settings[task] | {"precision": precision},
            "overrides": overrides | dict(options) | ({"precision": precision} if precision != "fp32" else {}),
            "data": _describe(train, test, *features["result"]),
            "encoder": _weights_hash(encoder),
            "seed": seed,
            "versions": {"dmjd": __version__, "torch": torch.__version__, "python": platform.python_version()},
        }
        if folder is not None:
            (folder / "evaluation").mkdir(parents=True, exist_ok=True)
            write_text(folder / "evaluation" / f"{task}.json", json.dumps(results[task], indent=2) + "\n")
    return results


def _settings(task: str, options: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """All settings of a task: its defaults, the caller's changes, and the seed where it has one.

    Raises:
        ValueError: unknown task or setting.
    """
    if task not in TASKS:
        near = difflib.get_close_matches(task, TASKS, n=1, cutoff=0.0)
        raise ValueError(f"unknown evaluation '{task}'; did you mean '{near[0]}'? There are: {', '.join(TASKS)}")
    parameters = inspect.signature(TASKS[task]).parameters.values()
    known = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    del known["device"]
    known.pop("batch_size", None)  # of the probe: it follows the size of the set
    if unknown := set(options) - set(known):
        raise ValueError(f"'{task}' does not take {', '.join(sorted(unknown))}; it takes {', '.join(sorted(known))}")
    return known | dict(options) | ({"seed": seed} if "seed" in known else {})


def _open(
    config: PretrainConfig, run: Path, encoder: Encoder, overrides: Mapping[str, Any]
) -> tuple[Source, Source, Tensor]:
    """Training and test set, and the test labels [n] as indices into the training set's classes."""
    preprocess = known_preprocess(encoder)
    config = config.replace(
        labels=overrides.get("labels", config.labels), in_chans=preprocess.in_chans, value_range=preprocess.value_range
    )
    own = "data" not in overrides
    data = overrides.get("data", config.data)
    if data is None:
        raise ValueError(f"{run} is no run folder, so it has no data of its own: pass --data")
    test_data = overrides.get("test_data", config.test_data if own else None)
    train = open_data(config, data, "train", listing=run / LISTING if own else None)
    test = open_test_data(config, data, test_data)
    if test is None:
        raise ValueError(f"{data} has no test part: pass --test-data")
    test_labels = torch.from_numpy(align_labels(train, test))
    check_labels(torch.as_tensor(train.labels), test_labels)
    return train, test, test_labels


def _features(
    encoder: Encoder, train: Source, test: Source, test_labels: Tensor, seed: int, precision: str, **reading: Any
) -> dict[str, tuple[Features, Features]]:
    """Features of both sets, of the encoder and of its baselines."""
    device = next(encoder.parameters()).device
    extractors = {
        "result": pooled(encoder, precision),
        "random_init": pooled(fresh_encoder(encoder, seed).to(device), precision),
        "raw_pixels": raw_pixels,
    }
    known, asked = (
        extract_all(extractors, source, known_preprocess(encoder), device=device, **reading) for source in (train, test)
    )
    return {
        name: (known[name], dataclasses.replace(asked[name], labels=test_labels[asked[name].rows]))
        for name in extractors
    }


def fresh_encoder(encoder: Encoder, seed: int) -> Encoder:
    """The same architecture with random weights, in evaluation mode; torch's own random state is left alone."""
    options: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in encoder.options.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create_encoder(encoder.name, **options).eval()


def _describe(train: Source, test: Source, known: Features, asked: Features) -> dict[str, Any]:
    return {
        "train": train.name,
        "test": test.name,
        "fingerprint": f"{train.fingerprint()}/{test.fingerprint()}",
        "num_train": len(known.x),
        "num_test": len(asked.x),
        "num_bad": len(known.bad) + len(asked.bad),
        "classes": len(train.classes),
    }


def _weights_hash(encoder: Encoder) -> str:
    """16 hexadecimal digits that change with the encoder's weights or configuration."""
    return hashlib.sha256(encoder_bytes(encoder)).hexdigest()[:16]


def read_result(file: str | Path, encoder: Encoder) -> dict[str, Any] | None:
    """An earlier result of this very encoder on its run's own data with the default settings, or None.

    Args:
        file: ``<run>/evaluation/<task>.json``. encoder: as it is now.
    """
    try:
        result = json.loads(Path(file).read_text(encoding="utf-8"))
        same = result["encoder"] == _weights_hash(encoder) and not result["overrides"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there, or not written by this version: it is made anew
    return result if same else None


def results_table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """Top-1 accuracies in percent: a row for the encoder and each baseline, a column for each task.

    Args:
        results: task -> what :func:`evaluate` returned.
    """
    table = Table("top-1 accuracy, %")
    for task in results:
        table.add_column(task, justify="right")
    for name, label in (
        ("result", "this encoder"),
        ("random_init", "random initialisation"),
        ("raw_pixels", "raw pixels"),
    ):
        table.add_row(label, *(f"{100 * result[name]['top1']:.1f}" for result in results.values()))
    return table
