"""The images of a set that are least like the others."""

import numpy as np
import pytest
from figure_models import rows_of, small_encoder
from image_sets import smooth_images
from PIL import Image

from dmjd.data.sources.registry import open_source
from dmjd.figures.outliers import COLUMNS, outliers_figure


@pytest.fixture
def images(tmp_path):
    """19 dark images that differ a little, and a bright one."""
    rng = np.random.default_rng(0)
    for i in range(19):
        Image.fromarray((20 + rng.integers(0, 9, (3, 1, 1)) + np.zeros((3, 40, 3))).astype(np.uint8)).resize(
            (40, 40)
        ).save(tmp_path / f"{i:02d}.png")
    smooth_images(tmp_path / "other", 1)
    return tmp_path


def test_the_different_image_comes_first_and_distances_fall(images):
    figure = outliers_figure(small_encoder(), open_source(images), num_images=2, num_neighbors=3)
    panels = [panel for row in rows_of(figure) for panel in row]
    assert len(panels) == 2 * COLUMNS
    assert panels[0].caption.endswith("000.png")
    distances = [float(panel.caption.split()[0]) for panel in panels]
    assert distances == sorted(distances, reverse=True)
    assert "20 images" in figure.get_supxlabel()


def test_more_neighbors_than_images(images):
    with pytest.raises(ValueError, match="num_neighbors must be less than the number of images, 20, got 20"):
        outliers_figure(small_encoder(), open_source(images), num_neighbors=20)


@pytest.mark.parametrize(("count", "compared"), [(2, "the nearest neighbor,"), (5, "the 4 nearest neighbors,")])
def test_a_small_set_is_compared_with_all_its_other_images(count, compared, tmp_path):
    smooth_images(tmp_path, count)
    source = open_source(tmp_path)
    figure = outliers_figure(small_encoder(), source, num_images=1)
    assert compared in " ".join(figure.get_supxlabel().split())
    with pytest.raises(ValueError, match=f"num_neighbors must be less than the number of images, {count}, got 5"):
        outliers_figure(small_encoder(), source, num_neighbors=5)
