"""Neighbors, near duplicates, outliers and confusions of a sample."""

import numpy as np
import torch

from dmjd.reports.embedding_map import principal_components
from dmjd.reports.relations import clusters, find_neighbors, near_duplicates, neighbor_confusion, outliers
from dmjd.reports.sample import grouped, tiles_of


def blobs(count: int = 30, classes: int = 3) -> tuple[torch.Tensor, np.ndarray]:
    labels = np.arange(count * classes) % classes
    centers = torch.eye(classes, 8) * 10
    noise = torch.from_numpy(np.random.default_rng(0).normal(size=(len(labels), 8)).astype(np.float32))
    return centers[torch.from_numpy(labels)] + noise, labels


def test_near_duplicates_are_found():
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(40, 16)).astype(np.float32))
    x[7], x[30] = x[3] * 1.001, x[12] + 0.01
    found = find_neighbors(x)
    assert [pair[:2] for pair in near_duplicates(found)] == [(3, 7), (12, 30)]
    assert near_duplicates(found)[0][2] > 0.99


def test_the_image_that_is_like_no_other_is_an_outlier():
    x, _ = blobs()
    x[5] = 10 * torch.eye(8)[7]
    assert outliers(find_neighbors(x), 3)[0][0] == 5


def test_classes_that_are_apart_are_not_confused():
    x, labels = blobs()
    matrix = neighbor_confusion(find_neighbors(x), labels)
    assert matrix is not None
    assert matrix.accuracy == 1.0
    assert np.array_equal(matrix.percent, 100 * np.eye(3))
    assert neighbor_confusion(find_neighbors(x), labels * 0) is None
    some = np.where(np.arange(90) % 7, labels, -1)  # every seventh image has no label
    matrix = neighbor_confusion(find_neighbors(x), some)
    assert matrix is not None
    assert (matrix.accuracy, matrix.classes) == (1.0, [0, 1, 2])
    cluster = clusters(x)
    assert cluster is not None
    assert len(cluster) == 90
    assert clusters(x[:20]) is None


def test_principal_components_of_few_features():
    points, held = principal_components(torch.tensor([[0.0, 1.0], [0.0, 3.0], [0.0, 5.0]]))
    assert held == 1.0
    assert np.allclose(np.abs(points[:, 0]), [2, 0, 2])
    assert principal_components(torch.ones(3, 1))[0].shape == (3, 2)


def test_groups_beyond_the_most_are_others():
    assert grouped(["a", "a"], 3) is None
    names, groups = grouped(["b", "a", "a", "c", "d"], 3)
    assert names[-1] == "other"
    assert len(names) == 3
    assert groups[1] == groups[2] == names.index("a")
    assert grouped(["b", "a"], 2)[0] == ["a", "b"]


def test_thumbnails_of_any_shape_and_type():
    for raw in (torch.full((2, 1, 200, 50), 255.0), torch.full((2, 5, 8, 90), 255, dtype=torch.uint8)):
        tiles = tiles_of(raw, 32)
        assert tiles.shape == (2, 32, 32, 3)
        assert tiles.max() == 255
        assert tiles[0, 0, 0, 0] in (255, 128)
