"""Nearest neighbors in feature space."""

import shutil

import numpy as np
import pytest
import torch
from figure_models import rows_of, small_encoder, titles
from matplotlib.colors import to_rgba
from PIL import Image
from support import mistake

from dmjd.cli.main import main
from dmjd.data.sources.registry import open_source
from dmjd.encoders.stored import encoder_bytes
from dmjd.encoders.weights import ENCODER_FILE
from dmjd.figures.neighbors import NUM_NEIGHBORS, OTHER, SAME, nearest, neighbors_figure


def test_a_query_is_not_its_own_neighbor():
    features = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [-3.0, -1.1]])  # their mean is zero
    own = torch.tensor([0, 2])
    cosines, rows = nearest(features, features[own], 3, own)
    assert rows.tolist() == [[1, 2, 3], [1, 0, 3]]
    expected = torch.tensor([20 / 401**0.5, 0.0, -3 / 10.21**0.5])
    torch.testing.assert_close(cosines[0], expected, atol=1e-4, rtol=0)


def test_a_mean_far_from_zero_does_not_make_all_images_alike():
    """Pooled features are layer-normalized: without centering, any two images had a cosine of 0.999."""
    features = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    shifted = nearest(features + 1000, features[:5] + 1000, 50)
    plain = nearest(features, features[:5], 50)
    torch.testing.assert_close(shifted[0], plain[0], atol=1e-3, rtol=0)
    assert shifted[0].mean().abs() < 0.1
    assert shifted[0][:, 0].min() > 0.999  # each query is its own nearest image


def test_neighbors_of_files_that_are_not_in_the_set(image_folder, tmp_path):
    """A changed copy finds its original; captions name the file, and borders need a class that it does not have."""
    source = open_source(image_folder, labels="folder")
    with Image.open(source.stored(3)) as image:
        image.point(lambda value: min(255, value + 3)).save(tmp_path / "mine.png")
    figure = neighbors_figure(small_encoder(), source, query=[tmp_path / "mine.png", source.stored(5)])
    rows = rows_of(figure)
    assert [len(row) for row in rows] == 2 * [1 + NUM_NEIGHBORS]
    assert rows[0][0].caption == "mine.png"
    fitted = neighbors_figure(small_encoder(), source, query=[source.stored(3)])
    np.testing.assert_array_equal(rows[0][1].image, rows_of(fitted)[0][0].image)
    assert rows[1][1].caption.startswith("1.000")  # an image of the set is its own nearest
    assert all(panel.border is None for row in rows for panel in row)


def test_the_command_takes_query_files(image_folder, tmp_path, capsys):
    (tmp_path / ENCODER_FILE).write_bytes(encoder_bytes(small_encoder()))
    files = [str(path) for path in sorted(image_folder.rglob("*.png"))[:2]]
    command = ["show", "neighbors", str(tmp_path / ENCODER_FILE), "--data", str(image_folder), "--query"]
    assert main([*command, *files, "--out", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert f"there is no file {tmp_path}/none.png" in mistake(capsys, *command, tmp_path / "none.png")
    text = mistake(capsys, "show", "masks", tmp_path, "--query", *files)
    assert "query (--query) is for neighbors, not for masks" in text


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
