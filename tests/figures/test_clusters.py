"""Clusters of a set of images."""

import numpy as np
import pytest
from figure_models import rows_of, small_encoder
from PIL import Image

from dmjd.data.sources.registry import open_source
from dmjd.figures.clusters import clusters_figure, default_clusters, find_clusters
from dmjd.figures.show import show


@pytest.fixture(scope="module")
def colors(tmp_path_factory):
    """12 red, 8 green and 4 blue images, in class folders."""
    root, rng = tmp_path_factory.mktemp("colors"), np.random.default_rng(0)
    for name, channel, count in (("red", 0, 12), ("green", 1, 8), ("blue", 2, 4)):
        for i in range(count):
            image = rng.integers(0, 30, (40, 40, 3), dtype=np.uint8)
            image[..., channel] = 220 + i
            (root / name).mkdir(exist_ok=True)
            Image.fromarray(image).save(root / name / f"{i:02d}.png")
    return root


def test_clusters_are_the_colors_the_largest_first(colors):
    figure = clusters_figure(small_encoder(), open_source(colors, labels="folder"), num_clusters=3, num_images=6)
    rows = rows_of(figure)
    assert [row[0].caption for row in rows] == ["12 (50 %)\n100 % red", "8 (33 %)\n100 % green", "4 (17 %)\n100 % blue"]
    assert [sum(panel.image.shape[0] > 1 for panel in row) for row in rows] == [6, 6, 4]
    unlabeled = clusters_figure(small_encoder(), open_source(colors), num_clusters=3)
    assert rows_of(unlabeled)[0][0].caption == "12 (50 %)"


def test_many_images_are_clustered_by_mini_batches(monkeypatch):
    monkeypatch.setattr("dmjd.figures.clusters._MANY", 50)
    rng = np.random.default_rng(0)
    x = np.concatenate([np.eye(4)[i] + 0.05 * rng.normal(size=(n, 4)) for i, n in enumerate((10, 40, 30, 20))])
    cluster, distance = find_clusters(x, 4, seed=3)
    assert [len(set(cluster[part])) for part in (slice(0, 10), slice(10, 50), slice(50, 80), slice(80, 100))] == [1] * 4
    assert np.bincount(cluster).tolist() == [40, 30, 20, 10]
    assert (distance < 0.5).all()


@pytest.mark.parametrize(("num_images", "count"), [(2, 2), (8, 2), (24, 3), (200, 10), (10**6, 12)])
def test_the_default_number_follows_the_number_of_images(num_images, count):
    assert default_clusters(num_images) == count


def test_more_clusters_than_images(colors, tmp_path):
    with pytest.raises(ValueError, match="num_clusters must be at most the number of images, 24, got 25"):
        clusters_figure(small_encoder(), open_source(colors), num_clusters=25)
    with pytest.raises(ValueError, match="num_clusters must be at least 1, got 0"):
        show("clusters", tmp_path, num_clusters=0, out=tmp_path / "a.png")
