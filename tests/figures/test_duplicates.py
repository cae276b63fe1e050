"""Near duplicates in a set: altered copies are found, and only they."""

import pytest
from figure_models import rows_of, small_encoder, titles
from image_sets import altered_copies, smooth_images
from support import mistake

from dmjd.cli.main import main
from dmjd.data.sources.registry import open_source
from dmjd.encoders.stored import encoder_bytes
from dmjd.encoders.weights import ENCODER_FILE
from dmjd.figures.duplicates import duplicates_figure


@pytest.fixture
def copies(tmp_path):
    """30 different images, the fourth and the eighth with altered copies."""
    paths = smooth_images(tmp_path / "images", 30)
    altered_copies(paths[3])
    altered_copies(paths[7])[0].unlink()
    return tmp_path / "images"


def test_altered_copies_are_found_and_only_they(copies):
    figure = duplicates_figure(small_encoder(), open_source(copies), threshold=0.985)
    rows = rows_of(figure)
    names = [[panel.caption.split("  ")[-1] for panel in row if panel.caption] for row in rows]
    assert [row[0] for row in names] == ["003.png", "007.png"]  # the larger group first
    assert {frozenset(row[1:]) for row in names} == {
        frozenset({"003_reencoded.jpg", "003_cropped.png", "003_resized.png"}),
        frozenset({"007_cropped.png", "007_resized.png"}),
    }
    assert titles(figure) == ["first", "duplicate 1", "duplicate 2", "duplicate 3"]
    cosines = [float(panel.caption.split("  ")[0]) for panel in rows[0][1:]]
    assert cosines == sorted(cosines, reverse=True)
    assert min(cosines) >= 0.985
    assert "5 of 35 images are near duplicates of an earlier one, in 2 groups" in figure.get_supxlabel()


def test_without_any_the_most_similar_pair_is_shown(tmp_path):
    smooth_images(tmp_path, 12)
    figure = duplicates_figure(small_encoder(), open_source(tmp_path), num_images=2, threshold=0.9999)
    rows = rows_of(figure)
    assert [len(row) for row in rows] == [2, 2]
    cosines = [float(row[1].caption.split("  ")[0]) for row in rows]
    assert 0.9999 > cosines[0] >= cosines[1]
    assert titles(figure) == ["first", "most similar"]
    assert figure.get_supxlabel().startswith("No near duplicates in 12 images")


def test_the_command_and_its_mistakes(copies, tmp_path, capsys):
    (tmp_path / ENCODER_FILE).write_bytes(encoder_bytes(small_encoder()))
    command = ["show", "duplicates", str(tmp_path / ENCODER_FILE), "--data", str(copies)]
    out = tmp_path / "a.png"
    assert main([*command, "--threshold", "0.9", "--num-images", "1", "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "threshold must" in mistake(capsys, *command, "--threshold", "1.5", "--out", out)
    error = mistake(capsys, *command, "--num-clusters", "3", "--out", out)
    assert "error: --num-clusters is for clusters, not for duplicates" in error
    one = smooth_images(tmp_path / "one", 1)[0].parent
    assert "fewer than two readable images" in mistake(capsys, *command[:3], "--data", one, "--out", out)
