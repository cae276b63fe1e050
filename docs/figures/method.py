"""Draw docs/figures/method.png: an image, its two disjoint views, the two branches and the loss.

python docs/figures/method.py
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from sklearn.datasets import load_sample_image

from dmjd import disjoint_masks, hog

SIDE, PATCH = 224, 16
GRID = SIDE // PATCH
GRAY = 190
COLORS = {"encoder": "#dfe3f5", "mim": "#fde3cf", "vis": "#d5ecd8", "loss": "#eeeeee"}


def photograph() -> np.ndarray:
    """A photograph from scikit-learn (china.jpg), [224, 224, 3] uint8."""
    image = torch.from_numpy(load_sample_image("china.jpg")[:420, 110:530].copy()).permute(2, 0, 1)[None].float()
    small = torch.nn.functional.interpolate(image, (SIDE, SIDE), mode="bicubic", antialias=True)
    return small[0].permute(1, 2, 0).clamp(0, 255).byte().numpy()


def view(image: np.ndarray, mask: torch.Tensor) -> np.ndarray:
    """The image with its masked tokens in gray."""
    covered = mask.view(GRID, GRID).numpy().repeat(PATCH, 0).repeat(PATCH, 1)
    return np.where(covered[..., None], np.uint8(GRAY), image)


def hog_image(image: np.ndarray) -> np.ndarray:
    """Magnitude of each cell's strongest orientation: [rows, columns]."""
    raw = torch.from_numpy(image).permute(2, 0, 1)[None]
    return hog(raw, PATCH // 2)[0].amax(-1).mean(0).numpy()


def show(ax: Axes, x: float, y: float, side: float, image: np.ndarray, title: str, **kwargs: object) -> None:
    """An image with its title."""
    ax.imshow(image, extent=(x, x + side, y, y + side), interpolation="nearest", zorder=2, **kwargs)
    ax.text(x + side / 2, y + side + 0.1, title, ha="center", va="bottom", fontsize=12.5)


def box(ax: Axes, x: float, y: float, width: float, height: float, text: str, color: str) -> None:
    """A rounded box with text."""
    style = "round,pad=0.02,rounding_size=0.12"
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=color, edgecolor="#555555"))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=12.5)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0) -> None:
    """An arrow, bent or straight."""
    style = f"arc3,rad={bend}"
    ax.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, color="#444444", connectionstyle=style)
    )


def draw() -> Figure:
    """The whole figure."""
    image = photograph()
    masks = disjoint_masks(1, (GRID, GRID), num_views=2, mask_ratio=0.6, keys=torch.tensor([7]))
    figure = Figure(figsize=(12.5, 4.9), dpi=130)
    ax = figure.add_axes((0, 0, 1, 1))
    show(ax, 0.0, 2.0, 2.4, image, "image")
    for k, y in enumerate((3.45, 0.35)):
        arrow(ax, (2.5, 3.2), (3.4, y + 1.2))
        show(ax, 3.5, y, 2.4, view(image, masks.mask[k, 0]), f"view {k + 1}: 60 % masked")
        arrow(ax, (6.0, y + 1.2), (6.7, 3.2 + (0.3 if k == 0 else -0.3)))
    box(ax, 6.75, 2.45, 1.6, 1.5, "encoder\nof visible\ntokens only", COLORS["encoder"])
    arrow(ax, (8.45, 3.5), (9.15, 5.0))
    arrow(ax, (8.45, 2.9), (9.15, 1.4))
    box(ax, 9.2, 4.4, 2.9, 1.3, "reconstruction\ndecoder predicts the\nmasked tokens", COLORS["mim"])
    box(ax, 9.2, 0.7, 2.9, 1.3, "distillation\nprojector predicts the\nvisible tokens", COLORS["vis"])
    show(ax, 9.55, 2.25, 1.7, hog_image(image), "", cmap="gray")
    ax.text(
        11.35, 3.1, "target:\nHOG, pixels,\nteacher or EMA\nof the whole image", ha="left", va="center", fontsize=12
    )
    arrow(ax, (10.4, 4.02), (10.4, 4.36))
    arrow(ax, (10.4, 2.18), (10.4, 2.04))
    box(ax, 13.9, 2.45, 1.7, 1.3, "loss =\nmim + θ · vis", COLORS["loss"])
    arrow(ax, (12.2, 5.0), (14.7, 3.85), -0.2)
    arrow(ax, (12.2, 1.4), (14.7, 2.38), 0.2)
    ax.set(xlim=(-0.1, 15.75), ylim=(0.2, 6.4), aspect="equal")
    ax.axis("off")
    return figure


if __name__ == "__main__":
    draw().savefig(Path(__file__).with_suffix(".png"))
