"""A sample of a run's images: their features and thumbnails.

Shapes: n images of the sample, D width of a feature.
"""

import base64
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dmjd.data.eval_loader import EvalLoader, read_all
from dmjd.data.sources.base import Source
from dmjd.encoders.base import Encoder, known_preprocess
from dmjd.engine.console import tracked
from dmjd.figures.render import to_rgb
from dmjd.images.preprocess import Preprocess
from dmjd.nn.modes import evaluating
from dmjd.reports.clock import Clock

TILE = 64  # pixels, side of a thumbnail in the sprite

_ACROSS = 32  # thumbnails in a row of the sprite

MOST_TILES = 1500  # of a sprite: about 3 MB

_BATCH = 64

MOST_FOLDERS = 12

OTHER = "other"  # the group of all that have no color of their own

JPEG_QUALITY = 80


@dataclass
class Sample:
    """Images drawn at random from a set.

    Attributes:
        source: the set.
        preprocess: that of the encoder.
        features: [n, D] float32, pooled.
        index: [n] int64, indices in the set.
        tiles: [m, TILE, TILE, 3] uint8, thumbnails of the first m images.
        unreadable: (name, reason) of the images that could not be read.
    """

    source: Source
    preprocess: Preprocess
    features: Tensor
    index: Tensor
    tiles: np.ndarray
    unreadable: list[tuple[str, str]]

    @property
    def labels(self) -> np.ndarray | None:
        """[n] int64 indices into the classes; None without labels."""
        return None if self.source.labels is None else self.source.labels[self.index.numpy()]

    @cached_property
    def names(self) -> list[str]:
        """[n] names of the images, without the folders that all have in common."""
        names = [self.source.describe(i) for i in self.index.tolist()]
        root = _common_folder(names)
        return [name.removeprefix(root) for name in names]

    def folders(self) -> tuple[list[str], np.ndarray] | None:
        """Names of the folders that the images come from, and each image's [n]; None if there is one or no folder."""
        return grouped([name.rpartition("/")[0].partition("/")[0] or "." for name in self.names], MOST_FOLDERS)


def grouped(values: Sequence[str], most: int) -> tuple[list[str], np.ndarray] | None:
    """The most frequent values, the rest as :data:`OTHER`, and each entry's group [n]; None if all are the same."""
    counts = Counter(values)
    if len(counts) < 2:
        return None
    kept = [value for value, _ in counts.most_common(most if len(counts) <= most else most - 1)]
    kept = sorted(kept)
    numbers = {value: number for number, value in enumerate(kept)}
    groups = np.array([numbers.get(value, len(kept)) for value in values], dtype=np.int64)
    return ([*kept, OTHER] if len(counts) > len(kept) else kept), groups


def _common_folder(names: Sequence[str]) -> str:
    """The longest beginning that ends in a slash and that all paths have; empty for names that are no paths."""
    if not names or not all(name.startswith("/") for name in names):
        return ""
    first, last = min(names), max(names)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[: first.rfind("/", 0, same) + 1]


def draw_sample(
    encoder: Encoder, source: Source, count: int, clock: Clock, *, num_tiles: int = MOST_TILES, seed: int = 0
) -> Sample:
    """Encode images in random order until there are ``count``, or the time is over; at least one batch.

    Raises:
        ValueError: if no image can be read.
    """
    order = np.random.default_rng(seed).permutation(len(source))[:count]
    preprocess, device = known_preprocess(encoder), next(encoder.parameters()).device
    features: list[Tensor] = []
    index: list[Tensor] = []
    tiles: list[np.ndarray] = []
    num = 0
    with evaluating(encoder):
        workers = 0 if clock.limited else None
        loader = EvalLoader(source, preprocess, batch_size=_BATCH, num_workers=workers, indices=order)
        for batch in tracked(loader, "report: features", len(loader), lambda batch: batch.size):
            features.append(encoder.encode(preprocess.normalize(batch.raw.to(device))).float().cpu())
            index.append(batch.index)
            if num < num_tiles:
                tiles.append(tiles_of(batch.raw[: num_tiles - num]))
            num += len(batch.index)
            if clock.left <= 0:
                break
    if not num:
        name, reason = loader.unreadable[0]
        raise ValueError(f"no image of {source.name} can be read; {name}: {reason}")
    x = torch.cat(features)
    if not bool(x.isfinite().all()):
        raise ValueError("the features are not finite: the encoder's weights have diverged")
    return Sample(source, preprocess, x, torch.cat(index), np.concatenate(tiles), list(loader.unreadable))


def tiles_of(raw: Tensor, side: int = TILE) -> np.ndarray:
    """Images [b, C, H, W] on the 0..255 scale -> [b, side, side, 3] uint8, centered on gray."""
    rgb = to_rgb(raw).permute(0, 3, 1, 2)  # b, 3, H, W
    scale = side / max(rgb.shape[2:])
    size = [max(1, round(length * scale)) for length in rgb.shape[2:]]
    smaller = scale < 1
    rgb = F.interpolate(rgb, size=size, mode="bilinear" if smaller else "nearest", antialias=smaller)
    top, left = (side - size[0]) // 2, (side - size[1]) // 2
    canvas = rgb.new_full((len(rgb), 3, side, side), 0.5)
    canvas[:, :, top : top + size[0], left : left + size[1]] = rgb
    return (canvas * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def sprite(tiles: np.ndarray) -> tuple[str, int]:
    """Thumbnails [m, side, side, 3] as one JPEG, as a data URI, and how many stand in a row."""
    count, side = tiles.shape[:2]
    across = min(_ACROSS, count)
    rows = -(-count // across)
    sheet = np.full((rows * across, side, side, 3), 128, np.uint8)
    sheet[:count] = tiles
    whole = sheet.reshape(rows, across, side, side, 3).swapaxes(1, 2).reshape(rows * side, across * side, 3)
    return jpeg_uri(whole), across


def jpeg_uri(image: np.ndarray) -> str:
    """An RGB image [H, W, 3] uint8 as the data URI of a JPEG."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=JPEG_QUALITY)
    return data_uri(file.getvalue(), "image/jpeg")


def data_uri(content: bytes, kind: str) -> str:
    """The content of a file of some media type as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def thumbnails(sample: Sample, rows: Iterable[int], side: int = 96) -> dict[int, str]:
    """Row of the sample -> its image as a data URI. They are read again; those that cannot be are left out."""
    wanted = sorted(set(rows))
    index = sample.index[torch.tensor(wanted, dtype=torch.int64)]
    batch = read_all(sample.source, sample.preprocess, index.numpy(), num_workers=0)
    row_of = dict(zip(index.tolist(), wanted, strict=True))
    tiles = tiles_of(batch.raw, side)
    return {row_of[i]: jpeg_uri(tile) for i, tile in zip(batch.index.tolist(), tiles, strict=True)}
