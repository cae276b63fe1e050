"""Tiny encoders and models for figures, and access to the content of a figure."""

from dataclasses import dataclass

import numpy as np
import torch

from dmjd.branches import Distillation, Reconstruction
from dmjd.encoders.registry import create_encoder
from dmjd.images.preprocess import Preprocess
from dmjd.masking import DisjointMasks
from dmjd.model import MaskedImageModel


def model_for(patch=8, size=(32, 32), chans=3, mim="hog", vis="hog", **masks) -> MaskedImageModel:
    torch.manual_seed(0)
    encoder = create_encoder(f"vit_tiny_patch{patch}", size, chans, embed_dim=32, depth=1, num_heads=2)
    encoder.preprocess = Preprocess(size, chans, (0.5,) * chans, (0.25,) * chans)
    return MaskedImageModel(
        encoder,
        DisjointMasks(**masks),
        mim and Reconstruction(mim, decoder_dim=32, decoder_depth=1, decoder_heads=2),
        vis and Distillation(vis, projector_dim=32),
    )


def images_of(size=(32, 32), chans=3, count=2) -> torch.Tensor:
    return torch.randint(0, 256, (count, chans, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Shown:
    """A panel as it is drawn: the image, the text below it, and the color of its border."""

    image: np.ndarray
    caption: str
    border: tuple[float, ...] | None


def rows_of(figure) -> list[list[Shown]]:
    """The panels of a figure, found by their places."""
    axes, rows = figure.axes[0], {}
    for image in axes.images:
        left, right, bottom, top = image.get_extent()
        below = [t.get_text() for t in axes.texts if left < t.get_position()[0] < right and t.get_va() == "top"
                 and 0 < t.get_position()[1] - bottom < 0.1]  # fmt: skip
        borders = [p.get_edgecolor() for p in axes.patches if np.allclose(p.get_xy(), (left, top))]
        shown = Shown(np.asarray(image.get_array()), " ".join(below), borders[0] if borders else None)
        rows.setdefault(round(top, 3), {})[left] = shown
    return [[row[left] for left in sorted(row)] for _, row in sorted(rows.items())]


def titles(figure) -> list[str]:
    """Texts above all panels, from left to right."""
    top = min(image.get_extent()[3] for image in figure.axes[0].images)
    texts = [t for t in figure.axes[0].texts if t.get_position()[1] < top]
    return [t.get_text() for t in sorted(texts, key=lambda t: t.get_position()[0])]


def row_labels(figure) -> list[str]:
    """Upright texts, from top to bottom."""
    texts = [t for t in figure.axes[0].texts if t.get_rotation() == 90]
    return [t.get_text() for t in sorted(texts, key=lambda t: t.get_position()[1])]


def panels(figure) -> dict[str, list[np.ndarray]]:
    """Title of each column -> the images of its panels."""
    columns = zip(*rows_of(figure), strict=True)
    return {title: [p.image for p in column] for title, column in zip(titles(figure), columns, strict=True)}


def words(figure) -> str:
    return figure.get_supxlabel() + " ".join(titles(figure))


def small_encoder(name="vit_tiny_patch8", size=(32, 48), chans=3, heads=2, **options):
    torch.manual_seed(0)
    sizes = (
        {"embed_dims": (8, 8, 16), "depths": (1, 1, 2)} if name.startswith("conv") else {"embed_dim": 16, "depth": 2}
    )
    encoder = create_encoder(name, size, chans, num_heads=heads, **sizes, **options).eval()
    encoder.preprocess = Preprocess(size, chans, (0.5,) * chans, (0.25,) * chans)
    return encoder
