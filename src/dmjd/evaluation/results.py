"""What every evaluation does around its protocol: open the sets, keep results, show them."""

import contextlib
import itertools
import json
import platform
from collections.abc import Mapping
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
from dmjd.data.base import short_hash
from dmjd.encoders import Encoder, create_encoder, encoder_metadata, weights_hash
from dmjd.evaluation.features import check_labels, known_preprocess

BASELINES = "baselines.json"


def config_of(run: Path) -> PretrainConfig:
    """A run folder's configuration; the default one for an encoder file, which has no data of its own."""
    return read_config(run) if run.is_dir() or not run.exists() else PretrainConfig()


def given_data(data: str | Path | None, test_data: str | Path | None, labels: str | None) -> dict[str, str]:
    """What the caller says about the data, without what is left to the run."""
    given = {"data": data, "test_data": test_data, "labels": labels}
    return {name: str(value) for name, value in given.items() if value is not None}


def open_sets(
    config: PretrainConfig, run: Path, encoder: Encoder, given: Mapping[str, Any]
) -> tuple[Source, Source, Tensor]:
    """Training and test set, and the test labels [n] as indices into the training set's classes.

    Raises:
        ValueError: for data that is missing, unlabelled, has one class or no test part.
    """
    preprocess = known_preprocess(encoder)
    config = config.replace(
        labels=given.get("labels", config.labels), in_chans=preprocess.in_chans, value_range=preprocess.value_range
    )
    own = "data" not in given
    data = given.get("data", config.data)
    if data is None:
        raise ValueError(f"{run} is no run folder, so it has no data of its own: pass --data")
    test_data = given.get("test_data", config.test_data if own else None)
    train = open_data(config, data, "train", listing=run / LISTING if own else None)
    test = open_test_data(config, data, test_data)
    if test is None:
        raise ValueError(f"{data} has no test part: pass --test-data")
    test_labels = torch.from_numpy(align_labels(train, test))
    check_labels(torch.as_tensor(train.labels), test_labels)
    return train, test, test_labels


def fresh_encoder(encoder: Encoder, seed: int, drop_path: float = 0.0) -> Encoder:
    """The same architecture with random weights, in evaluation mode; torch's own random state is left alone."""
    options: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in encoder.options.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = create_encoder(encoder.name, **options | {"drop_path": drop_path}).eval()
    fresh.preprocess = encoder.preprocess
    return fresh


def data_fingerprint(train: Source, test: Source) -> str:
    """Changes with the pictures of either set."""
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


ROWS = {"result": "this encoder", "random_init": "random initialisation", "raw_pixels": "raw pixels"}


def results_table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """Top-1 accuracies in percent: a row for the encoder and each baseline, a column for each task.

    Of segmentation and detection all scores: a row for each, a column for the encoder and its baseline.

    Args:
        results: task -> what :func:`dmjd.evaluate` returned.
    """
    for task, result in results.items():
        if "top1" not in result["result"]:
            return _scores_table(task, result)
    table = Table("top-1 accuracy, %")
    for task, result in results.items():
        seeds = len(result["result"].get("per_seed", ()))
        table.add_column(f"{task}, {seeds} seeds" if seeds else task, justify="right")
    for name, label in ROWS.items():
        if any(name in result for result in results.values()):
            table.add_row(label, *(_cell(result.get(name)) for result in results.values()))
    return table


def _scores_table(task: str, result: Mapping[str, Any]) -> Table:
    table = Table(f"{task}, %")
    rows = {name: _flat(result[name]) for name in ROWS if name in result}
    for name in rows:
        table.add_column(ROWS[name], justify="right")
    for score in rows["result"]:
        values = [scores.get(score) for scores in rows.values()]
        table.add_row(score, *("-" if value is None else f"{100 * value:.1f}" for value in values))
    return table


def _flat(scores: Mapping[str, Any]) -> dict[str, float | None]:
    """Scores by name, those of classes and masks with the group before; what is no score left out."""
    flat: dict[str, float | None] = {}
    for name, value in scores.items():
        if isinstance(value, Mapping):
            flat |= {f"{name} {key}": v for key, v in _flat(value).items()}
        elif value is None or isinstance(value, float):
            flat[name] = value
    return flat


def _cell(scores: Mapping[str, Any] | None) -> str:
    if scores is None:
        return "-"
    spread = f" ± {100 * scores['top1_std']:.1f}" if "top1_std" in scores else ""
    return f"{100 * scores['top1']:.1f}{spread}"
