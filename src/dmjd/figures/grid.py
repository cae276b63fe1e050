"""Panels in rows and columns, and figures as files."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from dmjd.files import atomic

PANEL_INCHES = 1.9

DPI = 130

# title -> one RGB image [H, W, 3] per row of the figure
Columns = dict[str, list[Tensor]]


def sheet(columns: Columns, row_labels: Sequence[str], note: str = "") -> Figure:
    """Panels in rows and columns with a title over each column and a line of explanation below."""
    first = next(iter(columns.values()))[0]
    shape = first.shape[0] / first.shape[1]  # height over width
    width, height = PANEL_INCHES / max(1, shape) ** 0.5, PANEL_INCHES * shape / max(1, shape) ** 0.5
    size = (len(columns) * (width + 0.08) + 0.3, len(row_labels) * (height + 0.08) + 0.7)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = figure.subplots(len(row_labels), len(columns), squeeze=False)
    for column, (title, panels) in enumerate(columns.items()):
        axes[0, column].set_title(title, fontsize=9)
        for row, panel in enumerate(panels):
            _show(axes[row, column], panel)
    for row, label in enumerate(row_labels):
        axes[row, 1].set_ylabel(label, fontsize=8)
    if note:
        figure.supxlabel("\n".join(textwrap.wrap(note, int(size[0] * 16))), fontsize=8)
    return figure


def _show(axes: Axes, panel: Tensor) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.imshow(panel.cpu().numpy(), interpolation="nearest" if panel.shape[0] < 300 else "antialiased")


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure whole or not at all, in the format its ending names; missing folders are made.

    Raises:
        ValueError: for an ending that is no image format, or a place that cannot be written.
    """
    path = Path(path).expanduser()
    formats = figure.canvas.get_supported_filetypes()
    if (ending := path.suffix.lower().lstrip(".")) not in formats:
        raise ValueError(f"cannot write an image as '{path.name}': end it in .png (or {', .'.join(sorted(formats))})")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"could not write {path}: {error.strerror}") from None
    with atomic(path) as temporary:
        figure.savefig(temporary, format=ending)
    return path
