"""Figures: what was masked, what was to be learnt, what the model makes of it, and how training went.

Every function gives a matplotlib ``Figure`` of its own; pyplot and its global state are not used.
"""

import contextlib
import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from dmjd.attention import attention_figure
from dmjd.build import LISTING, load_model, open_data, open_pictures
from dmjd.data import EvalLoader, Source
from dmjd.devices import pick_device
from dmjd.encoders import load_encoder
from dmjd.evaluation.features import evaluating, known_preprocess
from dmjd.masking import Masks
from dmjd.model import MaskedImageModel
from dmjd.neighbours import neighbours_figure
from dmjd.painters import HEAT, hide, painter_for, picture_rgb, spread, tint
from dmjd.pictures import Preprocess
from dmjd.sheets import DPI, Columns, save_figure, sheet
from dmjd.targets import HogTarget, PixelTarget, Target
from dmjd.tokens import image_keys

MODEL_KINDS = ("masks", "targets", "reconstructions")
KINDS = (*MODEL_KINDS, "attention", "neighbours")
UNNORMALISED = "un-normalised with the true patch mean and std"

_FOR_COMPONENTS = 64  # pictures whose tokens give the principal components
_MOST_BAD = 100  # unreadable pictures passed over in search of some to show
# panel -> scalars of metrics.jsonl it draws
_CURVES = {
    "loss": ("loss", "mim", "vis"),
    "learning rate": ("lr",),
    "online kNN, top-1": ("knn_top1", "knn_random_init", "knn_raw_pixels"),
}


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
    heat = spread(times, grid, rgb).unsqueeze(-1) / K  # B, H, W, 1
    columns["times masked"] = list(1 - heat * (1 - rgb.new_tensor(HEAT)))
    union = (times > 0).float().mean().item()
    note = f"Grey: masked. Times masked: white 0, darkest {K}. Masked in at least one view: {union:.0%} of all tokens."
    return sheet(columns, [""] * B, note)


def target_figure(model: MaskedImageModel, images_0_255: Tensor, num_shown: int | None = None) -> Figure:
    """Each picture and the target of each branch that is on, for every token.

    Args:
        model: whose encoder's ``preprocess`` is set.
        images_0_255: [B, c, H, W]; principal components of features are taken from all of them.
        num_shown: how many are drawn; None = all.
    """
    shown = images_0_255[:num_shown]
    with evaluating(model):
        normalised = known_preprocess(model.encoder).normalise(images_0_255)
        truths = model.targets(normalised, images_0_255.float())
        columns: Columns = {"picture": list(picture_rgb(shown))}
        for branches, target in _targets(model):
            truth = truths[branches[0]]
            paint = painter_for(target, model.encoder, shown, truth)
            columns[_target_title(target, branches)] = list(paint(truth[: len(shown)]))
    features = [target for _, target in _targets(model) if not isinstance(target, HogTarget | PixelTarget)]
    return sheet(columns, [""] * len(shown), " ".join(_component_note(target) for target in features))


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
    with evaluating(model):
        if masks is None:
            masks = model.draw_masks(torch.arange(B, device=device) if keys is None else keys.to(device))
        K = len(masks.mask)
        normalised = known_preprocess(encoder).normalise(images_0_255)
        truths = model.targets(normalised, images_0_255.float())
        predictions = {name: x.float().unflatten(0, (K, B)) for name, x in model.predict(normalised, masks).items()}
        rgb = picture_rgb(images_0_255)
        columns: Columns = {
            "picture": _by_picture([rgb] * K),
            "visible tokens": _by_picture([hide(rgb, mask, encoder.grid) for mask in masks.mask]),
        }
        for branches, target in _targets(model):
            truth = truths[branches[0]]
            paint = painter_for(target, encoder, images_0_255, truth)
            columns[_target_title(target, branches)] = _by_picture([paint(truth)] * K)
            for branch in branches:
                ids = masks.masked if branch == "mim" else masks.visible  # K, B, M or V
                views = [paint(_placed(x, i, truth)) for x, i in zip(predictions[branch], ids, strict=True)]
                columns[_BRANCH_TITLES[branch]] = _by_picture(_mark(branch, target, views, masks, encoder.grid))
    labels = [f"view {k + 1}" if K > 1 else "" for _ in range(B) for k in range(K)]
    return sheet(columns, labels, _note(model))


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
            known = "; blue: true tokens, not predicted" if target is model.mim_target else ""
            notes.append(f"HOG: strokes lie along edges, brighter for larger whitened values{known}.")
        elif isinstance(target, PixelTarget):
            notes.append(f"Pixel patches are {UNNORMALISED}.")
        else:
            notes.append(_component_note(target))
    return " ".join(notes)


def _component_note(target: Target) -> str:
    return (
        f"{target.name}: colours are the first three principal components of the true tokens, tokens of one colour "
        "being alike; the mean token of each place is taken away first."
    )


def _by_picture(views: Sequence[Tensor]) -> list[Tensor]:
    """K times [B, H, W, 3] -> rows of a figure, the views of a picture below each other."""
    return [picture for pictures in zip(*views, strict=True) for picture in pictures]


def curves_figure(metrics: str | Path) -> Figure:
    """Training curves: the loss and its parts, the learning rate, and online kNN where there was one.

    Args:
        metrics: ``metrics.jsonl`` of a run; half a last line, as a kill leaves it, is passed over.

    Raises:
        ValueError: if there is nothing in it to draw.
    """
    lines = _read_metrics(Path(metrics))
    panels = {
        title: {name: [(line["step"], line[name]) for line in lines if name in line] for name in names}
        for title, names in _CURVES.items()
    }
    panels = {title: curves for title, curves in panels.items() if any(curves.values())}
    if not panels:
        raise ValueError(f"{metrics} holds no curves yet: give it a run's metrics.jsonl after its first logged step")
    figure = Figure(figsize=(4.2 * len(panels), 3.2), dpi=DPI, layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, points in curves.items():
            if points:
                axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2, marker="." if len(points) < 20 else "")
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def _read_metrics(file: Path) -> list[dict[str, Any]]:
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return [line for line in lines if "step" in line]


def curves_picture(metrics: str | Path, path: str | Path) -> Path:
    """:func:`curves_figure` as a file."""
    return save_figure(curves_figure(metrics), path)


def run_picture(
    model: MaskedImageModel, source: Source, path: str | Path, *, num_images: int = 6, seed: int = 0
) -> Path:
    """:func:`reconstruction_figure` of some pictures of a set as a file; the same pictures and masks for a seed."""
    return save_figure(_figure("reconstructions", model, source, num_images, seed), path)


def show(
    kind: str,
    run: str | Path,
    *,
    data: str | Path | None = None,
    labels: str | None = None,
    out: str | Path = "picture.png",
    num_images: int = 4,
    num_candidates: int = 2000,
    seed: int = 0,
) -> Path:
    """Draw what the model of a run sees, is asked for and answers, or what its encoder makes of pictures.

    Args:
        kind: "masks", "targets" or "reconstructions" of the pre-training model, on the CPU; "attention" (with principal
            components of tokens) or "neighbours" of the encoder, on a GPU where there is one.
        run: a run folder; for the encoder's kinds also an encoder file or checkpoint, together with ``data``.
        data: where the pictures come from; None = the run's own data.
        labels: neighbours: "none", "folder" or "column", where classes come from; None = as the run.
        out: file to write; its ending names the format. num_images: how many pictures, or queries.
        num_candidates: neighbours: how many pictures are searched.
        seed: of the choice of pictures and masks.

    Returns:
        The file.

    Raises:
        ValueError: for an unknown kind, a folder that is no run, or data that cannot be read.
    """
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.0)
        raise ValueError(f"cannot show '{kind}'; did you mean '{near[0]}'? There are: {', '.join(KINDS)}")
    for name, count, least in (("num_images", num_images, 1), ("num_candidates", num_candidates, 2)):
        if count < least:
            raise ValueError(f"{name} must be at least {least}, got {count}")
    if kind in MODEL_KINDS:
        model, config = load_model(run)
        listing = Path(run).expanduser() / LISTING if data is None else None
        source = open_data(config, str(data or config.data), "train", listing=listing)
        return save_figure(_figure(kind, model, source, num_images, seed), out)
    encoder = load_encoder(Path(run).expanduser(), pick_device("auto"))
    source = open_pictures(run, known_preprocess(encoder), data, labels=labels)
    if kind == "neighbours":
        drawn = neighbours_figure(encoder, source, num_images=num_images, num_candidates=num_candidates, seed=seed)
        return save_figure(drawn, out)
    raw, _ = _some_pictures(source, known_preprocess(encoder), max(num_images, _FOR_COMPONENTS), seed)
    return save_figure(attention_figure(encoder, raw.to(next(encoder.parameters()).device), num_images), out)


def _figure(kind: str, model: MaskedImageModel, source: Source, num_images: int, seed: int) -> Figure:
    """One of ``MODEL_KINDS`` on some pictures of a set."""
    count = max(num_images, _FOR_COMPONENTS) if kind == "targets" else num_images
    raw, index = _some_pictures(source, known_preprocess(model.encoder), count, seed)
    device = next(model.parameters()).device
    raw = raw.to(device)
    keys = image_keys(seed, torch.zeros_like(index), index).to(device)
    if kind == "masks":
        return mask_figure(raw, model.draw_masks(keys), model.encoder.grid)
    if kind == "targets":
        return target_figure(model, raw, num_images)
    return reconstruction_figure(model, raw, keys=keys)


def _some_pictures(source: Source, preprocess: Preprocess, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Up to ``count`` readable pictures drawn by the seed: [n, C, H, W] on the 0..255 scale and places [n] int64.

    Raises:
        ValueError: if none of the pictures tried can be read.
    """
    order = np.random.default_rng(seed).permutation(len(source))[: count + _MOST_BAD]
    loader = EvalLoader(source, preprocess, batch_size=count, num_workers=0, indices=order)
    raw, index = torch.empty(0), torch.empty(0, dtype=torch.int64)
    for batch in loader:
        raw = torch.cat([raw, batch.raw.float()]) if len(raw) else batch.raw.float()
        index = torch.cat([index, batch.index])
        if len(raw) >= count:
            return raw[:count], index[:count]
    if not len(raw):
        name, reason = loader.bad[0]
        raise ValueError(f"no picture of {source.name} can be read; {name}: {reason}")
    return raw, index
