"""Images of what segmentation and detection find, beside what is there."""

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
from dmjd.files import atomic

OPACITY = 0.55  # of classes over an image

IGNORED = (0.0, 0.0, 0.0)  # where the truth has no label

PANEL_INCHES, DPI = 2.6, 130

_MOST_IN_LEGEND = 40

Color = tuple[float, float, float]


@dataclass(frozen=True)
class BoxesOver:
    """Boxes [n, 4] in pixels with a class and, where found and not given, a score; outlines [n, H, W] or None."""

    boxes: Tensor
    labels: Tensor
    scores: Tensor | None = None
    masks: Tensor | None = None


@dataclass(frozen=True)
class Panel:
    """One image of a figure: [H, W, 3] in 0..1, and boxes over it."""

    image: np.ndarray
    boxes: BoxesOver | None = None


@dataclass(frozen=True)
class Overlays:
    """Rows of panels under titles, and the classes whose colors a legend explains."""

    titles: list[str]
    rows: list[list[Panel]]
    classes: list[str]


def class_colors(count: int) -> list[Color]:
    """Colors of classes, well apart for up to twenty."""
    if count <= 20:
        return [colormaps["tab20"](k)[:3] for k in [*range(0, 20, 2), *range(1, 20, 2)][:count]]
    return [colormaps["hsv"](k / count)[:3] for k in range(count)]


def rgb(image: np.ndarray) -> np.ndarray:
    """[H, W, C] on the 0..255 scale -> [H, W, 3] in 0..1; of one or two channels the first in gray."""
    shown = image[..., :3] if image.shape[2] >= 3 else np.repeat(image[..., :1], 3, axis=2)
    return (shown.astype(np.float32) / 255).clip(0, 1)


def segmentation_panels(examples: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], classes: list[str]) -> Overlays:
    """(image [H, W, C], true classes [H, W], found ones [H, W]) -> image, truth and prediction over it."""
    colors = np.array([*class_colors(len(classes)), IGNORED], np.float32)  # index -1, IGNORE, takes the last
    rows = []
    for image, truth, found in examples:
        base = rgb(image)
        rows.append([Panel(base), *(Panel(base + OPACITY * (colors[index] - base)) for index in (truth, found))])
    return Overlays(["image", "truth (black: no label)", "found"], rows, classes)


def detection_panels(
    examples: Sequence[tuple[np.ndarray, Instances, dict[str, Tensor]]], classes: list[str]
) -> Overlays:
    """(image [H, W, C], objects, found ones) -> truth and prediction over the image."""
    rows = []
    for image, truth, found in examples:
        base = rgb(image)
        there = BoxesOver(truth.boxes, truth.labels, None, truth.masks)
        said = BoxesOver(found["boxes"], found["labels"], found["scores"], found.get("masks"))
        rows.append([Panel(_with_masks(base, boxes, len(classes)), boxes) for boxes in (there, said)])
    return Overlays(["truth", "found"], rows, classes)


def _with_masks(base: np.ndarray, boxes: BoxesOver, num_classes: int) -> np.ndarray:
    colors = class_colors(num_classes)
    shown = base.copy()
    for mask, label in zip(boxes.masks if boxes.masks is not None else (), boxes.labels.tolist(), strict=False):
        inside = mask.to(torch.bool).numpy()
        shown[inside] += OPACITY * (np.array(colors[label], np.float32) - shown[inside])
    return shown


def save_overlays(overlays: Overlays, file: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    height, width = overlays.rows[0][0].image.shape[:2]
    columns, rows = len(overlays.titles), len(overlays.rows)
    tall = PANEL_INCHES * height / width
    figure = Figure(figsize=(columns * PANEL_INCHES, rows * tall + 0.9), dpi=DPI, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes_row, panels in zip(grid, overlays.rows, strict=True):
        for axes, panel in zip(axes_row, panels, strict=True):
            _draw(axes, panel, overlays.classes)
    for axes, title in zip(grid[0], overlays.titles, strict=True):
        axes.set_title(title, fontsize=9)
    colors = class_colors(len(overlays.classes))
    shown = list(zip(overlays.classes, colors, strict=True))[:_MOST_IN_LEGEND]
    handles = [Patch(color=color, label=name) for name, color in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), fontsize=7, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic(file) as temporary:
        figure.savefig(temporary, format="png")


def _draw(axes: Axes, panel: Panel, classes: list[str]) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.imshow(panel.image, interpolation="antialiased")
    if panel.boxes is None:
        return
    colors = class_colors(len(classes))
    scores = panel.boxes.scores.tolist() if panel.boxes.scores is not None else [None] * len(panel.boxes.labels)
    for box, label, score in zip(panel.boxes.boxes.tolist(), panel.boxes.labels.tolist(), scores, strict=True):
        left, top, right, bottom = box
        sides = right - left, bottom - top
        axes.add_patch(Rectangle((left, top), *sides, fill=False, color=colors[label], linewidth=1))
        if score is not None:
            axes.text(left, top, f"{score:.2f}", fontsize=4, color=colors[label], va="bottom")
