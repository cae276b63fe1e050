"""The images of a set that are least like the others."""

from matplotlib.figure import Figure

from dmjd.data.sources.base import Source
from dmjd.encoders.base import Encoder
from dmjd.figures.grid import panel_grid
from dmjd.figures.panels import BLANK, Panel
from dmjd.figures.set_features import amount, class_name, image_name, set_features, set_images
from dmjd.similarity import nearest_neighbors

NUM_NEIGHBORS = 5  # so that a few copies of an outlier do not hide it

COLUMNS = 8


def outliers_figure(
    encoder: Encoder,
    source: Source,
    *,
    num_images: int = 4,
    num_candidates: int = 20_000,
    num_neighbors: int | None = None,
) -> Figure:
    """Draw the images with the largest mean distance to their nearest neighbors, the largest first.

    Args:
        encoder: an encoder with ``preprocess``; it is not changed.
        source: the images.
        num_images: number of rows, of 8 images each.
        num_candidates: number of images to compare, evenly spaced over the set.
        num_neighbors: number of neighbors, less than the number of images; None: 5, or all others if there are fewer.

    Raises:
        ValueError: if fewer than two images can be read, or there are too few for so many neighbors.
    """
    features, index = set_features(encoder, source, num_candidates)
    if num_neighbors is None:
        num_neighbors = min(NUM_NEIGHBORS, len(index) - 1)
    cosines, _ = nearest_neighbors(features, num_neighbors, next(encoder.parameters()).device)
    distance = 1 - cosines.mean(dim=1)
    far = distance.argsort(descending=True)[: num_images * COLUMNS]
    panels = []
    for (image, i), value in zip(set_images(encoder, source, index[far]), distance[far].tolist(), strict=True):
        panels.append(Panel(image, f"{value:.2f}  {class_name(source, i)}\n{image_name(source, i)}"))
    panels += [BLANK] * (-len(panels) % COLUMNS)
    rows = [panels[start : start + COLUMNS] for start in range(0, len(panels), COLUMNS)]
    neighbors = "nearest neighbor" if num_neighbors == 1 else f"{num_neighbors} nearest neighbors"
    note = (
        f"The most distant of {amount(source, len(index))}: 1 less the mean cosine (the numbers) with the "
        f"{neighbors}, less the mean feature. The median is {float(distance.median()):.2f}."
    )
    return panel_grid([""] * COLUMNS, rows, note=note)
