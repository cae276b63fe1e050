"""Tiny sets for segmentation and detection: dark rectangles and bright discs on noise."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dmjd.data.sources.segmentation_masks import ClassMap, SegmentationSource, open_segmentation, resolve_classes
from dmjd.encoders.registry import create_encoder
from dmjd.encoders.stored import encoder_bytes
from dmjd.encoders.weights import ENCODER_FILE
from dmjd.images.preprocess import Preprocess

SIZE = (48, 64)  # height, width of images
KINDS = ("rectangle", "disc")


Objects = list[tuple[int, list[int]]]  # kind, [left, top, width, height]


def make_scene(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, Objects]:
    """An image, its mask (0 background, 1 rectangle, 2 disc) and its two objects."""
    image = rng.integers(90, 150, (*SIZE, 3)).astype(np.uint8)
    mask = np.zeros(SIZE, np.uint8)
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    objects = []
    for kind in range(2):
        side = int(rng.integers(14, 20))
        left = int(rng.integers(0, SIZE[1] // 2 - side)) + kind * SIZE[1] // 2  # they never overlap
        top = int(rng.integers(0, SIZE[0] - side))
        center = top + (side - 1) / 2, left + (side - 1) / 2
        box = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
        disc = (rows - center[0]) ** 2 + (columns - center[1]) ** 2 <= (side / 2) ** 2
        inside = box & disc if kind else box
        image[inside] = (230, 220, 60) if kind else (20, 30, 120)
        mask[inside] = kind + 1
        objects.append((kind, [left, top, side, side]))
    return image, mask, objects


def make_segmentation_set(root: Path, counts: dict[str, int], seed: int = 0) -> Path:
    """CamVid layout: ``{part}/images/*.png`` and ``{part}/masks/*.png``; the top two rows have no label (255)."""
    rng = np.random.default_rng(seed)
    for part, count in counts.items():
        for folder in ("images", "masks"):
            (root / part / folder).mkdir(parents=True)
        for i in range(count):
            image, mask, _ = make_scene(rng)
            mask[:2] = 255
            Image.fromarray(image).save(root / part / "images" / f"{i:02d}.png")
            Image.fromarray(mask).save(root / part / "masks" / f"{i:02d}.png")
    return root


def open_resolved(
    root: Path, num_classes: int | None = None, ignored: tuple[int, ...] = (255,)
) -> tuple[SegmentationSource, SegmentationSource, ClassMap]:
    """Training and test set of a segmentation set, with their classes resolved."""
    train, test = (open_segmentation(root, split) for split in ("train", "test"))
    return train, test, resolve_classes(train, [test], num_classes, ignored)


def make_detection_set(root: Path, counts: dict[str, int], instance_masks: bool = False, seed: int = 0) -> Path:
    """``{part}/*.png`` and ``{part}.json``; instance masks are the boxes as polygons."""
    rng = np.random.default_rng(seed)
    for part, count in counts.items():
        (root / part).mkdir(parents=True)
        images, annotations = [], []
        for i in range(count):
            image, _, objects = make_scene(rng)
            Image.fromarray(image).save(root / part / f"{i:02d}.png")
            images.append({"id": i, "file_name": f"{i:02d}.png", "height": SIZE[0], "width": SIZE[1]})
            for kind, box in objects:
                x, y, w, h = box
                entry = {"id": len(annotations), "image_id": i, "category_id": 10 * (kind + 1), "bbox": box}
                entry |= {"area": w * h, "iscrowd": 0}
                if instance_masks:
                    entry["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
                annotations.append(entry)
        categories = [{"id": 10 * (k + 1), "name": name} for k, name in enumerate(KINDS)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"{part}.json").write_text(json.dumps(content))
    return root


def make_run(folder: Path, name: str = "vit_tiny_patch8", seed: int = 0, in_chans: int = 3, **options: object) -> Path:
    """A run folder that holds only an encoder for 32 x 32 pixels."""
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    if name.startswith("conv_vit"):
        sizes = {"embed_dims": (8, 16, 32), "depths": (1, 1, 1), "num_heads": 2}
    torch.manual_seed(seed)
    encoder = create_encoder(name, **{"img_size": 32, "in_chans": in_chans} | sizes | options)
    encoder.preprocess = Preprocess(encoder.img_size, in_chans, (0.5,) * in_chans, (0.25,) * in_chans)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ENCODER_FILE).write_bytes(encoder_bytes(encoder))
    return folder
