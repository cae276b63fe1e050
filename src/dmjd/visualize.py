"""Figures: what was masked, what was to be learnt, what the model makes of it, and how training went.

Every function gives a matplotlib ``Figure`` of its own; pyplot and its global state are not used.
"""

import contextlib
import json
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from dmjd.evaluation.features import known_preprocess
from dmjd.masking import Masks
from dmjd.model import MaskedImageModel
from dmjd.painters import hide, painter_for, picture_rgb, spread, tint
from dmjd.targets import HogTarget, PixelTarget, Target

PANEL_INCHES = 1.9
DPI = 130
UNNORMALISED = "un-normalised with the true patch mean and std"

# title -> one RGB array [H, W, 3] per row of the figure; None leaves the place empty
Columns = dict[str, Sequence[Tensor | None]]


def mask_figure(images_0_255: Tensor, masks: Masks, grid: tuple[int, int]) -> Figure:
    """Each picture, what each view shows of it, and how often each token is masked.

    Args:
        images_0_255: [B, c, H, W] of any number type, any channels.
        masks: of these pictures. grid: (h, w) tokens.
    """
    rgb = picture_rgb(images_0_255).cpu()  # B, H, W, 3
    mask = masks.mask.cpu()  # K, B, N
    K, B, N = mask.shape
    columns: Columns = {"picture": list(rgb)}
    for k in range(K):
        columns[f"view {k + 1}\n{int(mask[k, 0].sum())} of {N} masked"] = list(hide(rgb, mask[k], grid))
    times = mask.sum(dim=0)  # B, N
    share = (times > 0).float().mean().item()
    heat = 1 - spread(times, grid, rgb.shape[1:3]).float() / K  # B, H, W: white = never masked
    title = f"times masked\nwhite 0, black {K}; {share:.0%} at least once"
    columns[title] = list(heat.unsqueeze(-1).expand(-1, -1, -1, 3))
    return _sheet(columns, [""] * B)


def target_figure(model: MaskedImageModel, images_0_255: Tensor) -> Figure:
    """Each picture and the target of each branch that is on, for every token.

    Args:
        model: whose encoder's ``preprocess`` is set. images_0_255: [B, c, H, W].
    """
    with _evaluating(model):
        normalised = known_preprocess(model.encoder).normalise(images_0_255)
        truths = model.targets(normalised, images_0_255.float())
        columns: Columns = {"picture": list(picture_rgb(images_0_255))}
        for branches, target in _targets(model):
            paint = painter_for(target, model.encoder, images_0_255, truths[branches[0]])
            columns[_target_title(target, branches)] = list(paint(truths[branches[0]]))
    return _sheet(columns, [""] * len(images_0_255), _note(model))


def reconstruction_figure(
    model: MaskedImageModel, images_0_255: Tensor, *, masks: Masks | None = None, keys: Tensor | None = None
) -> Figure:
    """One row for each view: the visible tokens, the target, and what each branch that is on predicts.

    The reconstruction shows predictions in the masked places, among the true tokens (in blue for HOG); the
    distillation shows predictions in the visible places. The model is left as it was.

    Args:
        model: whose encoder's ``preprocess`` is set. images_0_255: [B, c, H, W] on the model's device.
        masks: of these pictures; None = the model's own for ``keys`` [B] int64 (default 0, 1, ...).
    """
    B, device, encoder = len(images_0_255), images_0_255.device, model.encoder
    with _evaluating(model):
        if masks is None:
            masks = model.draw_masks(torch.arange(B, device=device) if keys is None else keys.to(device))
        K = len(masks.mask)
        normalised = known_preprocess(encoder).normalise(images_0_255)
        truths = model.targets(normalised, images_0_255.float())
        predictions = {name: x.float().unflatten(0, (K, B)) for name, x in model.predict(normalised, masks).items()}
        rgb = picture_rgb(images_0_255)
        columns: Columns = {
            "picture": _on_first_view(rgb, K),
            "visible tokens": _by_picture([hide(rgb, mask, encoder.grid) for mask in masks.mask]),
        }
        for branches, target in _targets(model):
            truth = truths[branches[0]]
            paint = painter_for(target, encoder, images_0_255, truth)
            columns[_target_title(target, branches)] = _on_first_view(paint(truth), K)
            for branch in branches:
                ids = masks.masked if branch == "mim" else masks.visible  # K, B, M or V
                views = [paint(_placed(x, i, truth)) for x, i in zip(predictions[branch], ids, strict=True)]
                columns[_BRANCH_TITLES[branch]] = _by_picture(_mark(branch, target, views, masks, encoder.grid))
    labels = [f"view {k + 1}" if K > 1 else "" for _ in range(B) for k in range(K)]
    return _sheet(columns, labels, _note(model))


_BRANCH_TITLES = {"mim": "reconstruction\nof masked tokens", "vis": "distillation\nof visible tokens"}


def _placed(predictions: Tensor, ids: Tensor, truth: Tensor) -> Tensor:
    """Predicted tokens [B, n, C] in their places ids [B, n], among the true ones [B, N, C]."""
    return truth.scatter(1, ids.unsqueeze(-1).expand_as(predictions), predictions)


def _mark(branch: str, target: Target, views: list[Tensor], masks: Masks, grid: tuple[int, int]) -> list[Tensor]:
    """Set the tokens of each view's picture apart that the branch did not predict."""
    if branch == "vis":
        return [hide(view, mask, grid) for view, mask in zip(views, masks.mask, strict=True)]
    if isinstance(target, HogTarget):  # glyphs have no colour of their own to lose
        return [tint(view, ~mask, grid) for view, mask in zip(views, masks.mask, strict=True)]
    return views


def _targets(model: MaskedImageModel) -> list[tuple[list[str], Target]]:
    """The model's targets with the branches that learn them: one entry where both share one."""
    targets = {"mim": model.mim_target, "vis": model.vis_target}
    on = [(branch, target) for branch, target in targets.items() if target is not None]
    if len(on) == 2 and on[0][1] is on[1][1]:
        return [(["mim", "vis"], on[0][1])]
    return [([branch], target) for branch, target in on]


def _target_title(target: Target, branches: list[str]) -> str:
    return f"target '{target.name}'" + ("" if len(branches) == 2 else f"\nof {branches[0]}")


def _note(model: MaskedImageModel) -> str:
    """What a reader of the figure must know about how the targets are drawn."""
    notes = []
    for _, target in _targets(model):
        if isinstance(target, HogTarget):
            notes.append("HOG: strokes lie along edges; positive whitened values; blue: true tokens, not predicted.")
        elif isinstance(target, PixelTarget):
            notes.append(f"Pixel patches are {UNNORMALISED}.")
        else:
            notes.append(f"{target.name}: colours are the first three principal components of the true tokens.")
    return " ".join(notes)


def _on_first_view(pictures: Iterable[Tensor], num_views: int) -> list[Tensor | None]:
    """[B, H, W, 3] -> rows of a figure with K rows for each picture, shown in the first of them."""
    return [row for picture in pictures for row in (picture, *[None] * (num_views - 1))]


def _by_picture(views: Sequence[Tensor]) -> list[Tensor | None]:
    """K times [B, H, W, 3] -> rows of a figure, the views of a picture below each other."""
    return [picture for pictures in zip(*views, strict=True) for picture in pictures]


@contextlib.contextmanager
def _evaluating(model: MaskedImageModel) -> Iterator[None]:
    """Without dropout or gradients; the mode the model was in is restored."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def _sheet(columns: Columns, row_labels: Sequence[str], note: str = "") -> Figure:
    """Panels in rows and columns with a title over each column and a line of explanation below."""
    first = next(panel for panel in next(iter(columns.values())) if panel is not None)
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


def _show(axes: Axes, panel: Tensor | None) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    if panel is not None:
        axes.imshow(panel.cpu().numpy(), interpolation="nearest" if panel.shape[0] < 300 else "antialiased")
