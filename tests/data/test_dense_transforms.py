"""Geometric transforms of images, masks and boxes onto a canvas, and color jitter."""

import numpy as np
import torch
from dense_sets import SIZE
from hypothesis import given, settings
from hypothesis import strategies as st

from dmjd.data.dense_transforms import (
    IGNORE,
    GeometricTransform,
    boxes_to_image,
    cover_scale,
    fit_scale,
    jitter_colors,
    random_transform,
    scaled_size,
    transform_boxes,
    transform_image,
    transform_masks,
)

GRAY = (128.0, 128.0, 128.0)

sides = st.tuples(st.integers(3, 60), st.integers(3, 60))


@settings(max_examples=60, deadline=None)
@given(image=sides, canvas=sides, key=st.integers(-(2**63), 2**63 - 1), low=st.floats(0.3, 1.0), flip=st.booleans())
def test_masks_and_boxes_are_transformed_alike(image, canvas, key, low, flip):
    """The box around the transformed mask of a box is the transformed box, to within a pixel."""
    H, W = image
    transform = random_transform(key, image, canvas, fit_scale(image, canvas), (low, 2.0), flip)
    box = torch.tensor([[W * 0.25, H * 0.25, W * 0.75, H * 0.75]])
    inside = np.zeros(image, np.uint8)
    inside[int(H * 0.25) : int(np.ceil(H * 0.75)), int(W * 0.25) : int(np.ceil(W * 0.75))] = 1
    mask = transform_masks(inside, transform, IGNORE & 0xFF)
    moved = transform_boxes(box, transform)[0]
    assert mask.shape == canvas
    assert (moved >= 0).all()
    assert (moved <= torch.tensor([canvas[1], canvas[0], canvas[1], canvas[0]])).all()
    rows, columns = (mask == 1).nonzero(as_tuple=True)
    if len(rows):
        reach = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        pixel = max(transform.resized[0] / H, transform.resized[1] / W) + 1
        assert (reach - moved).abs().max() <= pixel


@settings(max_examples=30, deadline=None)
@given(image=sides, key=st.integers(0, 2**62))
def test_image_and_mask_cover_the_same_part_of_the_canvas(image, key):
    transform = random_transform(key, image, (40, 40), fit_scale(image, (40, 40)), (0.5, 1.5), True)
    white = np.full((*image, 3), 255, np.uint8)
    shown = transform_image(white, transform, (0.0, 0.0, 0.0))
    mask = transform_masks(np.zeros(image, np.int16), transform, IGNORE)
    assert torch.equal(shown[0] == 255, mask != IGNORE)


def test_a_small_image_lies_inside_the_canvas_and_a_large_one_fills_it():
    for key in range(40):
        small = random_transform(key, (10, 20), (32, 32), 1.0, (1.0, 1.0), False)
        assert -22 <= small.top <= 0
        assert -12 <= small.left <= 0
        large = random_transform(key, (50, 60), (32, 32), 1.0, (1.0, 1.0), False)
        assert 0 <= large.top <= 18
        assert 0 <= large.left <= 28
    tops = {random_transform(key, (34, 34), (32, 32), 1.0, (1.0, 1.0), False).top for key in range(60)}
    assert tops == {0, 1, 2}  # both ends can be drawn


def test_boxes_transform_back_to_the_image():
    transform = GeometricTransform((37, 61), scaled_size((37, 61), fit_scale((37, 61), (48, 64))), (48, 64))
    boxes = torch.tensor([[1.0, 2.0, 30.0, 36.5], [0.0, 0.0, 61.0, 37.0]])
    torch.testing.assert_close(boxes_to_image(transform_boxes(boxes, transform), transform), boxes, atol=1e-4, rtol=0)


def test_images_of_the_canvas_size_are_unchanged():
    image = np.random.default_rng(0).integers(0, 256, (*SIZE, 3)).astype(np.uint8)
    shown = transform_image(image, GeometricTransform(SIZE, SIZE, SIZE), GRAY)
    assert torch.equal(shown, torch.from_numpy(image).permute(2, 0, 1))
    flipped = transform_image(image, GeometricTransform(SIZE, SIZE, SIZE, flip=True), GRAY)
    assert torch.equal(flipped, shown.flip(-1))


def test_covering_and_fit_scale():
    assert scaled_size((100, 200), cover_scale((100, 200), (50, 50))) == (50, 100)
    assert scaled_size((100, 200), fit_scale((100, 200), (50, 50))) == (25, 50)


def test_color_jitter_depends_on_the_key_and_stays_in_range():
    image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    changed = [jitter_colors(image, key) for key in range(12)]
    assert all(torch.equal(jitter_colors(image, key), changed[key]) for key in range(12))
    assert len({tuple(c.flatten().tolist()) for c in changed}) > 6
    assert all(c.dtype == torch.uint8 for c in changed)
    floats = jitter_colors(image.float(), 3)
    assert 0 <= float(floats.min()) <= float(floats.max()) <= 255
    assert jitter_colors(image[:1], 3).shape == (1, 8, 8)
    seven = torch.rand(7, 8, 8)
    assert torch.equal(jitter_colors(seven, 3), seven)
