"""``dmjd show``: figures of a run."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from dmjd.config.checks import Bounds, check_int, check_path, check_seed
from dmjd.config.evaluation import LabeledConfig
from dmjd.data.eval_loader import EvalLoader
from dmjd.data.sources.base import Source
from dmjd.encoders.base import known_preprocess
from dmjd.encoders.weights import load_encoder
from dmjd.engine.device import pick_device
from dmjd.figures.attention import attention_figure
from dmjd.figures.clusters import clusters_figure
from dmjd.figures.duplicates import duplicates_figure
from dmjd.figures.grid import figure_path, save_figure
from dmjd.figures.kinds import MODEL_KINDS, SET_KINDS, check_kind, check_settings
from dmjd.figures.neighbors import neighbors_figure
from dmjd.figures.outliers import outliers_figure
from dmjd.figures.reconstruction import mask_figure, reconstruction_figure, target_figure
from dmjd.images.preprocess import Preprocess
from dmjd.model import MaskedImageModel
from dmjd.nn.modes import own_defaults
from dmjd.rng import image_keys
from dmjd.runs.build import load_model, open_images
from dmjd.similarity import check_threshold

MAX_IMAGES = 200  # rows of a figure

NUM_IMAGES = 4

SET_FIGURES: dict[str, Callable[..., Figure]] = {
    "neighbors": neighbors_figure,
    "duplicates": duplicates_figure,
    "outliers": outliers_figure,
    "clusters": clusters_figure,
}

SEEDED = ("neighbors", "clusters")  # sets of images whose figure depends on a seed

_BOUNDS = {
    "num_images": Bounds(ge=1, most=MAX_IMAGES),
    "num_candidates": Bounds(ge=2, most=10**7),
    "num_neighbors": Bounds(ge=1, most=10**4),
    "num_clusters": Bounds(ge=1, most=MAX_IMAGES),
}

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
    split: str = "train",
    labels: str | None = None,
    out: str | Path = "figure.png",
    num_images: int | None = None,
    num_candidates: int | None = None,
    seed: int = 0,
    query: str | Path | Sequence[str | Path] = (),
    threshold: float | None = None,
    num_neighbors: int | None = None,
    num_clusters: int | None = None,
    **lists: Any,
) -> Path:
    """Draw masks, targets or predictions of a run's model, attention of its encoder, or a set of images as it sees it.

    Args:
        kind: "masks", "targets" or "reconstructions" of the pre-training model, on the CPU; "attention" (with principal
            components of tokens), "neighbors", "duplicates", "outliers" or "clusters" by the encoder, on a GPU if there
            is one.
        run: a run folder; for figures of the encoder also an encoder file or checkpoint, together with ``data``.
        data, split: the images (None: the run's own data), and their part "train", "val" or "test".
        labels: for figures of a set, the source of class labels: "none", "folder" or "column"; None: that of the run.
        out: the file; its ending gives the format.
        num_images: number of images, queries, groups of duplicates, rows of outliers (4), or images of a cluster (8).
        num_candidates: for figures of a set, number of its images to search; default 2,000 for neighbors, else 20,000.
        seed: seed of the images, masks and clusters.
        query: for neighbors, image files to find neighbors of, which may be new; none: ``num_images`` of the set.
        threshold: for duplicates, smallest centered cosine; default 0.95.
        num_neighbors, num_clusters: for outliers, how many neighbors count (up to 5); for clusters, their number.
        lists: ``label_column``, ``path_column``, ``root`` and ``max_unreadable`` of a list, as in ``open_source``;
            ``cache_dir`` and ``cache_gb`` of a remote set.

    Returns:
        The file.

    Raises:
        ValueError: if the kind is unknown, the folder is not a run, or the data cannot be read.
    """
    check_kind(kind)
    run, out, seed = check_path("run", run), figure_path(out), check_seed(seed, ge=0)
    queries = [query] if isinstance(query, str | Path) else list(query)
    settings: dict[str, Any] = {"num_images": num_images, "num_candidates": num_candidates, "threshold": threshold}
    settings |= {"num_neighbors": num_neighbors, "num_clusters": num_clusters}
    check_settings(kind, settings | {"labels": labels, "query": tuple(queries)})
    settings = _checked(settings) | ({"query": _checked_queries(queries)} if queries else {})
    given = LabeledConfig.of_images(data, split, labels, lists)
    if kind in MODEL_KINDS:
        return save_figure(_model_figure(kind, run, given, settings.get("num_images", NUM_IMAGES), seed), out)
    encoder = load_encoder(run, pick_device("auto"))
    source = open_images(run, known_preprocess(encoder), **given)
    if kind in SET_KINDS:
        settings |= {"seed": seed} if kind in SEEDED else {}
        return save_figure(SET_FIGURES[kind](encoder, source, **settings), out)
    num_images = settings.get("num_images", NUM_IMAGES)
    raw, _ = some_images(source, known_preprocess(encoder), max(num_images, _FOR_COMPONENTS), seed)
    return save_figure(attention_figure(encoder, raw.to(next(encoder.parameters()).device), num_images), out)


def _checked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The given settings, checked; the others are left to the defaults of the figure."""
    checked = {}
    for name, value in settings.items():
        if value is not None:
            check = check_threshold if name == "threshold" else lambda n, v: check_int(n, v, _BOUNDS[n])
            checked[name] = check(name, value)
    return checked


def _checked_queries(query: Sequence[str | Path]) -> list[Path]:
    """The files to find neighbors of; ValueError if there is no such file, or there are too many."""
    check_int("query", len(query), Bounds(le=MAX_IMAGES))
    files = [check_path("query", one) for one in query]
    if missing := next((file for file in files if not file.is_file()), None):
        raise ValueError(f"query (--query): there is no file {missing}")
    return files


def _model_figure(kind: str, run: Path, given: Mapping[str, Any], num_images: int, seed: int) -> Figure:
    """One of ``MODEL_KINDS`` of a run, which shows no labels, on its data or on those that are given."""
    model, _ = load_model(run)
    source = open_images(run, known_preprocess(model.encoder), **{**given, "labels": "none", "label_column": None})
    return method_figure(kind, model, source, num_images, seed)


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
