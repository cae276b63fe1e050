"""Training curves."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dmjd.config.checks import check_path
from dmjd.figures.grid import save_figure
from dmjd.figures.panels import DPI
from dmjd.runs.metrics import read_metrics

_LARGEST = 1e300  # of a number that is drawn

_WIDTH, _HEIGHT = 4.2, 3.2  # inches of a panel

_LEFT, _RIGHT, _BELOW, _ABOVE = 0.7, 0.28, 0.52, 0.4  # inches beside the axes, for numbers and titles

# panel -> scalars of metrics.jsonl
_CURVES = {
    "loss": ("loss", "mim", "vis", "held_out_loss"),
    "learning rate": ("lr",),
    "effective rank of features": ("effective_rank",),
    "neighbors kept since the last evaluation": ("neighbors_kept",),
    "drift from the start": ("drift_cosine", "drift_neighbors"),
    "online kNN, top-1": ("knn_top1", "knn_random_init", "knn_raw_pixels"),
}


def curves_figure(metrics: str | Path) -> Figure:
    """Draw training curves: the loss and its parts, the learning rate, and online kNN if it was measured.

    Args:
        metrics: ``metrics.jsonl`` of a run; damaged lines, such as half a line left by a kill, are skipped.

    Raises:
        ValueError: if the file cannot be read, or nothing is logged yet.
    """
    lines = read_metrics(check_path("metrics", metrics))
    panels = {
        title: {name: [(line["step"], line[name]) for line in lines if _is_number(line.get(name))] for name in names}
        for title, names in _CURVES.items()
    }
    panels = {title: curves for title, curves in panels.items() if any(curves.values())}
    if not panels:
        raise ValueError(f"{metrics} holds no curves yet: give it a run's metrics.jsonl after its first logged step")
    figure = Figure(figsize=(_WIDTH * len(panels), _HEIGHT), dpi=DPI)
    # Places in inches: a layout that matplotlib computes takes as long as the drawing.
    width = _WIDTH - _LEFT - _RIGHT
    places = {"left": _LEFT / figure.get_figwidth(), "right": 1 - _RIGHT / figure.get_figwidth()}
    places |= {"bottom": _BELOW / _HEIGHT, "top": 1 - _ABOVE / _HEIGHT, "wspace": (_LEFT + _RIGHT) / width}
    rows = figure.subplots(1, len(panels), squeeze=False, gridspec_kw=places)
    for axes, (title, curves) in zip(rows[0], panels.items(), strict=True):
        for name, points in curves.items():
            if points:
                axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2, marker="." if len(points) < 20 else "")
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST


def save_curves_figure(metrics: str | Path, path: str | Path) -> Path:
    """Write :func:`curves_figure` to a file."""
    return save_figure(curves_figure(metrics), path)
