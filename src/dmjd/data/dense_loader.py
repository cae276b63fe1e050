"""Images with segmentation masks or boxes: augmented batches for training, whole images in order for evaluation."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dmjd.data.dense_transforms import (
    IGNORE,
    cover_scale,
    fit_scale,
    jitter_colors,
    random_transform,
    transform_boxes,
    transform_image,
    transform_masks,
)
from dmjd.data.sources.coco import Instances
from dmjd.data.train_loader import Stream, stack
from dmjd.data.unreadable import Report, UnreadableImages, read_or_replace
from dmjd.data.workers import auto_workers, auto_workers_once, read_batches
from dmjd.images.stored import UnreadableImage

LEAST_VISIBLE = 1.0  # pixels on the canvas; narrower objects are not trained on

_FEW = 256  # images; read faster than worker processes start


class ExampleSource(Protocol):
    """A source of images with targets."""

    name: str

    def __len__(self) -> int: ...

    def read_example(self, index: int) -> tuple[np.ndarray, Any]:
        """Image [H, W, C] on the 0..255 scale, and its target; raises UnreadableImage."""


@dataclass
class ExampleBatch:
    """A micro-batch of one size, not normalized.

    Attributes:
        images: [b, C, h, w] uint8 or float32 on the 0..255 scale.
        targets: masks [b, h, w] int16 of classes and IGNORE, or a list of b :class:`Instances`.
        keys: [b] int64, from which dropout and the sampling of proposals are drawn; None: from torch's generator.
        unreadable: (name, reason) of images that could not be read and were replaced.
    """

    images: Tensor
    targets: Any
    keys: Tensor | None = None
    unreadable: list[Report] = field(default_factory=list)

    def to(self, device: torch.device) -> "ExampleBatch":
        """Move the batch to a device."""
        targets = self.targets
        if isinstance(targets, Tensor):
            targets = targets.to(device, non_blocking=True)
        else:
            targets = [instances.to(device) for instances in targets]
        keys = None if self.keys is None else self.keys.to(device, non_blocking=True)
        return ExampleBatch(self.images.to(device, non_blocking=True), targets, keys, self.unreadable)


@dataclass(frozen=True)
class MaskAugment:
    """Random scale, crop, flip and color jitter of an image and its segmentation mask.

    Attributes:
        canvas: (h, w) of the result.
        base: (h, w) that images cover before the random scale.
        fill: value per channel, on the 0..255 scale, where the canvas shows no image.
        scale: range of the random scale.
        flip, color_jitter: whether to use them.
    """

    canvas: tuple[int, int]
    base: tuple[int, int]
    fill: tuple[float, ...]
    scale: tuple[float, float] = (0.5, 2.0)
    flip: bool = True
    color_jitter: bool = True

    def __call__(self, image: np.ndarray, target: np.ndarray, key: int) -> tuple[Tensor, Tensor]:
        """[H, W, C] and [H, W] -> [C, h, w] and [h, w]."""
        size = (image.shape[0], image.shape[1])
        transform = random_transform(key, size, self.canvas, cover_scale(size, self.base), self.scale, self.flip)
        crop = transform_image(image, transform, self.fill)
        crop = jitter_colors(crop, key) if self.color_jitter else crop
        return crop, transform_masks(target, transform, IGNORE)


@dataclass(frozen=True)
class BoxAugment:
    """Random scale, position and flip of an image and its objects. Crowds and objects outside the canvas are dropped.

    Attributes:
        canvas: (h, w) of the result.
        base: (h, w) that images fit into before the random scale.
        fill: value per channel, on the 0..255 scale, where the canvas shows no image.
        scale: range of the random scale.
        flip: whether to flip.
    """

    canvas: tuple[int, int]
    base: tuple[int, int]
    fill: tuple[float, ...]
    scale: tuple[float, float] = (0.5, 1.5)
    flip: bool = True

    def __call__(self, image: np.ndarray, target: Instances, key: int) -> tuple[Tensor, Instances]:
        """[H, W, C] and its objects -> [C, h, w] and the objects on the canvas."""
        size = (image.shape[0], image.shape[1])
        transform = random_transform(key, size, self.canvas, fit_scale(size, self.base), self.scale, self.flip)
        boxes = transform_boxes(target.boxes, transform)
        masks = transform_masks(target.masks.numpy(), transform, 0) if target.masks is not None else None
        visible = (boxes[:, 2:] - boxes[:, :2]).amin(1) >= LEAST_VISIBLE
        if masks is not None:
            visible &= masks.flatten(1).bool().any(1)
        moved = Instances(boxes, target.labels, target.crowd, masks)
        return transform_image(image, transform, self.fill), moved.keep(visible & ~target.crowd)


Augmentation = Callable[[np.ndarray, Any, int], tuple[Tensor, Any]]


class ExampleLoader:
    """Endless micro-batches, bit-identical for any number of workers and any start step.

    An unreadable image is replaced by one drawn from its key, as in pre-training.

    Args:
        source: the set.
        augment: maps an image, its target and its key to image and target on the canvas.
        batch_size, accumulate, seed, rank, world_size: see :class:`~dmjd.data.train_loader.Stream`.
        num_workers: data loading processes; None: by the number of cores.
        device: device of the batches.
        warn: called with a message for each unreadable image, once.
    """

    def __init__(
        self,
        source: ExampleSource,
        augment: Augmentation,
        *,
        batch_size: int,
        accumulate: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int | None = None,
        device: torch.device | None = None,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.stream = Stream(len(source), batch_size, accumulate, seed, rank, world_size)
        self.device = device or torch.device("cpu")
        self.num_workers = auto_workers(world_size) if num_workers is None else num_workers
        self._read = _AugmentedExamples(source, augment, self.stream)
        self._unreadable, self._warn = UnreadableImages(), warn

    def batches(self, start_step: int = 0) -> Iterator[ExampleBatch]:
        """Endless micro-batches from a step on; closing the iterator ends its workers.

        Raises:
            UnreadableImage: if a hundred images in a row cannot be read.
            ValueError: if more than 1 % of the images (and more than ten) cannot be read.
        """
        pinned = self.device.type == "cuda"
        requests = self.stream.micro_batches(start_step)
        for images, targets, keys, unreadable in read_batches(self._read, requests, self.num_workers, pinned):
            self._unreadable.add_and_warn(unreadable, self._warn)
            self._unreadable.check(None, self.stream.length, "Repair them, or remove them from the set.")
            batch = torch.stack(targets) if isinstance(targets[0], Tensor) else targets
            yield ExampleBatch(images, batch, keys, unreadable).to(self.device)


@dataclass(frozen=True)
class _AugmentedExamples:
    """Reads and augments the images and targets of a micro-batch, given its sample numbers."""

    source: ExampleSource
    augment: Augmentation
    stream: Stream

    def __call__(self, samples: range) -> tuple[Tensor, list[Any], Tensor, list[Report]]:
        """Images [b, C, h, w], b targets, keys [b] int64, and reports of replaced images."""
        indices, keys = self.stream.draw(samples)
        crops, targets, reports = [], [], []
        for index, key in zip(indices.tolist(), keys.tolist(), strict=True):
            (image, target), unreadable = read_or_replace(self.source.read_example, index, key, self.stream.length)
            crop, moved = self.augment(image, target, key)
            crops.append(crop)
            targets.append(moved)
            reports += unreadable
        return stack(crops), targets, keys, reports


@dataclass
class Example:
    """An image [H, W, C] on the 0..255 scale with its target, and its index in the set."""

    index: int
    image: np.ndarray
    target: Any


def read_examples(
    source: ExampleSource,
    *,
    batch_size: int,
    num_workers: int | None = None,
    indices: Sequence[int] | np.ndarray | None = None,
    unreadable: list[Report] | None = None,
) -> Iterator[list[Example]]:
    """Unchanged images in the order of the set, in batches; unreadable ones are left out.

    Args:
        source: the set.
        batch_size: the most images in a batch.
        num_workers: data loading processes; None: none for few images, else by the number of cores.
        indices: indices of the images to read; None: all.
        unreadable: list to which (name, reason) of those left out are added.
    """
    wanted = np.arange(len(source)) if indices is None else np.asarray(indices, dtype=np.int64)
    workers = auto_workers_once(len(wanted), _FEW) if num_workers is None else num_workers
    requests = [wanted[i : i + batch_size] for i in range(0, len(wanted), batch_size)]
    for examples, reports in read_batches(_Examples(source), requests, workers):
        if unreadable is not None:
            unreadable += reports
        if examples:
            yield examples


@dataclass(frozen=True)
class _Examples:
    """Reads the images and targets of a batch, given their indices."""

    source: ExampleSource

    def __call__(self, indices: np.ndarray) -> tuple[list[Example], list[Report]]:
        """Readable examples, and reports of the others."""
        examples, unreadable = [], []
        for index in map(int, indices):
            try:
                examples.append(Example(index, *self.source.read_example(index)))
            except UnreadableImage as error:
                unreadable.append((error.name, error.reason))
        return examples, unreadable
