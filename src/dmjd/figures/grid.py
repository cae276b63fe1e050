"""Grids of images, and saving of figures."""

import warnings
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor

from dmjd.config.checks import check_path
from dmjd.figures.panels import Panel, draw_panels, height_over_width
from dmjd.files import atomic, check_writable, make_folder

_PANEL_INCHES = 1.9

_NOT_IMAGES = {"pgf", "raw", "rgba"}  # formats of matplotlib that need LaTeX, or have no header

# title -> one RGB image [H, W, 3] in 0..1 per row of the figure
Columns = dict[str, list[Tensor]]


def image_grid(columns: Columns, row_labels: Sequence[str], note: str = "") -> Figure:
    """Draw images in rows and columns, with a title above each column and a note below."""
    rows = [[Panel(image.cpu().numpy()) for image in images] for images in zip(*columns.values(), strict=True)]
    return panel_grid(list(columns), rows, row_labels, note)


def panel_grid(
    titles: Sequence[str], rows: Sequence[Sequence[Panel]], row_labels: Sequence[str] = (), note: str = ""
) -> Figure:
    """Draw rows of panels, in the size of an image of :func:`image_grid`."""
    shape = height_over_width(rows[0][0].image)
    width = _PANEL_INCHES / max(1, shape) ** 0.5
    return draw_panels(titles, rows, (width, width * shape), labels=row_labels, note=note)


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
