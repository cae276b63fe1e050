"""Evaluations by name: ``evaluate``."""

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dmjd.evaluation.frozen.protocol import evaluate_all
from dmjd.evaluation.supervised.finetune import finetune


def _late(task: str) -> Callable[..., dict[str, Any]]:
    """An evaluation whose libraries take seconds to import, imported when it is called."""

    def evaluation(run: str | Path, **options: Any) -> dict[str, Any]:
        return getattr(importlib.import_module(f"dmjd.evaluation.supervised.{task}"), task)(run, **options)

    return evaluation


# name: evaluation(run, *, its settings) that trains the whole encoder
TRAINED: dict[str, Callable[..., dict[str, Any]]] = {
    "finetune": finetune,
    "segmentation": _late("segmentation"),
    "detection": _late("detection"),
}


def evaluate(task: str, run: str | Path, **options: Any) -> dict[str, Any]:
    """Measure a trained encoder, and by the same protocol a randomly initialized one.

    Args:
        task: "knn", "linear", "linear_sweep", "finetune", "segmentation" or "detection".
        run: a run folder; or an encoder file or checkpoint, together with ``data``.
        options: of :func:`evaluate_all` and of the task: ``k``, ``temperature`` (knn); ``epochs``, ``blr``,
            ``weight_decay`` (linear, linear_sweep); or those of :func:`~dmjd.evaluation.supervised.finetune.finetune`,
            :func:`~dmjd.evaluation.supervised.segmentation.segmentation` and
            :func:`~dmjd.evaluation.supervised.detection.detection`.

    Returns:
        What is written to ``evaluation/<task>.json``: "result", "random_init" and, for tasks on frozen features,
        "raw_pixels" with accuracies 0 to 1 under "top1" and "top5"; "configuration", "data", "seed", "versions", ...

    Raises:
        ValueError: for an unknown task or setting, a folder that is no run, or data that is unlabeled, has one class
            or no test part.
    """
    if task in TRAINED:
        return TRAINED[task](run, **options)
    shared = set(inspect.signature(evaluate_all).parameters)
    own = {name: value for name, value in options.items() if name not in shared}
    return evaluate_all({task: own}, run, **{k: v for k, v in options.items() if k in shared})[task]
