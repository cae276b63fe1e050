"""Figures of the method: masks, targets and predictions."""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from dmjd.encoders.base import known_preprocess
from dmjd.figures.grid import Columns, image_grid
from dmjd.figures.render import MASKED_OFTEN, gray_out, renderer_for, tint, to_rgb, upsample
from dmjd.masking import Masks
from dmjd.model import MaskedImageModel
from dmjd.nn.modes import evaluating
from dmjd.targets.base import Target
from dmjd.targets.hog import HogTarget
from dmjd.targets.pixel import PixelTarget
from dmjd.text import drawable

UNNORMALIZED = "un-normalized with the true mean and standard deviation of each patch"


def mask_figure(images_0_255: Tensor, masks: Masks, grid: tuple[int, int]) -> Figure:
    """Draw each image, its masked views, and how often each token is masked.

    Args:
        images_0_255: [B, c, H, W] of any data type and number of channels.
        masks: masks of these images.
        grid: (h, w) tokens.
    """
    rgb = to_rgb(images_0_255).cpu()  # B, H, W, 3
    mask = masks.mask.cpu()  # K, B, N
    K, B, N = mask.shape
    columns: Columns = {"image": list(rgb)}
    for k in range(K):
        columns[f"view {k + 1}\n{int(mask[k, 0].sum())} of {N} masked"] = list(gray_out(rgb, mask[k], grid))
    times = mask.sum(dim=0)  # B, N
    share = upsample(times, grid, rgb).unsqueeze(-1) / K  # B, H, W, 1
    columns["times masked"] = list(1 - share * (1 - rgb.new_tensor(MASKED_OFTEN)))
    union = (times > 0).float().mean().item()
    note = f"Gray: masked. Times masked: white 0, darkest {K}. Masked in at least one view: {union:.0%} of the tokens."
    return image_grid(columns, [""] * B, note)


def target_figure(model: MaskedImageModel, images_0_255: Tensor, num_shown: int | None = None) -> Figure:
    """Draw each image and the targets of all its tokens, for each active branch.

    Args:
        model: a model whose encoder has its ``preprocess``.
        images_0_255: [B, c, H, W]; principal components are computed from all of them.
        num_shown: number of images to draw; None: all.
    """
    shown = images_0_255[:num_shown]
    with evaluating(model):
        normalized = known_preprocess(model.encoder).normalize(images_0_255)
        truths = model.targets(normalized, images_0_255.float())
        columns: Columns = {"image": list(to_rgb(shown))}
        for branches, target in _targets(model):
            truth = truths[branches[0]]
            render = renderer_for(target, model.encoder, shown, truth)
            columns[_target_title(target, branches)] = list(render(truth[: len(shown)]))
    features = [target for _, target in _targets(model) if not isinstance(target, HogTarget | PixelTarget)]
    return image_grid(columns, [""] * len(shown), " ".join(_component_note(target) for target in features))


def reconstruction_figure(
    model: MaskedImageModel, images_0_255: Tensor, *, masks: Masks | None = None, keys: Tensor | None = None
) -> Figure:
    """Draw one row per view: the visible tokens, the target, and the prediction of each active branch.

    Reconstruction shows predictions of masked tokens among the true visible ones (blue for HOG); distillation shows
    predictions of visible tokens. The model is not changed.

    Args:
        model: a model whose encoder has its ``preprocess``.
        images_0_255: [B, c, H, W] on the model's device.
        masks: masks of these images; None: the model draws them for ``keys``.
        keys: [B] int64; None: 0, 1, ...
    """
    B, device, encoder = len(images_0_255), images_0_255.device, model.encoder
    with evaluating(model):
        if masks is None:
            masks = model.draw_masks(torch.arange(B, device=device) if keys is None else keys.to(device))
        K = len(masks.mask)
        normalized = known_preprocess(encoder).normalize(images_0_255)
        truths = model.targets(normalized, images_0_255.float())
        predictions = {name: x.float().unflatten(0, (K, B)) for name, x in model.predict(normalized, masks).items()}
        rgb = to_rgb(images_0_255)
        columns: Columns = {
            "image": _by_image([rgb] * K),
            "visible tokens": _by_image([gray_out(rgb, mask, encoder.grid) for mask in masks.mask]),
        }
        for branches, target in _targets(model):
            truth = truths[branches[0]]
            render = renderer_for(target, encoder, images_0_255, truth)
            columns[_target_title(target, branches)] = _by_image([render(truth)] * K)
            for branch in branches:
                ids = masks.masked if branch == "mim" else masks.visible  # K, B, M or V
                views = [render(_paste(x, i, truth)) for x, i in zip(predictions[branch], ids, strict=True)]
                columns[_BRANCH_TITLES[branch]] = _by_image(_mark(branch, target, views, masks, encoder.grid))
    labels = [f"view {k + 1}" if K > 1 else "" for _ in range(B) for k in range(K)]
    return image_grid(columns, labels, _note(model))


_BRANCH_TITLES = {"mim": "reconstruction\nof masked tokens", "vis": "distillation\nof visible tokens"}


def _paste(predictions: Tensor, ids: Tensor, truth: Tensor) -> Tensor:
    """The true tokens [B, N, C], with predictions [B, n, C] at the positions ``ids`` [B, n]."""
    return truth.scatter(1, ids.unsqueeze(-1).expand_as(predictions), predictions)


def _mark(branch: str, target: Target, views: list[Tensor], masks: Masks, grid: tuple[int, int]) -> list[Tensor]:
    """Mark the tokens that the branch did not predict."""
    if branch == "vis":
        return [gray_out(view, mask, grid) for view, mask in zip(views, masks.mask, strict=True)]
    if isinstance(target, HogTarget):  # glyphs are white, so that color is free
        return [tint(view, ~mask, grid) for view, mask in zip(views, masks.mask, strict=True)]
    return views


def _targets(model: MaskedImageModel) -> list[tuple[list[str], Target]]:
    """The model's targets, each with the branches that predict it: one entry if both share a target."""
    branches: dict[str, list[str]] = {}
    for branch, key in model.target_keys.items():
        branches.setdefault(key, []).append(branch)
    return [(names, model.target(key)) for key, names in branches.items()]


def _target_title(target: Target, branches: list[str]) -> str:
    return f"target '{drawable(target.name, 20)}'" + ("" if len(branches) == 2 else f"\nof {branches[0]}")


def _note(model: MaskedImageModel) -> str:
    """Explain how the targets are drawn."""
    notes = []
    for branches, target in _targets(model):
        if isinstance(target, HogTarget):
            blue = " Blue: true tokens, not predicted." if "mim" in branches else ""
            colors = " Behind them: the mean color of a cell." if target.color else ""
            notes.append(f"HOG: strokes lie along edges; brighter for larger whitened values.{colors}{blue}")
        elif isinstance(target, PixelTarget):
            notes.append(f"Pixel patches are {UNNORMALIZED}.")
        else:
            notes.append(_component_note(target))
    return " ".join(notes)


def _component_note(target: Target) -> str:
    return (
        f"{drawable(target.name)}: colors are the first three principal components of the true tokens; similar tokens "
        "have similar colors. The mean token of each position is subtracted first."
    )


def _by_image(views: Sequence[Tensor]) -> list[Tensor]:
    """K times [B, H, W, 3] -> rows of a figure, with the K views of an image below each other."""
    return [image for images in zip(*views, strict=True) for image in images]
