"""Crops prefer the valid area, and are a function of image and key."""

import numpy as np
import torch

from dmjd.data.train_loader import Augment
from dmjd.data.transforms import crop_boxes
from dmjd.data.valid_crops import CANDIDATES, prefer_valid
from dmjd.images.invalid import valid_share
from dmjd.rng import STREAM_VALID_CROP, hash64

KEYS = torch.arange(40)


def draw(keys: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    return crop_boxes(keys, sizes, (0.1, 0.3))


def holed(rows: int) -> np.ndarray:
    image = np.full((60, 50, 2), 9.0, np.float32)
    image[:rows] = np.nan
    return image


def chosen(image: np.ndarray, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    boxes = draw(keys, torch.tensor([image.shape[:2]]).expand(len(keys), 2))
    return boxes, prefer_valid(boxes, keys, [image] * len(keys), draw)


def test_the_first_candidate_with_enough_valid_area_is_taken():
    image = holed(36)
    boxes, found = chosen(image, KEYS)
    for key, own, box in zip(KEYS, boxes, found, strict=True):
        others = draw(
            hash64(STREAM_VALID_CROP, key, torch.arange(1, CANDIDATES)), torch.tensor([[60, 50]]).expand(7, 2)
        )
        candidates = torch.cat([own[None], others])
        shares = [np.isfinite(image[int(t) : int(t + h), int(x) : int(x + w)]).mean() for t, x, h, w in candidates]
        enough = [i for i, share in enumerate(shares) if share >= 0.5]
        expected = candidates[enough[0] if enough else int(np.argmax(shares))]
        assert torch.equal(box, expected)
    share = valid_share(image, found.numpy())
    assert share.mean() > valid_share(image, boxes.numpy()).mean() + 0.2
    assert (share >= 0.5).mean() > 0.9


def test_a_box_does_not_depend_on_the_rest_of_the_batch():
    image = holed(40)
    _, together = chosen(image, KEYS)
    alone = torch.cat([chosen(image, key[None])[1] for key in KEYS])
    assert torch.equal(together, alone)


def test_valid_images_keep_their_boxes():
    boxes, found = chosen(holed(0), KEYS)
    assert found is boxes
    eight_bit = np.zeros((60, 50, 3), np.uint8)
    assert prefer_valid(boxes, KEYS, [eight_bit] * len(KEYS), draw) is boxes


def test_flips_and_sizes_stay():
    augment = Augment((8, 8), (0.1, 0.3), flip=True)
    sizes = torch.tensor([[60, 50]]).expand(len(KEYS), 2)
    boxes, flipped = augment.draw(KEYS, sizes)
    found = prefer_valid(boxes, KEYS, [holed(50)] * len(KEYS), lambda keys, sides: augment.draw(keys, sides)[0])
    assert found.shape == boxes.shape
    assert (found[:, :2] + found[:, 2:] <= sizes).all()
    assert flipped.any()
