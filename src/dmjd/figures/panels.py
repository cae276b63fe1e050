"""Rows of images with texts around them.

All of them are drawn into one pair of axes that covers the figure, in inches from its upper left corner. A pair of axes
for each image, and a layout that matplotlib computes, would take seconds.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

DPI = 130

GAP = 0.08  # inches between images and texts, and at the edges of the figure

_TITLE, _LABEL = 9.0, 8.0  # points of the fonts of column titles and of other texts

_LETTERS_PER_INCH = 16  # of a note

_MOST_PIXELS = 1 << 15  # of a side of a figure; matplotlib draws less than twice as many


@dataclass(frozen=True)
class Panel:
    """An RGB image [H, W, 3] in 0..1, the text below it, and the color of its border."""

    image: np.ndarray
    caption: str = ""
    border: str | None = None


BLANK = Panel(np.ones((1, 1, 3), np.float32))  # fills up a row that has fewer images than the others


def dpi_of(size: tuple[float, float]) -> float:
    """Resolution of a figure of (width, height) inches: lower for one with very many rows."""
    return min(DPI, _MOST_PIXELS / max(size))


def height_over_width(image: Tensor | np.ndarray) -> float:
    """Shape of the panel of an image [H, W, ...]: long and narrow images are drawn smaller, in a panel 1 to 4."""
    return min(4.0, max(0.25, image.shape[0] / image.shape[1]))


def draw_panels(
    titles: Sequence[str],
    rows: Sequence[Sequence[Panel]],
    size: tuple[float, float],
    *,
    labels: Sequence[str] = (),
    note: str = "",
    footer: float = 0.0,
) -> Figure:
    """Draw rows of panels.

    Args:
        titles: texts above the columns.
        rows: panels of each row, one per title; an image of another shape than its panel is centered in it.
        size: (width, height) of a panel in inches; columns are as wide as their texts if those are wider.
        labels: texts left of the second panel of each row.
        note: text below the rows.
        footer: inches to leave empty at the bottom.

    Returns:
        A figure with one pair of axes, whose ``images`` are those of the rows, in order; their extents are in inches.
    """
    captions = [panel.caption for row in rows for panel in row]
    texts = [text_width(text, _TITLE) for text in titles] + [text_width(text, _LABEL) for text in captions]
    across = max(size[0], *texts) + GAP
    below = max(_height(text, _LABEL) for text in captions)
    down = size[1] + below + GAP
    beside = max((_height(text, _LABEL) for text in labels), default=0.0)
    top = max(_height(text, _TITLE) for text in titles) + 1.5 * GAP
    width = len(titles) * across + beside + GAP
    wrapped = "\n".join(textwrap.wrap(note, int(width * _LETTERS_PER_INCH)))
    height = top + len(rows) * down + _height(wrapped, _LABEL) + (GAP if note else 0) + footer
    figure, axes = _page((width, height))
    lefts = [GAP + column * across + (beside if column else 0) for column in range(len(titles))]
    for left, title in zip(lefts, titles, strict=True):
        axes.text(left + (across - GAP) / 2, top - 0.06, title, fontsize=_TITLE, ha="center", va="bottom")
    for row, panels in enumerate(rows):
        for left, panel in zip(lefts, panels, strict=True):
            _draw(axes, panel, (left + (across - GAP - size[0]) / 2, top + row * down), size)
    for row, label in enumerate(labels):
        middle = top + row * down + size[1] / 2
        axes.text(across + beside, middle, label, fontsize=_LABEL, rotation=90, ha="right", va="center")
    if wrapped:
        figure.supxlabel(wrapped, y=(footer + GAP) / height, fontsize=_LABEL)
    return figure


def text_width(text: str, points: float) -> float:
    """Inches of a text's longest line, about: letters of matplotlib's font are 0.6 of its height wide on average."""
    return 0.6 * points / 72 * max(map(len, text.split("\n")))


def _height(text: str, points: float) -> float:
    """Inches of a text: 0 if it is empty."""
    return 1.25 * points / 72 * len(text.splitlines())


def _page(size: tuple[float, float]) -> tuple[Figure, Axes]:
    """A figure of (width, height) inches, and axes in inches that cover it."""
    figure = Figure(figsize=size, dpi=dpi_of(size))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, size[0]), ylim=(size[1], 0))
    axes.set_axis_off()
    return figure, axes


def _draw(axes: Axes, panel: Panel, corner: tuple[float, float], size: tuple[float, float]) -> None:
    """Draw a panel whose upper left corner is given; a small image keeps sharp pixel edges."""
    H, W = panel.image.shape[:2]
    scale = min(size[0] / W, size[1] / H)  # inches of a pixel
    left, top = corner[0] + (size[0] - scale * W) / 2, corner[1] + (size[1] - scale * H) / 2
    axes.imshow(
        panel.image,
        interpolation="nearest" if H < 300 else "antialiased",
        extent=(left, left + scale * W, top + scale * H, top),
        aspect="auto",
    )
    if panel.border is not None:
        place = Rectangle((left, top), scale * W, scale * H, fill=False, edgecolor=panel.border, linewidth=2.5)
        axes.add_patch(place)
    if panel.caption:
        middle = corner[0] + size[0] / 2
        axes.text(middle, corner[1] + size[1] + 0.04, panel.caption, fontsize=_LABEL, ha="center", va="top")
