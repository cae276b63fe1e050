"""The confusion matrix."""

import warnings

import pytest
import torch
from hostile_names import NAMES
from PIL import Image

from dmjd.figures.confusion import MANY_CLASSES, save_confusion_figure


@pytest.mark.parametrize("count", [3, MANY_CLASSES + 1])
def test_figures_of_few_and_many_classes(count, tmp_path):
    truths = torch.arange(count).repeat(2)
    save_confusion_figure(truths, truths.flip(0), [f"class {i}" for i in range(count)], tmp_path / "confusion.png")
    with Image.open(tmp_path / "confusion.png") as figure:
        assert min(figure.size) > 200


def test_any_name_of_a_class_can_be_drawn(tmp_path):
    truths = torch.arange(len(NAMES[:MANY_CLASSES]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_confusion_figure(truths, truths, NAMES[:MANY_CLASSES], tmp_path / "confusion.png")
        save_confusion_figure(truths[:7], truths[:7], NAMES[-7:], tmp_path / "others.svg")
    assert (tmp_path / "confusion.png").stat().st_size > 10_000
    assert (tmp_path / "others.svg").stat().st_size > 10_000
