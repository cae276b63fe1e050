"""Grids of images, and saving of figures."""

import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor

from dmjd.config.checks import check_path
from dmjd.files import atomic, check_writable, make_folder

DPI = 130

_PANEL_INCHES = 1.9

_MOST_PIXELS = 1 << 15  # of a side of a figure; matplotlib draws less than twice as many

_NOT_IMAGES = {"pgf", "raw", "rgba"}  # formats of matplotlib that need LaTeX, or have no header

# title -> one RGB image [H, W, 3] in 0..1 per row of the figure
Columns = dict[str, list[Tensor]]


def dpi_of(size: tuple[float, float]) -> float:
    """Resolution of a figure of (width, height) inches: lower for one with very many rows."""
    return min(DPI, _MOST_PIXELS / max(size))


def height_over_width(image: Tensor | np.ndarray) -> float:
    """Shape of the panel of an image [H, W, ...]: long and narrow images are drawn smaller, in a panel 1 to 4."""
    return min(4.0, max(0.25, image.shape[0] / image.shape[1]))


def image_grid(columns: Columns, row_labels: Sequence[str], note: str = "") -> Figure:
    """Draw images in rows and columns, with a title above each column and a note below."""
    first = next(iter(columns.values()))[0]
    shape = height_over_width(first)
    width = _PANEL_INCHES / max(1, shape) ** 0.5
    height = width * shape
    size = (len(columns) * (width + 0.08) + 0.3, len(row_labels) * (height + 0.08) + 0.7)
    figure = Figure(figsize=size, dpi=dpi_of(size), layout="constrained")
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


def check_ending(path: Path) -> str:
    """The format of an image file by its ending; ValueError if there is no such format."""
    formats = set(FigureCanvasBase.get_supported_filetypes()) - _NOT_IMAGES
    if (ending := path.suffix.lower().lstrip(".")) not in formats:
        raise ValueError(f"cannot write an image as '{path.name}': end it in .png (or {', .'.join(sorted(formats))})")
    return ending


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure atomically, in the format of the file's ending; missing folders are created.

    Warnings of matplotlib, such as of characters that its font lacks, are not shown.

    Raises:
        ValueError: if the ending is not an image format, or the path cannot be written to.
    """
    path = check_path("out", path)
    ending = check_ending(path)
    make_folder(path.parent)
    for text in figure.findobj(Text):
        text.set_usetex(False)  # whatever the user's own settings of matplotlib are: LaTeX would read names as code
    with atomic(path) as temporary, rc_context({"text.usetex": False}), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(temporary, format=ending)
    return path


def figure_path(path: str | Path) -> Path:
    """Check, before a figure is computed, that it can be written; returns the path.

    Raises:
        ValueError: if the ending is not an image format, or the path cannot be written to.
    """
    path = check_path("out", path)
    check_ending(path)
    check_writable(path)
    return path
