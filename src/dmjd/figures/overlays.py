"""Predictions of segmentation and detection next to the ground truth, drawn over the images."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from matplotlib.patches import Patch, Rectangle
from matplotlib.transforms import Bbox, TransformedBbox
from torch import Tensor

from dmjd.data.sources.coco import Instances
from dmjd.figures.grid import save_figure
from dmjd.figures.panels import Panel, draw_panels, height_over_width, text_width
from dmjd.figures.render import to_rgb
from dmjd.text import drawable

OPACITY = 0.55  # of classes over an image

IGNORED = (0.0, 0.0, 0.0)  # color of pixels without label

_PANEL_INCHES = 2.6

_LEGEND = 7.0  # points of the font of the legend

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
class Overlay(Panel):
    """One image of a figure, and the objects whose boxes are drawn over it."""

    objects: Objects | None = None


@dataclass(frozen=True)
class Overlays:
    """Rows of panels, their column titles, and the classes of the legend."""

    titles: list[str]
    rows: list[list[Overlay]]
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
        colored = [Overlay(base + OPACITY * (colors[index] - base)) for index in (truth, prediction)]
        rows.append([Overlay(base), *colored])
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
        both = (labeled, predicted)
        rows.append([Overlay(_with_masks(base, objects, len(classes)), objects=objects) for objects in both])
    return Overlays(["ground truth", "prediction"], rows, classes)


def _rgb(image: np.ndarray) -> np.ndarray:
    """[H, W, C] on the 0..255 scale -> [H, W, 3] in 0..1."""
    return to_rgb(torch.tensor(image).permute(2, 0, 1)[None])[0].numpy()  # a copy: decoded images may be read-only


def _with_masks(base: np.ndarray, objects: Objects, num_classes: int) -> np.ndarray:
    colors = class_colors(num_classes)
    shown = base.copy()
    for mask, label in zip(objects.masks if objects.masks is not None else (), objects.labels.tolist(), strict=False):
        inside = mask.to(torch.bool).numpy()
        shown[inside] += OPACITY * (np.array(colors[label], np.float32) - shown[inside])
    return shown


def save_overlays(overlays: Overlays, file: Path) -> None:
    """Draw the panels and write the figure to a file."""
    size = (_PANEL_INCHES, _PANEL_INCHES * height_over_width(overlays.rows[0][0].image))
    names = [drawable(name, 24) for name in overlays.classes[:_MOST_IN_LEGEND]]
    columns = min(6, len(names), int(len(overlays.titles) * size[0] / (text_width(max(names, key=len), _LEGEND) + 0.5)))
    footer = _LEGEND / 72 * (1.75 * math.ceil(len(names) / columns) + 1)  # 1.75 is the space between lines
    figure = draw_panels(overlays.titles, overlays.rows, size, footer=footer)
    axes, colors = figure.axes[0], class_colors(len(overlays.classes))
    for image, panel in zip(axes.images, itertools.chain.from_iterable(overlays.rows), strict=True):
        image.set_interpolation("antialiased")
        if panel.objects is not None:
            _draw_boxes(axes, image, panel.objects, colors)
    handles = [Patch(color=color, label=name) for name, color in zip(names, colors, strict=False)]
    axes.legend(handles=handles, loc="lower center", ncols=columns, fontsize=_LEGEND, frameon=False)
    save_figure(figure, file)


def _draw_boxes(axes: Axes, image: AxesImage, objects: Objects, colors: Sequence[Color]) -> None:
    """Draw boxes, with their scores, over an image that lies somewhere in a figure."""
    x, right, bottom, y = image.get_extent()
    inside = TransformedBbox(Bbox.from_extents(x, y, right, bottom), axes.transData)
    rows, columns = image.get_size()
    scores = objects.scores.tolist() if objects.scores is not None else [None] * len(objects.labels)
    scale = objects.boxes.new_tensor([(right - x) / columns, (bottom - y) / rows] * 2)  # inches per pixel
    boxes = objects.boxes * scale + objects.boxes.new_tensor([x, y] * 2)
    for (x0, y0, x1, y1), label, score in zip(boxes.tolist(), objects.labels.tolist(), scores, strict=True):
        drawn = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color=colors[label], linewidth=1)
        axes.add_patch(drawn).set_clip_box(inside)
        if score is not None:
            axes.text(x0, y0, f"{score:.2f}", fontsize=4, color=colors[label], va="bottom")
