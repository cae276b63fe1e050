"""Predictions of segmentation and detection over the images."""

import warnings

import numpy as np
import pytest
import torch
from hostile_names import NAMES
from PIL import Image

import dmjd.figures.overlays as drawing
from dmjd.data.dense_transforms import IGNORE
from dmjd.data.sources.coco import Instances
from dmjd.figures.overlays import IGNORED, OPACITY, class_colors, detection_panels, save_overlays, segmentation_panels


@pytest.mark.parametrize("chans", [1, 3, 5])
def test_segmentation_panels_show_image_ground_truth_and_prediction(chans, tmp_path):
    image = np.full((8, 10, chans), 255, np.uint8)
    truth, prediction = np.zeros((8, 10), np.int64), np.ones((8, 10), np.int64)
    truth[0] = IGNORE
    overlays = segmentation_panels([(image, truth, prediction)], ["road", "tree"])
    assert overlays.titles == ["image", "ground truth (black: no label)", "prediction"]
    plain, labeled, predicted = (panel.image for panel in overlays.rows[0])
    first, second = (1 + OPACITY * (np.array(color) - 1) for color in class_colors(2))
    assert (plain == 1).all()
    np.testing.assert_allclose(labeled[0, 0], 1 + OPACITY * (np.array(IGNORED) - 1), atol=1e-6)
    np.testing.assert_allclose(labeled[4, 4], first, atol=1e-6)
    np.testing.assert_allclose(predicted[4, 4], second, atol=1e-6)
    save_overlays(overlays, tmp_path / "new" / "a.png")
    with Image.open(tmp_path / "new" / "a.png") as figure:
        assert figure.width > figure.height


def test_detection_panels_color_masks_and_keep_boxes():
    image = np.zeros((8, 10, 3), np.float32)
    masks = torch.zeros(1, 8, 10, dtype=torch.uint8)
    masks[0, 2:4, 3:6] = 1
    box, label = torch.tensor([[3.0, 2.0, 6.0, 4.0]]), torch.tensor([1])
    truth = Instances(box, label, torch.tensor([False]), masks)
    prediction = {"boxes": box[:0], "labels": label[:0], "scores": torch.zeros(0)}
    overlays = detection_panels([(image, truth, prediction)], ["cat", "dog"])
    assert overlays.titles == ["ground truth", "prediction"]
    labeled, predicted = overlays.rows[0]
    np.testing.assert_allclose(labeled.image[3, 4], OPACITY * np.array(class_colors(2)[1]), atol=1e-6)
    assert (labeled.image.max(-1) > 0).sum() == 6
    assert predicted.image.max() == 0
    assert labeled.objects.boxes.tolist() == box.tolist()
    assert len(predicted.objects.boxes) == 0


def test_colors_differ():
    for count in (2, 20, 40):
        assert len(set(class_colors(count))) == count


def test_any_name_of_a_class_can_be_drawn(tmp_path):
    image, truth = np.zeros((8, 10, 3), np.uint8), np.zeros((8, 10), np.int64)
    overlays = segmentation_panels([(image, truth, truth)], NAMES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_overlays(overlays, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as figure:
        assert max(figure.size) < 3000  # long names do not stretch it


@pytest.mark.parametrize("size", [(2000, 2), (2, 2000)])
def test_long_and_narrow_images_can_be_drawn(size, tmp_path):
    image, truth = np.zeros((*size, 3), np.uint8), np.zeros(size, np.int64)
    save_overlays(segmentation_panels([(image, truth, truth)] * 2, ["a"]), tmp_path / "a.png")


def test_boxes_are_drawn_over_their_own_image(tmp_path, monkeypatch):
    """Two images of different shapes, each with a box in another place."""
    figures = []
    monkeypatch.setattr(drawing, "save_figure", lambda figure, file: figures.append(figure))
    none = torch.zeros(0)
    examples = []
    for shape, box in (((8, 10), [3.0, 2.0, 6.0, 4.0]), ((20, 10), [0.0, 15.0, 5.0, 20.0])):
        truth = Instances(torch.tensor([box]), torch.tensor([1]), torch.tensor([False]), None)
        empty = {"boxes": none.view(0, 4), "labels": none.long(), "scores": none}
        examples.append((np.zeros((*shape, 3), np.uint8), truth, empty))
    save_overlays(detection_panels(examples, ["cat", "dog"]), tmp_path / "a.png")
    axes = figures[0].axes[0]
    assert len(axes.patches) == 2
    for image, patch, (_, truth, _) in zip(axes.images[::2], axes.patches, examples, strict=True):
        left, right, bottom, top = image.get_extent()
        rows, columns = image.get_size()
        x, y, width, height = (*patch.get_xy(), patch.get_width(), patch.get_height())
        corners = [(x - left) / (right - left) * columns, (y - top) / (bottom - top) * rows]
        sides = [width / (right - left) * columns, height / (bottom - top) * rows]
        x0, y0, x1, y1 = truth.boxes[0].tolist()
        np.testing.assert_allclose([*corners, *sides], [x0, y0, x1 - x0, y1 - y0], atol=1e-5)
