"""Nearest neighbors in feature space."""

import shutil

import numpy as np
import pytest
import torch
from figure_models import rows_of, small_encoder, titles
from matplotlib.colors import to_rgba

from dmjd.data.sources.registry import open_source
from dmjd.figures.neighbors import NUM_NEIGHBORS, OTHER, SAME, nearest, neighbors_figure


def test_a_query_is_not_its_own_neighbor():
    features = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [-1.0, -0.5]])
    cosines, rows = nearest(features, torch.tensor([0, 2]), 3)
    assert rows.tolist() == [[1, 2, 3], [1, 0, 3]]
    torch.testing.assert_close(cosines[0], torch.tensor([20 / 401**0.5, 0.0, -2 / 5**0.5]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("labels", ["folder", "none"])
def test_the_copy_of_an_image_is_its_nearest_neighbor(labels, image_folder, tmp_path):
    for folder in image_folder.iterdir():
        (tmp_path / folder.name).mkdir()
        for path in folder.iterdir():
            shutil.copy(path, tmp_path / folder.name / path.name)
            shutil.copy(path, tmp_path / folder.name / f"{path.stem}-copy.png")
    (tmp_path / "cats" / "broken.png").write_text("no image")
    figure = neighbors_figure(small_encoder(), open_source(tmp_path, labels=labels), num_images=3)
    assert titles(figure) == ["query", *(f"neighbor {i + 1}" for i in range(NUM_NEIGHBORS))]
    assert [len(row) for row in rows_of(figure)] == 3 * [1 + NUM_NEIGHBORS]
    for query, first, *others in rows_of(figure):
        np.testing.assert_array_equal(first.image, query.image)
        assert first.caption.startswith("1.000")
        assert query.border is None
        assert first.border == (to_rgba(SAME) if labels == "folder" else None)
        assert query.caption in (("cats", "dogs") if labels == "folder" else ("",))
        for panel in others if labels == "folder" else ():
            same = panel.caption.split()[1] == query.caption
            assert panel.border == to_rgba(SAME if same else OTHER)


def test_neighbors_of_a_part_of_the_set(image_folder, tmp_path):
    source = open_source(image_folder)
    figure = neighbors_figure(small_encoder(), source, num_images=9, num_candidates=4)
    assert [len(row) for row in rows_of(figure)] == 4 * [
        4
    ]  # each of four images is a query, and the others are its neighbors
    assert "of 4 images" in figure.get_supxlabel()
    shutil.copy(source.stored(0), tmp_path / "one.png")
    with pytest.raises(ValueError, match="fewer than two"):
        neighbors_figure(small_encoder(), open_source(tmp_path))
