"""Predictions of segmentation and detection next to the ground truth, drawn over the images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from dmjd.data.sources.coco import Instances
from dmjd.figures.grid import dpi_of, height_over_width, save_figure, show_image
from dmjd.figures.render import to_rgb
from dmjd.text import drawable

OPACITY = 0.55  # of classes over an image

IGNORED = (0.0, 0.0, 0.0)  # color of pixels without label

_PANEL_INCHES = 2.6

_MOST_IN_LEGEND = 40

Color = tuple[float, float, float]


@dataclass(frozen=True)
class Objects:
    """Objects of an image: boxes [n, 4] in pixels, labels [n], scores [n] of predictions, masks [n, H, W]."""

    boxes: Tensor
    labels: Tensor
    scores: Tensor | None = None
    masks: Tensor | None = None


@dataclass(frozen=True)
class Panel:
    """One image of a figure: RGB [H, W, 3] in 0..1, and the objects whose boxes are drawn over it."""

    image: np.ndarray
    objects: Objects | None = None


@dataclass(frozen=True)
class Overlays:
    """Rows of panels, their column titles, and the classes of the legend."""

    titles: list[str]
    rows: list[list[Panel]]
    classes: list[str]


def class_colors(count: int) -> list[Color]:
    """Colors for ``count`` classes; easy to tell apart for up to twenty."""
    if count <= 20:
        return [colormaps["tab20"](k)[:3] for k in [*range(0, 20, 2), *range(1, 20, 2)][:count]]
    return [colormaps["hsv"](k / count)[:3] for k in range(count)]


def segmentation_panels(examples: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], classes: list[str]) -> Overlays:
    """(image [H, W, C], ground truth [H, W], prediction [H, W]) -> the image alone and with each of them over it."""
    colors = np.array([*class_colors(len(classes)), IGNORED], np.float32)  # index -1, IGNORE, takes the last
    rows = []
    for image, truth, prediction in examples:
        base = _rgb(image)
        rows.append([Panel(base), *(Panel(base + OPACITY * (colors[index] - base)) for index in (truth, prediction))])
    return Overlays(["image", "ground truth (black: no label)", "prediction"], rows, classes)


def detection_panels(
    examples: Sequence[tuple[np.ndarray, Instances, dict[str, Tensor]]], classes: list[str]
) -> Overlays:
    """(image [H, W, C], ground truth, prediction) -> the image with each of them over it."""
    rows = []
    for image, truth, prediction in examples:
        base = _rgb(image)
        labeled = Objects(truth.boxes, truth.labels, None, truth.masks)
        masks = prediction.get("masks")
        predicted = Objects(prediction["boxes"], prediction["labels"], prediction["scores"], masks)
        rows.append([Panel(_with_masks(base, objects, len(classes)), objects) for objects in (labeled, predicted)])
    return Overlays(["ground truth", "prediction"], rows, classes)


def _rgb(image: np.ndarray) -> np.ndarray:
    """[H, W, C] on the 0..255 scale -> [H, W, 3] in 0..1."""
    return to_rgb(torch.from_numpy(image).permute(2, 0, 1)[None])[0].numpy()


def _with_masks(base: np.ndarray, objects: Objects, num_classes: int) -> np.ndarray:
    colors = class_colors(num_classes)
    shown = base.copy()
    for mask, label in zip(objects.masks if objects.masks is not None else (), objects.labels.tolist(), strict=False):
        inside = mask.to(torch.bool).numpy()
        shown[inside] += OPACITY * (np.array(colors[label], np.float32) - shown[inside])
    return shown


def save_overlays(overlays: Overlays, file: Path) -> None:
    """Draw the panels and write the figure to a file."""
    columns, rows = len(overlays.titles), len(overlays.rows)
    size = (columns * _PANEL_INCHES, rows * _PANEL_INCHES * height_over_width(overlays.rows[0][0].image) + 0.9)
    figure = Figure(figsize=size, dpi=dpi_of(size), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes_row, panels in zip(grid, overlays.rows, strict=True):
        for axes, panel in zip(axes_row, panels, strict=True):
            _draw(axes, panel, overlays.classes)
    for axes, title in zip(grid[0], overlays.titles, strict=True):
        axes.set_title(title, fontsize=9)
    colors = class_colors(len(overlays.classes))
    shown = list(zip(overlays.classes, colors, strict=True))[:_MOST_IN_LEGEND]
    handles = [Patch(color=color, label=drawable(name, 24)) for name, color in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), fontsize=7, frameon=False)
    save_figure(figure, file)


def _draw(axes: Axes, panel: Panel, classes: list[str]) -> None:
    show_image(axes, panel.image, interpolation="antialiased")
    objects = panel.objects
    if objects is None:
        return
    colors = class_colors(len(classes))
    scores = objects.scores.tolist() if objects.scores is not None else [None] * len(objects.labels)
    for box, label, score in zip(objects.boxes.tolist(), objects.labels.tolist(), scores, strict=True):
        left, top, right, bottom = box
        sides = right - left, bottom - top
        axes.add_patch(Rectangle((left, top), *sides, fill=False, color=colors[label], linewidth=1))
        if score is not None:
            axes.text(left, top, f"{score:.2f}", fontsize=4, color=colors[label], va="bottom")
