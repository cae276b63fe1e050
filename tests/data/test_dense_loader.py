"""Augmented batches of images with masks or boxes, and whole images in order."""

from pathlib import Path

import numpy as np
import torch
from dense_sets import make_scene, open_resolved
from PIL import Image

from dmjd.data.dense_loader import BoxAugment, ExampleLoader, MaskAugment, read_examples
from dmjd.data.sources.coco import Instances

GRAY = (128.0, 128.0, 128.0)


def mask_loader(root: Path, workers: int = 0) -> ExampleLoader:
    augment = MaskAugment((32, 40), (24, 32), GRAY)
    return ExampleLoader(open_resolved(root)[0], augment, batch_size=3, seed=1, num_workers=workers)


def test_batches_depend_on_the_step_only_for_any_number_of_workers(camvid_layout):
    streams = [
        mask_loader(camvid_layout).batches(),
        mask_loader(camvid_layout, 2).batches(),
        mask_loader(camvid_layout).batches(2),
    ]
    one, two = ([next(stream) for _ in range(4)] for stream in streams[:2])
    later = [next(streams[2]) for _ in range(2)]
    for stream in streams:
        stream.close()
    for a, b in zip([*one, *one[2:]], [*two, *later], strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.targets, b.targets)
    assert one[0].images.shape == (3, 3, 32, 40)
    assert one[0].targets.dtype == torch.int16
    assert not torch.equal(one[0].images, one[1].images)


def test_an_unreadable_image_is_replaced_and_named_once(camvid_layout):
    (camvid_layout / "train" / "images" / "01.png").write_bytes(b"no image")
    warnings: list[str] = []
    augment = MaskAugment((32, 40), (24, 32), GRAY)
    loader = ExampleLoader(
        open_resolved(camvid_layout)[0], augment, batch_size=5, seed=1, num_workers=0, warn=warnings.append
    )
    stream = loader.batches()
    shown = [next(stream).images for _ in range(3)]
    assert [len(images) for images in shown] == [5, 5, 5]
    assert len(warnings) == 1
    assert "01.png" in warnings[0]


def test_objects_outside_the_canvas_and_crowds_are_dropped():
    rng = np.random.default_rng(0)
    image, _, objects = make_scene(rng)
    boxes = torch.tensor([[x, y, x + w, y + h] for _, (x, y, w, h) in objects], dtype=torch.float32)
    target = Instances(boxes, torch.tensor([0, 1]), torch.tensor([False, True]))
    augment = BoxAugment((32, 32), (96, 128), GRAY, (0.9, 1.1))  # a canvas far smaller than the image
    seen = [augment(image, target, key) for key in range(30)]
    assert {len(one.boxes) for _, one in seen} == {0, 1}
    for crop, one in seen:
        assert crop.shape == (3, 32, 32)
        assert (one.labels == 0).all()
        assert ((one.boxes[:, 2:] - one.boxes[:, :2]) >= 1).all()


def test_a_mask_of_another_size_counts_as_unreadable(camvid_layout):
    Image.fromarray(np.ones((5, 6), np.uint8)).save(camvid_layout / "train" / "masks" / "02.png")
    train = open_resolved(camvid_layout)[0]
    unreadable: list = []
    read = [e.index for batch in read_examples(train, batch_size=2, unreadable=unreadable) for e in batch]
    assert read == [0, 1, 3, 4]
    assert len(unreadable) == 1
    assert "48 x 64 pixels, its mask 5 x 6" in unreadable[0][1]
