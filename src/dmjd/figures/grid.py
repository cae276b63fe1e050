"""Grids of images, and saving of figures."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from torch import Tensor

from dmjd.files import atomic, check_writable, make_folder

DPI = 130

_PANEL_INCHES = 1.9

# title -> one RGB image [H, W, 3] in 0..1 per row of the figure
Columns = dict[str, list[Tensor]]


def image_grid(columns: Columns, row_labels: Sequence[str], note: str = "") -> Figure:
    """Draw images in rows and columns, with a title above each column and a note below."""
    first = next(iter(columns.values()))[0]
    shape = first.shape[0] / first.shape[1]  # height over width
    width = _PANEL_INCHES / max(1, shape) ** 0.5
    height = width * shape
    size = (len(columns) * (width + 0.08) + 0.3, len(row_labels) * (height + 0.08) + 0.7)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = figure.subplots(len(row_labels), len(columns), squeeze=False)
    for column, (title, panels) in enumerate(columns.items()):
        axes[0, column].set_title(title, fontsize=9)
        for row, panel in enumerate(panels):
            show_image(axes[row, column], panel.cpu().numpy())
    for row, label in enumerate(row_labels):
        axes[row, 1].set_ylabel(label, fontsize=8)
    if note:
        figure.supxlabel("\n".join(textwrap.wrap(note, int(size[0] * 16))), fontsize=8)
    return figure


def show_image(axes: Axes, image: np.ndarray, interpolation: str | None = None) -> None:
    """Draw an RGB image [H, W, 3] without ticks and spines; small images keep sharp pixel edges."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.imshow(image, interpolation=interpolation or ("nearest" if image.shape[0] < 300 else "antialiased"))


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure atomically, in the format of the file's ending; missing folders are created.

    Raises:
        ValueError: if the ending is not an image format, or the path cannot be written to.
    """
    path = _checked_ending(path)
    make_folder(path.parent)
    with atomic(path) as temporary:
        figure.savefig(temporary, format=_format_of(path))
    return path


def figure_path(path: str | Path) -> Path:
    """Check, before a figure is computed, that it can be written; returns the path.

    Raises:
        ValueError: if the ending is not an image format, or the path cannot be written to.
    """
    path = _checked_ending(path)
    check_writable(path)
    return path


def _checked_ending(path: str | Path) -> Path:
    path = Path(path).expanduser()
    formats = FigureCanvasBase.get_supported_filetypes()
    if _format_of(path) not in formats:
        raise ValueError(f"cannot write an image as '{path.name}': end it in .png (or {', .'.join(sorted(formats))})")
    return path


def _format_of(path: Path) -> str:
    return path.suffix.lower().lstrip(".")
