"""Rows of images with texts around them."""

import numpy as np
import pytest
from figure_models import rows_of, titles
from matplotlib.backends.backend_agg import FigureCanvasAgg

from dmjd.figures.panels import Panel, draw_panels


def drawn(figure) -> np.ndarray:
    """The pixels of a figure: [H, W, 3] in 0..1."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3] / 255


@pytest.mark.parametrize("shape", [(8, 8), (40, 10), (4, 16)])
def test_images_keep_their_shape_and_order_and_do_not_overlap(shape):
    rows = [[Panel(np.full((*shape, 3), (3 * r + c) / 8)) for c in range(3)] for r in range(2)]
    figure = draw_panels(["a", "b", "c"], rows, (1.0, 1.5), labels=["one", "two"], note="a note", footer=0.5)
    values = [[panel.image[0, 0, 0] * 8 for panel in row] for row in rows_of(figure)]
    assert values == [[0, 1, 2], [3, 4, 5]]
    pixels, dpi = drawn(figure), figure.dpi
    for image in figure.axes[0].images:
        left, right, bottom, top = (value * dpi for value in image.get_extent())
        assert (bottom - top) / (right - left) == pytest.approx(shape[0] / shape[1])
        inner = pixels[int(top) + 2 : int(bottom) - 1, int(left) + 2 : int(right) - 1]
        assert np.abs(inner - image.get_array()[0, 0, 0]).max() < 0.01
    assert (pixels[-int(0.5 * dpi) :] == 1).all()  # the footer is empty


@pytest.mark.parametrize("size", [(1.9, 1.9), (0.5, 2.0)])
def test_texts_do_not_touch_each_other_or_the_images(size):
    rows = [[Panel(np.zeros((8, 8, 3)), f"0.999  Nummer {c}") for c in range(3)] for _ in range(2)]
    names = ["principal components\nof the tokens", "reconstruction\nof masked tokens", "image"]
    figure = draw_panels(names, rows, size, labels=["view 1", "view 2"], note="a long note " * 30)
    assert titles(figure) == names
    drawn(figure)
    axes = figure.axes[0]
    places = [artist.get_window_extent() for artist in (*axes.texts, *axes.images, figure.texts[0])]
    for i, first in enumerate(places):
        assert figure.bbox.padded(1).fully_containsx(first.x0)
        assert figure.bbox.fully_containsx(first.x1)
        assert figure.bbox.fully_containsy(first.y0)
        assert figure.bbox.fully_containsy(first.y1)
        assert not any(first.fully_overlaps(second) for second in places[i + 1 :])
