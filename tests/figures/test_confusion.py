"""The confusion matrix."""

import pytest
import torch
from PIL import Image

from dmjd.figures.confusion import MANY_CLASSES, save_confusion_figure


@pytest.mark.parametrize("count", [3, MANY_CLASSES + 1])
def test_figures_of_few_and_many_classes(count, tmp_path):
    truths = torch.arange(count).repeat(2)
    save_confusion_figure(truths, truths.flip(0), [f"class {i}" for i in range(count)], tmp_path / "confusion.png")
    with Image.open(tmp_path / "confusion.png") as figure:
        assert min(figure.size) > 200
