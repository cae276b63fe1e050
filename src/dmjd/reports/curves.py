"""Training curves of several runs, as data for interactive figures."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dmjd.reports.facts import RunFacts
from dmjd.result_files import is_number

# title -> help and scalars of metrics.jsonl
PANELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "loss": (
        "What training minimizes: loss = mim + theta * vis. mim: prediction of masked tokens; vis: of visible ones.",
        ("loss", "mim", "vis"),
    ),
    "held-out loss": (
        "The same loss on images that are not trained on. If it rises while the loss falls, the model overfits.",
        ("held_out_loss",),
    ),
    "learning rate": ("Rises in the warm-up, and has fallen to zero at the end.", ("lr",)),
    "online kNN, top-1": (
        "Accuracy of a nearest-neighbor classifier on frozen features, beside random weights and raw pixels.",
        ("knn_top1", "knn_random_init", "knn_raw_pixels"),
    ),
    "effective rank": (
        "How many directions of the features carry information. A fall to very few is a collapse.",
        ("effective_rank",),
    ),
    "feature deviation": ("Standard deviation of a feature over the images; near zero: collapse.", ("feature_std",)),
    "alpha-ReQ": ("How fast the spectrum of the features decays: the exponent of a power law.", ("alpha_req",)),
    "neighbors kept": (
        "Fraction of the nearest neighbors that are the same as at the last evaluation: near 1 if little changes.",
        ("neighbors_kept",),
    ),
    "drift from the start": (
        "How similar the features still are to those of the starting weights.",
        ("drift_cosine", "drift_neighbors"),
    ),
    "images/s": ("Training speed.", ("images_per_s",)),
    "data wait": (
        "Fraction of the time that training waits for images. Over 0.1: more --num-workers. If it stays over 0.7, "
        "more --num-views of fewer images (--batch-size) may learn more.",
        ("data_wait",),
    ),
    "memory": ("Peak memory in GB: of tensors on a GPU, of the process on a CPU.", ("memory_gb",)),
    "gradient norm": ("A sudden rise precedes divergence; --clip-grad limits it.", ("grad_norm",)),
}

LABEL_FREE = ("held_out_loss", "effective_rank", "feature_std", "alpha_req", "neighbors_kept")

_BASELINES = ("knn_random_init", "knn_raw_pixels")

_NOT_SCALARS = {"step", "epoch", "seconds"}

_MOST_POINTS, _FEWEST, _MOST = 24_000, 60, 500  # of all curves together, and of one


def curve_panels(runs: Sequence[RunFacts]) -> list[dict[str, Any]]:
    """One entry per quantity that any run logged: title, help, and the curves of all runs.

    Each curve has the run's position, the scalar's name, and lists ``step``, ``epoch``, ``minutes`` and ``y``.
    """
    known = {name for _, names in PANELS.values() for name in names}
    others = sorted({name for run in runs for line in run.metrics for name in line} - known - _NOT_SCALARS)
    panels = PANELS | {name.replace("_", " "): ("", (name,)) for name in others}
    if len(runs) > 1:  # one scalar in each panel, so that colors tell the runs apart; baselines are constant
        panels = {
            (f"{title}: {name}" if name in ("mim", "vis", "drift_neighbors") else title): (text, (name,))
            for title, (text, names) in panels.items()
            for name in names
            if name not in _BASELINES
        }
    named = [(title, text, _points(runs, names)) for title, (text, names) in panels.items()]
    named = [(title, text, curves) for title, text, curves in named if curves]
    most = min(_MOST, max(_FEWEST, _MOST_POINTS // max(1, sum(len(curves) for _, _, curves in named))))
    return [
        {
            "title": title,
            "help": text,
            "curves": [{"run": run, "name": name, **_columns(thinned(points, most))} for run, name, points in curves],
        }
        for title, text, curves in named
    ]


_Point = tuple[int, float | None, float | None, float]  # step, epoch, minutes, value


def _points(runs: Sequence[RunFacts], names: Sequence[str]) -> list[tuple[int, str, list[_Point]]]:
    found = []
    for number, run in enumerate(runs):
        lines = [line for line in run.metrics if any(is_number(line.get(name)) for name in names)]
        steps = [line["step"] for line in lines]
        epochs, seconds = (_at_steps(run.metrics, name, steps) for name in ("epoch", "seconds"))
        minutes = [None if value is None else value / 60 for value in seconds]
        for name in names:
            points = [
                (step, epoch, minute, float(line[name]))
                for line, step, epoch, minute in zip(lines, steps, epochs, minutes, strict=True)
                if is_number(line.get(name))
            ]
            if points:
                found.append((number, name, points))
    return found


def _at_steps(metrics: Sequence[dict[str, Any]], name: str, steps: Sequence[int]) -> list[float | None]:
    """A quantity that grows with the steps, between the steps at which it was logged: evaluations do not log it."""
    known = {line["step"]: float(line[name]) for line in metrics if is_number(line.get(name))}
    if not known:
        return [None] * len(steps)
    values = np.interp(steps, sorted(known), [known[step] for step in sorted(known)], math.nan, math.nan)
    return [None if math.isnan(value) else value for value in values.tolist()]


def thinned(points: Sequence[_Point], most: int) -> list[_Point]:
    """At most about ``most`` points: the first, the last, and the lowest and highest of equal parts between them."""
    if len(points) <= most:
        return list(points)
    parts = max(1, (most - 2) // 2)
    keep = {0, len(points) - 1}
    for part in range(parts):
        rows = range(len(points) * part // parts, len(points) * (part + 1) // parts)
        keep |= {min(rows, key=lambda row: points[row][3]), max(rows, key=lambda row: points[row][3])}
    return [points[row] for row in sorted(keep)]


def _columns(points: Sequence[_Point]) -> dict[str, list[Any]]:
    columns = zip(*points, strict=True)
    return {
        name: [None if value is None else float(f"{value:.5g}") if name != "step" else value for value in column]
        for name, column in zip(("step", "epoch", "minutes", "y"), columns, strict=True)
    }
