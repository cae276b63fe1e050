"""Tiny sets of images: files of one color, tables, and arrays that show their index."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dmjd.data.sources.base import Source
from dmjd.images.stored import UnreadableImage

MIXED = ((12, 12), (9, 15), (20, 11))  # sizes that keep a set out of memory


def save(path, value=0, size=(6, 5)) -> None:
    """A gray RGB image of (width, height) pixels as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


def png(value) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def write_table(path, values, **columns) -> None:
    """A parquet file with one gray image per value, and more columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = pa.array([{"bytes": png(v), "path": None} for v in values])
    pq.write_table(pa.table({"image": images, **{k: pa.array(v) for k, v in columns.items()}}), path, row_group_size=2)


def first_values(source) -> list[int]:
    """The first pixel of each image."""
    return [int(source.read(i)[0, 0, 0]) for i in range(len(source))]


class Arrays(Source):
    """Images that show their index: every pixel of image i is i. Those in ``unreadable`` cannot be read."""

    def __init__(self, count, unreadable=(), shapes=((12, 12),), dtype=np.uint8):
        self.name, self.classes = "arrays", []
        self.count, self.unreadable, self.shapes, self.dtype = count, unreadable, shapes, dtype

    def __len__(self):
        return self.count

    def stored(self, index):
        if index in self.unreadable:
            raise UnreadableImage(self.describe(index), "made so")
        scale = 1 if self.dtype == np.uint8 else 1 / 255
        return np.full((*self.shapes[index % len(self.shapes)], 3), index % 256 * scale, self.dtype)

    def describe(self, index):
        return f"image {index}"


def smooth_images(folder, count: int, seed: int = 0, size=(80, 60)) -> list:
    """Files of images with a few large spots of color, as PNG; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, paths = np.random.default_rng(seed), []
    for i in range(count):
        spots = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
        paths.append(folder / f"{i:03d}.png")
        spots.resize(size, Image.Resampling.BICUBIC).save(paths[-1])
    return paths


def altered_copies(path) -> list:
    """A re-encoded, a resized and a slightly cropped copy of an image, beside it; their paths."""
    image = Image.open(path)
    width, height = image.size
    copies = {
        "reencoded.jpg": image,
        "resized.png": image.resize((width * 3 // 2, height * 3 // 2)),
        "cropped.png": image.crop((2, 1, width - 1, height - 2)),
    }
    paths = [path.with_name(f"{path.stem}_{name}") for name in copies]
    for copy, target in zip(copies.values(), paths, strict=True):
        copy.save(target, quality=60)
    return paths
