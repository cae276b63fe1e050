"""The images of a set in order, resized and cropped for an encoder: for evaluation and embedding."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dmjd.data.cache import try_read
from dmjd.data.sources.base import Source
from dmjd.data.train_loader import stack
from dmjd.data.unreadable import Report
from dmjd.data.workers import auto_workers_once, read_batches
from dmjd.images.preprocess import Preprocess

_FEW = 4096  # images; read faster than worker processes start


@dataclass
class EvalBatch:
    """Readable images of a set.

    Attributes:
        raw: [b, C, h, w] uint8 or float32 on the 0..255 scale.
        labels: [b] int64, or None for an unlabeled set.
        index: [b] int64, indices into the set.
        unreadable: (name, reason) of the images left out.
        resized: (h, w) -> the same images in other sizes, as ``raw``.
    """

    raw: Tensor
    labels: Tensor | None
    index: Tensor
    unreadable: list[Report]
    resized: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """How many images were read for it, unreadable ones included."""
        return len(self.index) + len(self.unreadable)


class EvalLoader:
    """Batches of a set in order, resized and center-cropped; unreadable images are left out.

    Args:
        source: the set.
        preprocess: preprocessing of the encoder.
        batch_size: the most images in a batch.
        num_workers: data loading processes; None: none for few images, else one per core, at most 8.
        indices: indices of the images to read, in this order; None: all.
        sizes: (h, w) of other sizes to give each image in, resized and cropped from the same decoded image.

    Attributes:
        unreadable: (name, reason) of the images left out so far; emptied at the start of each iteration.
    """

    def __init__(
        self,
        source: Source,
        preprocess: Preprocess,
        batch_size: int = 256,
        num_workers: int | None = None,
        indices: Sequence[int] | np.ndarray | None = None,
        sizes: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._images = _FittedImages(source, preprocess, tuple(sizes))
        self._indices = np.arange(len(source)) if indices is None else np.asarray(indices, dtype=np.int64)
        self._batch_size = batch_size
        self.num_workers = auto_workers_once(len(self._indices), _FEW) if num_workers is None else num_workers
        self.unreadable: list[Report] = []

    def __len__(self) -> int:
        """The number of images, unreadable ones included."""
        return len(self._indices)

    def __iter__(self) -> Iterator[EvalBatch]:
        self.unreadable = []
        requests = [self._indices[i : i + self._batch_size] for i in range(0, len(self), self._batch_size)]
        labels = self._images.source.labels
        for (raw, *others), index, unreadable in read_batches(self._images, requests, self.num_workers):
            self.unreadable += unreadable
            if len(index):
                own = None if labels is None else torch.from_numpy(labels[index.numpy()])
                yield EvalBatch(raw, own, index, unreadable, dict(zip(self._images.sizes, others, strict=True)))


@dataclass(frozen=True)
class _FittedImages:
    """Reads the images of a batch, given their indices, and fits them to the encoder's size and to others."""

    source: Source
    preprocess: Preprocess
    sizes: tuple[tuple[int, int], ...] = ()

    def __call__(self, indices: np.ndarray) -> tuple[list[Tensor], Tensor, list[Report]]:
        """Readable images in each size, the encoder's first; their indices, and reports of the others."""
        fits = [self.preprocess, *(dataclasses.replace(self.preprocess, img_size=size) for size in self.sizes)]
        self.source.prepare(indices.tolist())
        read = [(int(i), try_read(self.source, int(i))) for i in indices]
        readable = [(i, [one.fit(image) for one in fits]) for i, image in read if isinstance(image, np.ndarray)]
        unreadable = [report for _, report in read if not isinstance(report, np.ndarray)]
        columns = zip(*(images for _, images in readable), strict=True)
        raws = [stack(list(images)) for images in columns] if readable else [torch.empty(0) for _ in fits]
        return raws, torch.tensor([i for i, _ in readable], dtype=torch.int64), unreadable


def read_all(
    source: Source,
    preprocess: Preprocess,
    indices: Sequence[int] | np.ndarray | None = None,
    num_workers: int | None = None,
) -> EvalBatch:
    """Read all images of an :class:`EvalLoader` into one batch.

    Raises:
        ValueError: if none can be read.
    """
    loader = EvalLoader(source, preprocess, num_workers=num_workers, indices=indices)
    batches = list(loader)
    if not batches:
        name, reason = loader.unreadable[0] if loader.unreadable else (source.name, "it is empty")
        raise ValueError(f"no image of {source.name} can be read; {name}: {reason}")
    index = torch.cat([batch.index for batch in batches])
    labels = None if source.labels is None else torch.from_numpy(source.labels[index.numpy()])
    return EvalBatch(torch.cat([batch.raw for batch in batches]), labels, index, loader.unreadable)
