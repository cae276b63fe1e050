"""Evaluations on frozen features, in one pass over the images, beside random weights and raw pixels."""

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmjd.data.sources.base import Source
from dmjd.data.sources.subset import SubsetSource
from dmjd.encoders.base import Encoder, known_preprocess
from dmjd.encoders.weights import load_encoder, weights_hash
from dmjd.engine.device import keep_freed_memory, pick_device
from dmjd.evaluation.frozen.features import Extractor, Features, extract_all, pooled, raw_pixels
from dmjd.evaluation.frozen.knn import knn
from dmjd.evaluation.frozen.linear import linear_probe
from dmjd.evaluation.frozen.linear_sweep import HELD_OUT, SweepFeatures, linear_sweep
from dmjd.evaluation.low_shot import ALL_LABELS, LowShot, hold_out, summarize
from dmjd.evaluation.results import Baselines, data_fingerprint, key_of, versions, write_result
from dmjd.evaluation.setup import aligned_labels, config_of, fresh_encoder, given_data, open_sets
from dmjd.nn.modes import evaluating

# name: evaluator(train features, test features, *, device, and its own settings) -> {"top1", "top5", ...}
TASKS: dict[str, Callable[..., dict[str, Any]]] = {"knn": knn, "linear": linear_probe, "linear_sweep": linear_sweep}

SWEEPS = ("linear_sweep",)  # tasks on the features of several layers

_OF_FEATURES = ("device", "parts", "batch_size")  # arguments of evaluators that no user sets


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
    labels_per_class: int | None = None,
    label_fraction: float | None = None,
    seeds: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Several tasks on frozen features in one pass: task -> settings in, task -> result out.

    With few labels only the images that some seed draws are read. Baselines of a configuration are measured once and
    kept in ``evaluation/baselines.json``.

    Args:
        tasks: task of :data:`TASKS` -> its settings.
        run: a run folder; or an encoder file or checkpoint, together with ``data``.
        data: labeled training set of the classifier; None = what the run was pre-trained on, with its ``test_data``.
        test_data: test set; None = the test part of ``data``.
        labels: "none", "folder" or "column"; None = as the run.
        out: folder that gets ``evaluation/<task>.json``; None = the run folder.
        seed: of the randomly initialized encoder, of the probe's weights and order, and of subsets.
        device: "auto", "cpu" or "cuda". num_workers: reading processes; None = by the machine.
        batch_size: images at once. precision: of the features, "fp32" or "bf16" (autocast), for all encoders alike.
        labels_per_class, label_fraction, seeds: see :class:`~dmjd.evaluation.low_shot.FewLabels`.

    Raises:
        ValueError: as :func:`evaluate`.
    """
    place = pick_device(device)
    keep_freed_memory(place)
    low_shot = LowShot(labels_per_class, label_fraction, seeds)
    for task, options in tasks.items():
        _settings(task, options)  # a mistake is found before anything is opened
    run = Path(run).expanduser()
    given = given_data(data, test_data, labels)
    config = config_of(run)
    encoder = load_encoder(run, place)
    train, test, _ = open_sets(config, run, encoder, given)
    folder = Path(out).expanduser() if out is not None else run if run.is_dir() else None
    return evaluate_frozen(
        tasks,
        encoder,
        train,
        test,
        folder=folder,
        seed=seed,
        batch_size=batch_size,
        num_workers=num_workers,
        precision=precision,
        low_shot=low_shot,
        overrides=given,
    )


def evaluate_frozen(
    tasks: Mapping[str, Mapping[str, Any]],
    encoder: Encoder,
    train: Source,
    test: Source,
    *,
    folder: Path | None,
    seed: int = 0,
    batch_size: int = 256,
    num_workers: int | None = None,
    precision: str = "fp32",
    low_shot: LowShot = ALL_LABELS,
    overrides: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, dict[str, Any]]:
    """:func:`evaluate_all` of an encoder and sets that are already in memory.

    Args:
        tasks: name of a task -> its settings.
        encoder: on the device to use; its mode is restored afterwards.
        train, test: labeled sets; the test labels are aligned with the training classes.
        folder: gets ``evaluation/<task>.json``; None writes nothing.
        seed, batch_size, num_workers, precision: as in :func:`evaluate_all`.
        low_shot: which labels are used. overrides: what the caller changed about the data, for the result.

    Raises:
        ValueError: for an unknown task or setting, or labels that cannot be used.
    """
    settings = {task: _settings(task, options) for task, options in tasks.items()}
    labels = aligned_labels(train, test)
    protocol = _Protocol(encoder, train, test, labels, low_shot, seed, precision, settings, Baselines(folder))
    found = protocol.run(batch_size=batch_size, num_workers=num_workers)
    results = {}
    for task, options in tasks.items():
        changed = dict(overrides) | low_shot.describe() | dict(options)
        results[task] = {
            "task": task,
            **found[task],
            "configuration": settings[task] | low_shot.describe() | {"precision": precision},
            "overrides": changed | ({"precision": precision} if precision != "fp32" else {}),
            "data": protocol.data,
            "encoder": weights_hash(encoder),
            "seed": seed,
            "versions": versions(),
        }
        if folder is not None:
            write_result(folder, task, results[task])
    return results


def _settings(task: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a task but the seed: its defaults and the caller's changes.

    Raises:
        ValueError: unknown task or setting.
    """
    if task not in TASKS:
        near = difflib.get_close_matches(task, TASKS, n=1, cutoff=0.0)
        raise ValueError(f"unknown evaluation '{task}'; did you mean '{near[0]}'? There are: {', '.join(TASKS)}")
    parameters = inspect.signature(TASKS[task]).parameters.values()
    known = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in _OF_FEATURES}
    known.pop("seed", None)
    if unknown := set(options) - set(known):
        raise ValueError(f"'{task}' does not take {', '.join(sorted(unknown))}; it takes {', '.join(sorted(known))}")
    return known | dict(options)


class _Protocol:
    """One pass over the images, then every task on every seed's labels, for the encoder and its baselines."""

    def __init__(
        self,
        encoder: Encoder,
        train: Source,
        test: Source,
        test_labels: Tensor,
        few: LowShot,
        seed: int,
        precision: str,
        settings: Mapping[str, Mapping[str, Any]],
        baselines: Baselines,
    ) -> None:
        self.encoder, self.test, self.test_labels, self.settings = encoder, test, test_labels, settings
        self.seed, self.precision, self.baselines = seed, precision, baselines
        assert train.labels is not None
        self.seeds = few.seeds_from(seed)
        self.rows = [few.rows(train.labels, each) for each in self.seeds]
        if any(task in SWEEPS for task in settings):
            for each, rows in zip(self.seeds, self.rows, strict=True):
                hold_out(train.labels[rows], HELD_OUT, each)  # that it can be is found out before long work
        # Only images that some seed draws are read.
        drawn = np.unique(np.concatenate(self.rows))
        self.train = SubsetSource(train, drawn) if few.few else train
        self.rows = [np.searchsorted(drawn, rows) for rows in self.rows]
        self.fingerprint = data_fingerprint(self.train, test)
        self.keys = {
            (task, name): f"{task} {name} " + key_of(encoder, own, self.fingerprint, few.describe(), seed, precision)
            for task, own in settings.items()
            for name in ("random_init", "raw_pixels")
        }
        self.data: dict[str, Any] = {}

    def run(self, **reading: Any) -> dict[str, dict[str, Any]]:
        """Task -> {"result", "random_init", "raw_pixels"}."""
        found: dict[str, dict[str, Any]] = {task: {} for task in self.settings}
        wanted = [(task, name) for task in self.settings for name in ("result", "random_init", "raw_pixels")]
        features = self._features([pair for pair in wanted if not self._known(*pair)], **reading)
        for task, name in wanted:
            if kept := self._known(task, name):
                found[task][name] = kept
                continue
            found[task][name] = self._measure(task, name, *features[_kind(task, name)])
            if name != "result":
                self.baselines.put(self.keys[task, name], found[task][name])
        return found

    def _known(self, task: str, name: str) -> dict[str, Any] | None:
        return None if name == "result" else self.baselines.get(self.keys[task, name])

    def _features(self, wanted: list[tuple[str, str]], **reading: Any) -> dict[str, tuple[Features, Features]]:
        """What the tasks need of both sets, in one pass over each."""
        device = next(self.encoder.parameters()).device
        fresh = fresh_encoder(self.encoder, self.seed).to(device)
        makers: dict[str, Callable[[], Extractor]] = {
            "result": lambda: pooled(self.encoder, self.precision),
            "random_init": lambda: pooled(fresh, self.precision),
            "result layers": lambda: SweepFeatures(self.encoder, self.precision),
            "random_init layers": lambda: SweepFeatures(fresh, self.precision),
            "raw_pixels": lambda: raw_pixels,
        }
        kinds = dict.fromkeys(_kind(*pair) for pair in wanted)
        within = [kind for kind in kinds if f"{kind} layers" in kinds]  # the pooled feature is one of the sweep's
        extractors = {kind: self._in_evaluation_mode(makers[kind]()) for kind in kinds if kind not in within}
        preprocess = known_preprocess(self.encoder)
        known, asked = (
            extract_all(extractors, source, preprocess, device=device, **reading) for source in (self.train, self.test)
        )
        pairs = {
            kind: (known[kind], dataclasses.replace(asked[kind], labels=self.test_labels[asked[kind].rows]))
            for kind in extractors
        }
        self.data = self._describe(*next(iter(pairs.values())))
        part = SweepFeatures(self.encoder).pooled_part
        for kind in within:
            layers = pairs[f"{kind} layers"]
            pairs[kind] = (_part(layers[0], *part), _part(layers[1], *part))
        return pairs

    def _in_evaluation_mode(self, extractor: Extractor) -> Extractor:
        """The encoder may come from a training: its mode is changed for a batch alone."""

        def extract_features(images: Tensor) -> Tensor:
            with evaluating(self.encoder):
                return extractor(images)

        return extract_features

    def _measure(self, task: str, name: str, known: Features, asked: Features) -> dict[str, Any]:
        """Mean and spread over the seeds."""
        takes = inspect.signature(TASKS[task]).parameters
        results = []
        for seed, rows in zip(self.seeds, self.rows, strict=True):
            own = dict(self.settings[task]) | ({"seed": seed} if "seed" in takes else {})
            if "parts" in takes:
                own["parts"] = ("raw pixels",) if name == "raw_pixels" else SweepFeatures(self.encoder).parts
            chosen = torch.from_numpy(np.isin(known.rows.numpy(), rows))
            subset = Features(known.x[chosen], known.labels[chosen], known.rows[chosen], known.unreadable)
            device = next(self.encoder.parameters()).device
            results.append(TASKS[task](subset if not bool(chosen.all()) else known, asked, device=device, **own))
        return summarize(results, self.seeds)

    def _describe(self, known: Features, asked: Features) -> dict[str, Any]:
        return {
            "train": self.train.name,
            "test": self.test.name,
            "fingerprint": self.fingerprint,
            "num_train": int(np.isin(known.rows.numpy(), self.rows[0]).sum()),  # of the first seed
            "num_test": len(asked.x),
            "num_unreadable": len(known.unreadable) + len(asked.unreadable),
            "classes": len(self.train.classes),
        }


def _part(features: Features, place: int, count: int) -> Features:
    """One of ``count`` features that lie side by side."""
    return dataclasses.replace(features, x=features.x.chunk(count, dim=1)[place].contiguous())


def _kind(task: str, name: str) -> str:
    """Which features a task needs of the encoder or a baseline."""
    return f"{name} layers" if task in SWEEPS and name != "raw_pixels" else name
