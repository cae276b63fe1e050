"""Image grids and figure files."""

import pytest
import torch
from figure_models import panels, row_labels
from matplotlib import rc_context
from PIL import Image

from dmjd.figures.grid import image_grid, save_figure


def test_a_grid_has_titles_labels_and_a_note():
    columns = {title: [torch.full((4, 6, 3), value) for value in (0.0, 1.0, 0.5)] for title in ("a", "b")}
    figure = image_grid(columns, ["one", "two", "three"], "a note")
    assert {title: [image.max() for image in images] for title, images in panels(figure).items()} == {
        "a": [0.0, 1.0, 0.5],
        "b": [0.0, 1.0, 0.5],
    }
    assert row_labels(figure) == ["one", "two", "three"]
    assert figure.get_supxlabel() == "a note"


def test_figures_are_saved_in_the_format_of_their_ending(tmp_path):
    figure = image_grid({"a": [torch.zeros(4, 4, 3)], "b": [torch.ones(4, 4, 3)]}, [""])
    with Image.open(save_figure(figure, tmp_path / "new folder" / "ä.png")) as png:
        assert png.format == "PNG"
    with Image.open(save_figure(figure, tmp_path / "a.jpg")) as jpeg:
        assert jpeg.format == "JPEG"
    with pytest.raises(ValueError, match=r"end it in \.png"):
        save_figure(figure, tmp_path / "a.xyz")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="could not write"):
        save_figure(figure, tmp_path / "file" / "a.png")
    assert {p.name for p in tmp_path.iterdir()} == {"new folder", "a.jpg", "file"}
    with pytest.raises(ValueError, match="out must not be empty"):
        save_figure(figure, "")
    with pytest.raises(ValueError, match=r"end it in \.png"):
        save_figure(figure, tmp_path / "a.pgf")  # needs LaTeX


@pytest.mark.parametrize("shape", [(1000, 2), (2, 1000), (8, 8)])
def test_figures_of_many_rows_and_of_long_images_can_be_drawn(shape):
    figure = image_grid({"a": [torch.zeros(*shape, 3)] * 200, "b": [torch.zeros(*shape, 3)] * 200}, [""] * 200)
    assert max(figure.get_size_inches()) * figure.dpi < 2**16
    assert min(figure.get_size_inches()) * figure.dpi > 10


def test_settings_of_the_user_do_not_break_figures(tmp_path):
    """LaTeX, if it is installed at all, would read names as code."""
    with rc_context({"text.usetex": True}):
        figure = image_grid({"a_$x": [torch.zeros(4, 4, 3)], "b": [torch.ones(4, 4, 3)]}, ["猫_"])
        save_figure(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()
