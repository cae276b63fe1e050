"""Draw docs/figures/invalid_pixels.png: a scene with invalid pixels, and what becomes of them up to the features.

python docs/figures/invalid_pixels.py
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from dmjd import create_encoder, disjoint_masks
from dmjd.images.preprocess import Preprocess

SIDE, PATCH = 224, 16
GRID = SIDE // PATCH
INVALID, MASKED, NO_LOSS = (0.93, 0.93, 0.93), (0.62, 0.62, 0.62), "#c0392b"


def noise(seed: int, cells: int) -> np.ndarray:
    """Smooth noise of about this many hills along a side, 0 to 1: [SIDE, SIDE]."""
    coarse = torch.rand(1, 1, cells, cells, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (SIDE, SIDE), mode="bicubic").clamp(0, 1)[0, 0].numpy()


def scene() -> np.ndarray:
    """A scene as a satellite may see it, floats in 0..1 with NaN: [SIDE, SIDE, 3].

    Beside its tilted edges there is nothing; a cloud was cut out.
    """
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    height = 0.6 * noise(1, 6) + 0.3 * noise(2, 13) + 0.1 * noise(3, 40)
    fields = (np.floor(9 * (x + 0.3 * y)) + np.floor(9 * (y - 0.3 * x))) % 3 / 3
    green = np.stack([0.22 + 0.25 * height, 0.34 + 0.2 * height + 0.08 * fields, 0.18 + 0.1 * fields], axis=-1)
    soil = np.stack([0.5 + 0.3 * height, 0.42 + 0.25 * height, 0.3 + 0.2 * height], axis=-1)
    image = np.where((height > 0.55)[..., None], soil, green)
    river = np.abs(y - 0.55 - 0.12 * np.sin(5 * x) - 0.05 * np.sin(13 * x)) < 0.018
    image[river] = (0.12, 0.22, 0.36)
    edge = (x + 0.3 * y < 0.22) | (x + 0.3 * y > 1.12) | (y - 0.3 * x > 0.84)
    cloud = 0.5 * noise(5, 5) + 0.5 * noise(9, 11) - 1.6 * np.hypot(x - 0.62, y - 0.28) > 0.3
    return np.where((edge | cloud)[..., None], np.nan, image).astype(np.float32)


def panel(ax: Axes, image: np.ndarray, title: str, **kwargs: object) -> None:
    """An image with its title, and lines between the tokens."""
    ax.imshow(image, extent=(0, GRID, GRID, 0), interpolation="nearest", **kwargs)
    ax.set_title(title, fontsize=10.5)
    ax.set(xticks=range(1, GRID), yticks=range(1, GRID), xticklabels=[], yticklabels=[])
    ax.tick_params(length=0)
    ax.grid(color="white", linewidth=0.4, alpha=0.6)


def cells(tokens: np.ndarray) -> np.ndarray:
    """Values of the tokens as pixels: [GRID^2] -> [SIDE, SIDE]."""
    return tokens.reshape(GRID, GRID).repeat(PATCH, 0).repeat(PATCH, 1)


def draw() -> Figure:
    """The whole figure."""
    preprocess = Preprocess((SIDE, SIDE), nodata="auto")
    encoder = create_encoder("vit_tiny_patch16", img_size=SIDE, depth=1)
    encoder.preprocess = preprocess
    image = scene()
    tokens = encoder.valid_tokens(preprocess(image))
    assert tokens is not None
    counts = tokens[0].numpy()
    masked = disjoint_masks(1, (GRID, GRID), num_views=2, mask_ratio=0.6, keys=torch.tensor([7])).mask[0, 0].numpy()
    invalid = np.isnan(image).any(axis=-1)
    shown = np.where(invalid[..., None], INVALID, image)
    view = np.where(cells(masked)[..., None], MASKED, shown)

    figure = Figure(figsize=(12, 3.5), dpi=100, layout="constrained")
    axes = figure.subplots(1, 4)
    panel(axes[0], shown, "image, NaN where invalid")
    panel(axes[1], ~invalid, f"valid pixels: {1 - invalid.mean():.0%}", cmap="gray", vmin=-0.6, vmax=1)
    panel(axes[2], view, f"a view; loss in {counts.sum()} of {counts.size} tokens")
    for token in np.flatnonzero(~counts):
        place = (token % GRID, token // GRID)
        axes[2].add_patch(Rectangle(place, 1, 1, fill=False, hatch="////", edgecolor=NO_LOSS, linewidth=0))
    marks = [
        Patch(facecolor=MASKED, label="masked"),
        Patch(fill=False, hatch="////", ec=NO_LOSS, lw=0, label="no loss"),
    ]
    axes[2].legend(handles=marks, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, frameon=False, fontsize=9)
    panel(axes[3], cells(counts / counts.sum()), "weight in the pooled feature", cmap="viridis", vmin=0)
    legend = [Patch(color="#fde725", label=f"1 / {counts.sum()}"), Patch(color="#440154", label="0")]
    axes[3].legend(handles=legend, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, frameon=False, fontsize=9)
    return figure


if __name__ == "__main__":
    draw().savefig(Path(__file__).with_suffix(".png"), pil_kwargs={"optimize": True})
