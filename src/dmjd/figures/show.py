"""``dmjd show``: figures of a run."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from dmjd.config.checks import Bounds, check_int, check_path, check_seed, check_text
from dmjd.config.fields import LABELS
from dmjd.data.eval_loader import EvalLoader
from dmjd.data.sources.base import Source
from dmjd.encoders.base import known_preprocess
from dmjd.encoders.weights import load_encoder
from dmjd.engine.device import pick_device
from dmjd.figures.attention import attention_figure
from dmjd.figures.grid import figure_path, save_figure
from dmjd.figures.kinds import MODEL_KINDS, check_kind
from dmjd.figures.neighbors import neighbors_figure
from dmjd.figures.reconstruction import mask_figure, reconstruction_figure, target_figure
from dmjd.images.preprocess import Preprocess
from dmjd.model import MaskedImageModel
from dmjd.nn.modes import own_defaults
from dmjd.rng import image_keys
from dmjd.runs.build import LISTING, load_model, open_data, open_images

MAX_IMAGES = 200  # rows of a figure

_FOR_COMPONENTS = 64  # images used to compute principal components

_MOST_UNREADABLE = 100  # unreadable images to skip before giving up


def save_reconstruction_figure(
    model: MaskedImageModel, source: Source, path: str | Path, *, num_images: int = 6, seed: int = 0
) -> Path:
    """Write :func:`reconstruction_figure` for some images of a set; images and masks depend on the seed."""
    return save_figure(method_figure("reconstructions", model, source, num_images, seed), path)


@own_defaults()
def show(
    kind: str,
    run: str | Path,
    *,
    data: str | Path | None = None,
    labels: str | None = None,
    out: str | Path = "figure.png",
    num_images: int = 4,
    num_candidates: int = 2000,
    seed: int = 0,
    query: str | Path | Sequence[str | Path] = (),
) -> Path:
    """Draw masks, targets or predictions of a run's model, or attention or nearest neighbors of its encoder.

    Args:
        kind: "masks", "targets" or "reconstructions" of the pre-training model, on the CPU; "attention" (with principal
            components of tokens) or "neighbors" of the encoder, on a GPU if there is one.
        run: a run folder; for attention and neighbors also an encoder file or checkpoint, together with ``data``.
        data: the images; None: the run's own data.
        labels: for neighbors, the source of class labels: "none", "folder" or "column"; None: that of the run.
        out: the file; its ending gives the format.
        num_images: number of images, or of queries.
        num_candidates: for neighbors, number of images to search.
        seed: seed of the images and masks.
        query: for neighbors, one or several image files to find neighbors of, which need not be in the set; none:
            ``num_images`` of the set.

    Returns:
        The file.

    Raises:
        ValueError: if the kind is unknown, the folder is not a run, or the data cannot be read.
    """
    check_kind(kind)
    run, out, seed = check_path("run", run), figure_path(out), check_seed(seed, ge=0)
    num_images = check_int("num_images", num_images, Bounds(ge=1, most=MAX_IMAGES))
    num_candidates = check_int("num_candidates", num_candidates, Bounds(ge=2, most=10**6))
    data = None if data is None else check_text("data", data)
    labels = None if labels is None else check_text("labels", labels, LABELS)
    queries = _checked_queries(kind, [query] if isinstance(query, str | Path) else list(query))
    if kind in MODEL_KINDS:
        model, config = load_model(run)
        listing = run / LISTING if data is None else None
        source = open_data(config, str(config.data if data is None else data), "train", listing=listing)
        return save_figure(method_figure(kind, model, source, num_images, seed), out)
    encoder = load_encoder(run, pick_device("auto"))
    source = open_images(run, known_preprocess(encoder), data, labels=labels)
    if kind == "neighbors":
        settings = {"num_images": num_images, "num_candidates": num_candidates, "seed": seed}
        return save_figure(neighbors_figure(encoder, source, **settings, query=queries), out)
    raw, _ = some_images(source, known_preprocess(encoder), max(num_images, _FOR_COMPONENTS), seed)
    return save_figure(attention_figure(encoder, raw.to(next(encoder.parameters()).device), num_images), out)


def _checked_queries(kind: str, query: Sequence[str | Path]) -> list[Path]:
    """The files to find neighbors of; ValueError if there is no such file, too many, or another kind of figure."""
    if query and kind != "neighbors":
        raise ValueError(f"query (--query) is for neighbors, not for {kind}")
    check_int("query", len(query), Bounds(le=MAX_IMAGES))
    files = [check_path("query", one) for one in query]
    if missing := next((file for file in files if not file.is_file()), None):
        raise ValueError(f"query (--query): there is no file {missing}")
    return files


def method_figure(kind: str, model: MaskedImageModel, source: Source, num_images: int, seed: int) -> Figure:
    """One of ``MODEL_KINDS`` on some images of a set."""
    count = max(num_images, _FOR_COMPONENTS) if kind == "targets" else num_images
    raw, index = some_images(source, known_preprocess(model.encoder), count, seed)
    device = next(model.parameters()).device
    raw = raw.to(device)
    keys = image_keys(seed, torch.zeros_like(index), index).to(device)
    if kind == "masks":
        return mask_figure(raw, model.draw_masks(keys), model.encoder.grid)
    if kind == "targets":
        return target_figure(model, raw, num_images)
    return reconstruction_figure(model, raw, keys=keys)


def some_images(source: Source, preprocess: Preprocess, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw up to ``count`` readable images: [n, C, H, W] on the 0..255 scale and indices [n] int64.

    Raises:
        ValueError: if none of the images tried is readable.
    """
    order = np.random.default_rng(seed).permutation(len(source))[: count + _MOST_UNREADABLE]
    loader = EvalLoader(source, preprocess, batch_size=count, num_workers=0, indices=order)
    raw, index = torch.empty(0), torch.empty(0, dtype=torch.int64)
    for batch in loader:
        raw = torch.cat([raw, batch.raw.float()]) if len(raw) else batch.raw.float()
        index = torch.cat([index, batch.index])
        if len(raw) >= count:
            return raw[:count], index[:count]
    if not len(raw):
        name, reason = loader.unreadable[0]
        raise ValueError(f"no image of {source.name} can be read; {name}: {reason}")
    return raw, index
