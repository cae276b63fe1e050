"""Groups of near duplicates in a set of images."""

import torch
from matplotlib.figure import Figure
from torch import Tensor

from dmjd.config.fields import NEAR_DUPLICATE
from dmjd.data.sources.base import Source
from dmjd.encoders.base import Encoder
from dmjd.figures.grid import panel_grid
from dmjd.figures.panels import BLANK, Panel
from dmjd.figures.set_features import amount, image_name, set_features, set_images
from dmjd.similarity import centered, near_duplicates, nearest_neighbors

MOST = 7  # near duplicates drawn of a group

Group = tuple[int, list[tuple[int, float]]]  # row of the first image; rows of its near duplicates with their cosines


def duplicates_figure(
    encoder: Encoder,
    source: Source,
    *,
    num_images: int = 4,
    num_candidates: int = 20_000,
    threshold: float = NEAR_DUPLICATE,
) -> Figure:
    """Draw the largest groups of near duplicates: the first image of a group, then those that are similar to it.

    Without any, the most similar pairs are drawn, which tell whether a lower threshold would find some.

    Args:
        encoder: an encoder with ``preprocess``; it is not changed.
        source: the images.
        num_images: number of groups.
        num_candidates: number of images to compare, evenly spaced over the set.
        threshold: smallest centered cosine of near duplicates; see :func:`~dmjd.similarity.near_duplicates`.

    Raises:
        ValueError: if fewer than two images can be read.
    """
    features, index = set_features(encoder, source, num_candidates)
    device = next(encoder.parameters()).device
    first = near_duplicates(features, threshold, device)
    groups = _groups(features, first)
    found = f"{int((first >= 0).sum()):,} of {amount(source, len(index))} are near duplicates of an earlier one"
    note = f"{found}, in {len(groups)} groups: cosine (the numbers) of at least {threshold:g}, less the mean feature."
    titles = [f"duplicate {i + 1}" for i in range(MOST)]
    if not groups:
        titles = ["most similar"]
        groups = _closest(*nearest_neighbors(features, 1, device))
        note = (
            f"No near duplicates in {amount(source, len(index))} (cosine {threshold:g}). These pairs are most similar."
        )
    groups = sorted(groups, key=lambda group: -len(group[1]))[:num_images]
    width = max(min(MOST, len(others)) for _, others in groups)
    rows = []
    for row, others in groups:
        shown = others[:width]
        images = set_images(encoder, source, index[[row, *(other for other, _ in shown)]])
        more = f"{len(others)} duplicates of\n" if len(others) > width else ""
        captions = [more, *(f"{cosine:.3f}  " for _, cosine in shown)]
        panels = [Panel(x, text + image_name(source, i)) for (x, i), text in zip(images, captions, strict=True)]
        rows.append(panels + [BLANK] * (width + 1 - len(panels)))
    return panel_grid(["first", *titles[:width]], rows, note=note)


def _groups(features: Tensor, first: Tensor) -> list[Group]:
    """Groups of near duplicates, in the order of the set; the most similar ones of a group come first.

    Args:
        features: [n, D].
        first: [n], from :func:`~dmjd.similarity.near_duplicates`.
    """
    rows = (first >= 0).nonzero().flatten()
    unit = centered(features)
    cosines = (unit[rows] * unit[first[rows]]).sum(dim=1)
    groups: dict[int, list[tuple[int, float]]] = {}
    for row, own, cosine in zip(rows.tolist(), first[rows].tolist(), cosines.tolist(), strict=True):
        groups.setdefault(own, []).append((row, cosine))
    return [(own, sorted(groups[own], key=lambda other: -other[1])) for own in sorted(groups)]


def _closest(cosines: Tensor, rows: Tensor) -> list[Group]:
    """Pairs of an image and its nearest neighbor, the most similar first; each pair once. Arguments: [n, 1]."""
    pairs: dict[frozenset[int], Group] = {}
    for row in torch.argsort(cosines.flatten(), descending=True).tolist():
        other = int(rows[row, 0])
        pairs.setdefault(frozenset((row, other)), (min(row, other), [(max(row, other), float(cosines[row, 0]))]))
    return list(pairs.values())
