"""Evaluation on frozen features, in one pass over the images: an encoder, random weights and raw pixels."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmjd import __version__
from dmjd.config.checks import check_path
from dmjd.config.evaluation import FrozenConfig
from dmjd.data.sources.base import Source
from dmjd.data.sources.subset import SubsetSource
from dmjd.encoders.base import Encoder, known_preprocess
from dmjd.encoders.registry import fresh_like
from dmjd.encoders.stored import weights_hash
from dmjd.encoders.weights import load_encoder
from dmjd.engine.device import keep_freed_memory, pick_device
from dmjd.evaluation.frozen.features import Extractor, Features, extract_all, pooled, raw_pixels
from dmjd.evaluation.frozen.linear_sweep import HELD_OUT, SweepFeatures
from dmjd.evaluation.low_shot import ALL_LABELS, LowShot, describe_labels, hold_out, summarize, typical_count
from dmjd.evaluation.registry import get_frozen_task
from dmjd.evaluation.results import (
    PARTS,
    Baselines,
    check_results_folder,
    data_fingerprint,
    key_of,
    key_of_parts,
    results_folder,
    tested_split,
    versions,
    write_result,
)
from dmjd.evaluation.setup import aligned_labels, config_of, given_data, open_sets, recorded
from dmjd.evaluation.tables import POOLED_BY_TIMM
from dmjd.evaluation.trained_baselines import FLAG, TrainedBaseline, describe_baselines, load_baselines
from dmjd.nn.modes import evaluating, own_defaults


@own_defaults()
def evaluate_all(tasks: Mapping[str, Mapping[str, Any]], run: str | Path, **options: Any) -> dict[str, dict[str, Any]]:
    """Run several evaluations on frozen features in one pass over the images.

    A low-shot evaluation reads only the images that at least one seed draws. Baselines, trained ones too, are measured
    once for each configuration and kept in ``evaluation/baselines.json``.

    Args:
        tasks: name of a task on frozen features -> its own settings, such as ``{"knn": {"k": 5}, "linear": {}}``.
        run: a run folder; or an encoder file or checkpoint, together with ``data``.
        options: settings of all tasks: the fields of :class:`~dmjd.config.evaluation.FrozenConfig`.

    Returns:
        Name of the task -> content of ``evaluation/<task>.json``.

    Raises:
        ValueError: see :func:`dmjd.evaluate`.
    """
    config = FrozenConfig(**options)
    for task, own in tasks.items():
        task_config(task, own)  # mistakes are reported before anything is opened
    run, device = check_path("run", run), pick_device(config.device)
    keep_freed_memory(device)
    given = given_data(config)
    run_config = config_of(run)
    out = results_folder(run, config.out)
    if out is not None:
        check_results_folder(out)
    encoder = load_encoder(run, device)
    others = load_baselines(config.baseline or (), known_preprocess(encoder), device)
    train, test, _ = open_sets(run_config, run, encoder, given)
    return evaluate_frozen(
        tasks,
        encoder,
        train,
        test,
        folder=out,
        seed=config.seed,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        precision=config.precision,
        low_shot=LowShot(config.labels_per_class, config.label_fraction, config.seeds),
        overrides=recorded(given),
        others=others,
    )


@own_defaults()
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
    others: Sequence[TrainedBaseline] = (),
) -> dict[str, dict[str, Any]]:
    """:func:`evaluate_all` for an encoder and data sets that are already loaded.

    Args:
        tasks: name of a task on frozen features -> its own settings.
        encoder: an encoder on the device to use; its mode is restored afterwards.
        train, test: labeled sets; the test labels are aligned with the training classes.
        folder: folder for ``evaluation/<task>.json``; None: nothing is written.
        seed, batch_size, num_workers, precision: see :class:`~dmjd.config.evaluation.FrozenConfig`.
        low_shot: which labels to use.
        overrides: data settings given by the caller, to be stored with the result.
        others: trained models to evaluate in the same pass, on the encoder's device.

    Raises:
        ValueError: if a task or setting is unknown, or labels cannot be used.
    """
    configs = {task: task_config(task, options) for task, options in tasks.items()}
    protocol = _Protocol(encoder, train, test, configs, low_shot, seed, precision, Baselines(folder), others)
    scores = protocol.run(batch_size=batch_size, num_workers=num_workers)
    weights, results = weights_hash(encoder), {}
    for task, options in tasks.items():
        changed = dict(overrides) | low_shot.describe() | configs[task].given(options)
        results[task] = {
            "task": task,
            **scores[task],
            **describe_baselines(encoder, weights, others, protocol.of_others[task]),
            "configuration": protocol.configs[task].to_dict() | low_shot.describe() | {"precision": precision},
            "overrides": changed | ({"precision": precision} if precision != "fp32" else {}),
            "data": protocol.data,
            "encoder": weights,
            "seed": seed,
            "versions": versions(),
        }
        if folder is not None:
            write_result(folder, task, results[task])
    return results


def task_config(task: str, options: Mapping[str, Any]) -> FrozenConfig:
    """The configuration of one task from its own settings.

    Raises:
        ValueError: if the task or a setting is unknown, or a setting is shared by all tasks.
    """
    if shared := sorted(set(options) - set(FrozenConfig.own(options))):
        raise ValueError(f"{', '.join(shared)} is shared by all tasks: it is not a setting of '{task}' alone")
    config = get_frozen_task(task).load_config()(**options)
    assert isinstance(config, FrozenConfig)
    return config


class _Protocol:
    """One pass over the images, then all tasks for the encoder and its baselines, with all seeds.

    Args:
        encoder, train, test, low_shot, seed, precision: as in :func:`evaluate_frozen`.
        configs: task -> its settings.
        baselines: results of earlier calls.
        others: trained models that are evaluated beside the encoder.

    Attributes:
        configs: task -> its settings, with defaults filled in.
        data: description of the data for the result; set by :meth:`run`.
        of_others: task -> scores of each trained model, in order; set by :meth:`run`.
    """

    def __init__(
        self,
        encoder: Encoder,
        train: Source,
        test: Source,
        configs: Mapping[str, FrozenConfig],
        low_shot: LowShot,
        seed: int,
        precision: str,
        baselines: Baselines,
        others: Sequence[TrainedBaseline] = (),
    ) -> None:
        self.encoder, self.test, self.baselines = encoder, test, baselines
        self.others = {f"baseline {i}": other for i, other in enumerate(others)}  # by the name of its part
        self.seed, self.precision = seed, precision
        self.device = next(encoder.parameters()).device
        self.test_labels = aligned_labels(train, test)
        self.train, self.seeds, self.rows = self._draw(train, low_shot, configs)
        assert self.train.labels is not None
        labels = typical_count(self.train.labels[self.rows[0]])
        self.configs = {task: config.resolve(labels) for task, config in configs.items()}
        self.fingerprint = data_fingerprint(self.train, test)
        identity = (self.fingerprint, low_shot.describe(), seed, precision)
        self.keys = {
            (task, part): self._key(task, part, config.to_dict(), *identity)
            for task, config in self.configs.items()
            for part in (*PARTS, *self.others)
        }
        self.data: dict[str, Any] = {}
        self.of_others: dict[str, list[dict[str, Any]]] = {}

    def _key(self, task: str, part: str, *identity: Any) -> str:
        """Of a result of a part: with all that it depends on. A trained model does not depend on the encoder."""
        if part not in self.others:
            return f"{task} {part} {key_of(self.encoder, *identity)}"
        read = known_preprocess(self.encoder)
        off = () if read.invalid is None else (read.nodata, read.alpha)
        identity = (self.others[part].weights, read.in_chans, read.value_range, *off, *identity)
        return f"{task} trained {key_of_parts(__version__, *identity)}"

    def _draw(
        self, train: Source, low_shot: LowShot, tasks: Iterable[str]
    ) -> tuple[Source, list[int], list[np.ndarray]]:
        """The images that at least one seed draws, the seeds, and the rows that each seed draws from these images."""
        assert train.labels is not None
        seeds = low_shot.seeds_from(self.seed)
        rows = [low_shot.rows(train.labels, seed) for seed in seeds]
        if any(get_frozen_task(task).layers for task in tasks):
            for seed, drawn in zip(seeds, rows, strict=True):
                hold_out(train.labels[drawn], HELD_OUT, seed)  # raises before images are read
        if not low_shot.few:
            return train, seeds, rows
        union = np.unique(np.concatenate(rows))
        return SubsetSource(train, union), seeds, [np.searchsorted(union, drawn) for drawn in rows]

    def run(self, **reading: Any) -> dict[str, dict[str, Any]]:
        """Task -> {"result", "random_init", "raw_pixels"} -> scores."""
        scores: dict[str, dict[str, Any]] = {task: {} for task in self.configs}
        pairs = [(task, part) for task in self.configs for part in (*PARTS, *self.others)]
        features = self._features([pair for pair in pairs if not self._kept(*pair)], **reading)
        for task, part in pairs:
            if kept := self._kept(task, part):
                scores[task][part] = kept
                continue
            scores[task][part] = self._measure(task, part, *features[self._kind(task, part)])
            if part != "result":
                self.baselines.put(self.keys[task, part], scores[task][part])
        self.of_others = {task: [found.pop(part) for part in self.others] for task, found in scores.items()}
        return scores

    def _kept(self, task: str, part: str) -> dict[str, Any] | None:
        return None if part == "result" else self.baselines.get(self.keys[task, part])

    def _features(self, pairs: list[tuple[str, str]], **reading: Any) -> dict[str, tuple[Features, Features]]:
        """Training and test features of each kind that (task, part) pairs need, in one pass over each set."""
        kinds = dict.fromkeys(self._kind(*pair) for pair in pairs)
        derived = [kind for kind in kinds if f"{kind} layers" in kinds]  # the pooled feature is one of the layers'
        extractors = self._extractors([kind for kind in kinds if kind not in derived])
        own = {kind: self.others[part].preprocess for kind in kinds if (part := _part(kind)) in self.others}
        train, test = (
            extract_all(extractors, source, known_preprocess(self.encoder), device=self.device, own=own, **reading)
            for source in (self.train, self.test)
        )
        features = {
            kind: (train[kind], dataclasses.replace(test[kind], labels=self.test_labels[test[kind].rows]))
            for kind in extractors
        }
        self.data = self._describe(*next(iter(features.values())))
        for kind in derived:
            layers = self._layers(kind)
            train_layers, test_layers = features[f"{kind} layers"]
            features[kind] = (_column(train_layers, *layers.pooled_part), _column(test_layers, *layers.pooled_part))
        for kind, (train_features, test_features) in features.items():
            if (names := self._names_of_parts(kind)) is not None:
                features[kind] = (dataclasses.replace(train_features, parts=names), test_features)
        return features

    def _kind(self, task: str, part: str) -> str:
        """The kind of features that a task needs from the encoder or a baseline."""
        layers = get_frozen_task(task).layers and part != "raw_pixels" and self._encoder_of(part) is not None
        return f"{part} layers" if layers else part

    def _encoder_of(self, kind: str) -> Encoder | None:
        """The encoder of a kind of features, or one of the same architecture; None for a model of timm."""
        other = self.others.get(_part(kind))
        return self.encoder if other is None else other.encoder

    def _layers(self, kind: str) -> SweepFeatures:
        """The features of several layers of an encoder."""
        encoder = self._encoder_of(kind)
        assert encoder is not None, "see _kind"
        return SweepFeatures(encoder, self.precision)

    def _names_of_parts(self, kind: str) -> tuple[str, ...] | None:
        """Names of the features that are concatenated in a kind; None: it is one without a name."""
        if kind.endswith(" layers"):
            return tuple(self._layers(kind).parts)
        return {"raw_pixels": ("raw pixels",)}.get(kind, (POOLED_BY_TIMM,) if not self._encoder_of(kind) else None)

    def _extractors(self, kinds: list[str]) -> dict[str, Extractor]:
        fresh = fresh_like(self.encoder, seed=self.seed).to(self.device)
        makers: dict[str, Callable[[], Extractor]] = {
            "result": lambda: pooled(self.encoder, self.precision),
            "random_init": lambda: pooled(fresh, self.precision),
            "result layers": lambda: self._layers("result layers"),
            "random_init layers": lambda: SweepFeatures(fresh, self.precision),
            "raw_pixels": lambda: raw_pixels,
        }
        return {
            kind: self._in_evaluation_mode(self._other(kind) if _part(kind) in self.others else makers[kind]())
            for kind in kinds
        }

    def _other(self, kind: str) -> Extractor:
        """The extractor of a trained baseline."""
        other = self.others[_part(kind)]
        if kind.endswith(" layers"):
            return self._layers(kind)
        return other.extractor(self.precision)

    def _in_evaluation_mode(self, extractor: Extractor) -> Extractor:
        """Wrap an extractor so that the encoder, which may be in training, is in evaluation mode during each batch."""

        def extract_features(images: Tensor) -> Tensor:
            with evaluating(self.encoder):
                return extractor(images)

        return extract_features

    def _measure(self, task: str, part: str, train: Features, test: Features) -> dict[str, Any]:
        """Run a task for all seeds; returns mean and standard deviation over them."""
        if part in self.others and not all(bool(features.x.isfinite().all()) for features in (train, test)):
            raise ValueError(f"features of {FLAG} {self.others[part].source} are not finite")
        evaluate, settings = get_frozen_task(task).load_run(), self.configs[task].to_dict()
        results = []
        for seed, rows in zip(self.seeds, self.rows, strict=True):
            drawn = torch.from_numpy(np.isin(train.rows.numpy(), rows))
            subset = dataclasses.replace(train, x=train.x[drawn], labels=train.labels[drawn], rows=train.rows[drawn])
            features = train if bool(drawn.all()) else subset
            results.append(evaluate(features, test, seed=seed, device=self.device, **settings))
        return summarize(results, self.seeds)

    def _describe(self, train: Features, test: Features) -> dict[str, Any]:
        drawn = np.isin(train.rows.numpy(), self.rows[0])  # by the first seed
        return {
            "train": self.train.name,
            "test": self.test.name,
            "split": tested_split(self.test),
            "fingerprint": self.fingerprint,
            "num_train": int(drawn.sum()),
            "num_test": len(test.x),
            "num_unreadable": len(train.unreadable) + len(test.unreadable),
            "classes": len(self.train.classes),
            **describe_labels(train.labels.numpy()[drawn], test.labels.numpy()),
        }


def _column(features: Features, index: int, count: int) -> Features:
    """Part ``index`` of ``count`` concatenated features."""
    return dataclasses.replace(features, x=features.x.chunk(count, dim=1)[index].contiguous())


def _part(kind: str) -> str:
    """The part of a result that a kind of features is for."""
    return kind.removesuffix(" layers")
