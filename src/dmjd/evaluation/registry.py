"""The table of evaluations. To add one, write a file and a line in :data:`TASKS`.

Nothing here imports torch: configurations and functions are named by ``module:name`` and imported when needed, so the
command line can list all tasks and parse their flags quickly.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dmjd.config.checks import shown
from dmjd.config.evaluation import EvaluationConfig
from dmjd.suggest import did_you_mean


@dataclass(frozen=True)
class EvaluationTask:
    """An evaluation: flags, overview, ``dmjd.evaluate`` and result tables follow from it.

    Attributes:
        name: name on the command line, and of its result in ``evaluation/<name>.json``.
        config: "module:name" of its settings, an :class:`~dmjd.config.evaluation.EvaluationConfig`.
        run: "module:name" of the function ``run(run_folder, **settings) -> result`` that evaluates an encoder and a
            randomly initialized one, and returns what it writes: "result", "random_init", "configuration", ...
        help: one line for the overview.
        example: value of ``--data`` in the example of its help.
        protocol: a few words below its results on what was measured; ``{name}`` is a setting or the number of steps.
    """

    name: str
    config: str
    run: str
    help: str
    example: str = "cifar10"
    protocol: str = ""

    def load_config(self) -> type[EvaluationConfig]:
        """The class of its settings."""
        return _load(self.config)

    def load_run(self) -> Callable[..., dict[str, Any]]:
        """The function that evaluates."""
        return _load(self.run)


@dataclass(frozen=True)
class FrozenTask(EvaluationTask):
    """An evaluation on frozen features. All of these share one pass over the images.

    Attributes:
        run: "module:name" of a function ``run(train, test, *, device, **settings) -> scores`` of two
            :class:`~dmjd.evaluation.frozen.features.Features`. The protocol calls it for the encoder, for random
            weights and for raw pixels.
        layers: whether it takes features of several layers, not only the pooled feature.
    """

    layers: bool = False


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


_CONFIG, _FROZEN, _SUPERVISED = "dmjd.config", "dmjd.evaluation.frozen", "dmjd.evaluation.supervised"

TASKS: dict[str, EvaluationTask] = {
    task.name: task
    for task in (
        FrozenTask(
            "knn",
            f"{_CONFIG}:KnnConfig",
            f"{_FROZEN}.knn:knn",
            "nearest neighbors in the frozen features",
            protocol="the {k} most similar training images vote; frozen features",
        ),
        FrozenTask(
            "knn_whitened",
            f"{_CONFIG}:WhitenedKnnConfig",
            f"{_FROZEN}.knn_whitened:knn_whitened",
            "nearest neighbors in half-whitened features, as for search",
            protocol="the {k} most similar training images vote, after half whitening by the training features",
        ),
        FrozenTask(
            "linear",
            f"{_CONFIG}:LinearConfig",
            f"{_FROZEN}.linear:linear_probe",
            "linear probe on the frozen features",
            protocol="one linear layer is trained on frozen features",
        ),
        FrozenTask(
            "linear_sweep",
            f"{_CONFIG}:LinearSweepConfig",
            f"{_FROZEN}.linear_sweep:linear_sweep",
            "linear probes on several layers, poolings and learning rates (or linear --sweep)",
            protocol="the best of many linear layers, chosen on a tenth of the training images, on frozen features",
            layers=True,
        ),
        EvaluationTask(
            "finetune",
            f"{_CONFIG}:FinetuneConfig",
            f"{_SUPERVISED}.finetune:finetune",
            "fine-tune the whole encoder as a classifier",
            protocol="the whole encoder is trained for {steps:.0f} steps of {batch_size} images and tested once",
        ),
        EvaluationTask(
            "segmentation",
            f"{_CONFIG}:SegmentationConfig",
            f"{_SUPERVISED}.segmentation:segmentation",
            "train the whole encoder for semantic segmentation",
            example="camvid --ignore-index 11",
            protocol="encoder and decoder are trained for {steps:.0f} steps of {batch_size} images",
        ),
        EvaluationTask(
            "detection",
            f"{_CONFIG}:DetectionConfig",
            f"{_SUPERVISED}.detection:detection",
            "train the whole encoder for object detection",
            example="bccd",
            protocol="encoder and detector are trained for {steps:.0f} steps of {batch_size} images",
        ),
    )
}


def get_task(name: str) -> EvaluationTask:
    """Look up a task by name; ValueError with a suggestion for an unknown one."""
    if name not in TASKS:
        raise ValueError(f"unknown evaluation {shown(name)}{did_you_mean(name, TASKS)} Evaluations: {', '.join(TASKS)}")
    return TASKS[name]


def get_frozen_task(name: str) -> FrozenTask:
    """Look up a task on frozen features by name; ValueError for any other name."""
    task = get_task(name)
    if not isinstance(task, FrozenTask):
        raise ValueError(f"'{name}' is not an evaluation on frozen features; there are: {', '.join(frozen_names())}")
    return task


def frozen_names() -> list[str]:
    """Names of all tasks on frozen features."""
    return [task.name for task in TASKS.values() if isinstance(task, FrozenTask)]
