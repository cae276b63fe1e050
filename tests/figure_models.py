"""Tiny encoders and models for figures, and access to the content of a figure."""

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


def panels(figure) -> dict[str, list[np.ndarray]]:
    """Title of each column -> the images of its panels."""
    axes = figure.axes
    columns = axes[0].get_gridspec().ncols
    return {
        axes[c].get_title(): [np.asarray(a.images[0].get_array()) for a in axes[c::columns]] for c in range(columns)
    }


def words(figure) -> str:
    return figure.get_supxlabel() + " ".join(axes.get_title() for axes in figure.axes)


def small_encoder(name="vit_tiny_patch8", size=(32, 48), chans=3, heads=2, **options):
    torch.manual_seed(0)
    sizes = (
        {"embed_dims": (8, 8, 16), "depths": (1, 1, 2)} if name.startswith("conv") else {"embed_dim": 16, "depth": 2}
    )
    encoder = create_encoder(name, size, chans, num_heads=heads, **sizes, **options).eval()
    encoder.preprocess = Preprocess(size, chans, (0.5,) * chans, (0.25,) * chans)
    return encoder


def titles(figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes if axes.get_title()]
