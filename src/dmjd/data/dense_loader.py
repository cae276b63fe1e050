"""Streams of images with their masks or objects: in frames for training, as they are for evaluation."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dmjd.data.dense_transforms import (
    IGNORE,
    covering,
    fitting,
    jitter_colors,
    place_boxes,
    place_image,
    place_masks,
    random_placement,
)
from dmjd.data.sources.coco import Instances
from dmjd.data.train_loader import Stream, stack
from dmjd.data.unreadable import Report, UnreadableImages, read_or_replace
from dmjd.data.workers import auto_workers, read_batches
from dmjd.images.decoding import UnreadableImage

LEAST_VISIBLE = 1.0  # pixels in the frame; objects narrower than this are not trained on

_FEW = 256  # images that are read before workers would have started


class ExampleSource(Protocol):
    """A source of images with targets."""

    name: str

    def __len__(self) -> int: ...

    def read_example(self, index: int) -> tuple[np.ndarray, Any]:
        """Image [H, W, C] on the 0..255 scale, and its target; UnreadableImage where there is none."""


@dataclass
class ExampleBatch:
    """A micro-batch in frames of one size, not normalized.

    Attributes:
        images: [b, C, h, w] uint8 or float32 on the 0..255 scale.
        targets: masks [b, h, w] int16 of classes and IGNORE, or a list of b :class:`Instances`.
        bad: (name, reason) of images that could not be read and were replaced.
    """

    images: Tensor
    targets: Any
    unreadable: list[Report] = field(default_factory=list)

    def to(self, device: torch.device) -> "ExampleBatch":
        """The same on a device."""
        targets = self.targets
        if isinstance(targets, Tensor):
            targets = targets.to(device, non_blocking=True)
        else:
            targets = [_instances_to(one, device) for one in targets]
        return ExampleBatch(self.images.to(device, non_blocking=True), targets, self.unreadable)


def _instances_to(one: Instances, device: torch.device) -> Instances:
    masks = one.masks.to(device) if one.masks is not None else None
    return Instances(one.boxes.to(device), one.labels.to(device), one.crowd.to(device), masks)


@dataclass(frozen=True)
class MaskAugment:
    """Random scale, crop, flip and colors of an image and its mask.

    Attributes:
        frame: (h, w) of the result. base: (h, w) that images cover before the random scale. scale: its range.
        flip, colors: whether. fill: per channel, on the 0..255 scale, where a frame shows no image.
    """

    frame: tuple[int, int]
    base: tuple[int, int]
    fill: tuple[float, ...]
    scale: tuple[float, float] = (0.5, 2.0)
    flip: bool = True
    color_jitter: bool = True

    def __call__(self, image: np.ndarray, target: np.ndarray, key: int) -> tuple[Tensor, Tensor]:
        """[H, W, C] and [H, W] -> [C, h, w] and [h, w]."""
        size = (image.shape[0], image.shape[1])
        base = covering(size, self.base)
        placement = random_placement(key, size, self.frame, base, self.scale, self.flip)
        crop = place_image(image, placement, self.fill)
        crop = jitter_colors(crop, key) if self.color_jitter else crop
        return crop, place_masks(target, placement, IGNORE)


@dataclass(frozen=True)
class BoxAugment:
    """Random scale, place and flip of an image and its objects; crowds and what falls out of the frame are dropped.

    Attributes:
        frame: (h, w) of the result. base: (h, w) that images fit into before the random scale. scale: its range.
        flip: whether. fill: per channel, on the 0..255 scale, where the frame shows no image.
    """

    frame: tuple[int, int]
    base: tuple[int, int]
    fill: tuple[float, ...]
    scale: tuple[float, float] = (0.5, 1.5)
    flip: bool = True

    def __call__(self, image: np.ndarray, target: Instances, key: int) -> tuple[Tensor, Instances]:
        """[H, W, C] and its objects -> [C, h, w] and the objects in the frame."""
        size = (image.shape[0], image.shape[1])
        placement = random_placement(key, size, self.frame, fitting(size, self.base), self.scale, self.flip)
        boxes = place_boxes(target.boxes, placement)
        masks = place_masks(target.masks.numpy(), placement, 0) if target.masks is not None else None
        moved = Instances(boxes, target.labels, target.crowd, masks)
        visible = (boxes[:, 2:] - boxes[:, :2]).amin(1) >= LEAST_VISIBLE
        if masks is not None:
            visible &= masks.flatten(1).bool().any(1)
        return place_image(image, placement, self.fill), moved.keep(visible & ~target.crowd)


Augmentation = Callable[[np.ndarray, Any, int], tuple[Tensor, Any]]


class ExampleLoader:
    """Endless micro-batches, bit-identical for any number of workers and any step to start from.

    The place of an unreadable image is taken by the one that its key names, as in pre-training.

    Args:
        source: the set. augment: image, target and key -> the same in the frame.
        batch_size, accumulate, seed, rank, world_size: see :class:`~dmjd.data.train_loader.Stream`.
        num_workers: reading processes; None: by the machine. device: where batches are wanted.
        warn: told the name and reason of each unreadable image, once.
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
        self._reader = _Frames(source, augment, self.stream)
        self._unreadable, self._warn = UnreadableImages(), warn

    def batches(self, start_step: int = 0) -> Iterator[ExampleBatch]:
        """Micro-batches from a step on, without end; closing the iterator ends its workers.

        Raises:
            UnreadableImage: where a hundred images in a row can't be read.
            ValueError: where more than 1 % of the images (and more than ten) can't be read.
        """
        pinned = self.device.type == "cuda"
        for result in read_batches(self._reader, self.stream.micro_batches(start_step), self.num_workers, pinned):
            if isinstance(result, UnreadableImage):
                raise result
            images, targets, unreadable = result
            for name, reason in self._unreadable.add(unreadable):
                self._warn(f"unreadable, another image takes its place: {name}: {reason}")
            self._unreadable.check(None, self.stream.length)
            if isinstance(targets[0], Tensor):
                targets = torch.stack(targets)
            yield ExampleBatch(images, targets, unreadable).to(self.device)


@dataclass(frozen=True)
class _Frames:
    """What a worker does with the sample numbers of a micro-batch."""

    source: ExampleSource
    augment: Augmentation
    stream: Stream

    def __getitems__(self, samples: range) -> tuple[Tensor, list[Any], list[Report]] | UnreadableImage:
        indices, keys = self.stream.draw(samples)
        crops, targets, reports = [], [], []
        for index, key in zip(indices.tolist(), keys.tolist(), strict=True):
            try:
                (image, target), unreadable = read_or_replace(self.source.read_example, index, key, self.stream.length)
            except UnreadableImage as error:
                return error
            crop, moved = self.augment(image, target, key)
            crops.append(crop)
            targets.append(moved)
            reports += unreadable
        return stack(crops), targets, reports


@dataclass
class Example:
    """An image [H, W, C] on the 0..255 scale with its target, and its place in the set."""

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
    """Images as they are, in the order of the set, by the batch; unreadable ones are left out.

    Args:
        source: the set. batch_size: the most images at a time. num_workers: reading processes; None: by the number.
        indices: the images wanted; None: all. bad: gets (name, reason) of those left out.
    """
    wanted = np.arange(len(source)) if indices is None else np.asarray(indices, dtype=np.int64)
    workers = (0 if len(wanted) <= _FEW else auto_workers()) if num_workers is None else num_workers
    requests = [wanted[i : i + batch_size] for i in range(0, len(wanted), batch_size)]
    for examples, reports in read_batches(_AsTheyAre(source), requests, workers):
        if unreadable is not None:
            unreadable += reports
        if examples:
            yield examples


@dataclass(frozen=True)
class _AsTheyAre:
    """What a worker does with the indices of a batch."""

    source: ExampleSource

    def __getitems__(self, indices: np.ndarray) -> tuple[list[Example], list[Report]]:
        examples, unreadable = [], []
        for index in map(int, indices):
            try:
                examples.append(Example(index, *self.source.read_example(index)))
            except UnreadableImage as error:
                unreadable.append((error.name, error.reason))
        return examples, unreadable
