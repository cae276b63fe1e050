"""The resumable stream of training images.

Permutations, one per epoch, form an endless stream that is cut into batches. Sample ``s`` is position ``s % n`` of
epoch ``s // n``, so the batch of a step is a function of the step's number: a run resumes from any step without saved
state, and the number of workers and processes does not matter. In a mixture each source has a stream of its own, and
the streams are interleaved by their weights.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from dmjd.data.cache import ImagesInMemory, load_to_memory, memory_needed
from dmjd.data.fetch_ahead import FetchAhead
from dmjd.data.growth import Growth, Place, WithJoined
from dmjd.data.order import GrowingPermutations, Interleaving, Part, Permutations
from dmjd.data.small_crops import MOST_PIXELS, crop_small, decode_small
from dmjd.data.sources.base import Source
from dmjd.data.sources.folder import FolderSource
from dmjd.data.transforms import crop_boxes, crop_resize, flips
from dmjd.data.unreadable import Report, read_or_replace, replace_unreadable
from dmjd.data.valid_crops import prefer_valid
from dmjd.data.windows import ShardWindows, WindowedPermutations
from dmjd.data.workers import auto_workers, read_batches
from dmjd.images.reading import OpenImage
from dmjd.images.resampling import resample
from dmjd.images.stored import UnreadableImage
from dmjd.rng import image_keys

_DRAWN_AT_ONCE = 8192  # samples

T = TypeVar("T")


@dataclass(frozen=True)
class Stream:
    """The images that a process trains on at each step.

    Attributes:
        length: images in the set.
        batch_size: unique images of one optimizer step, over all processes.
        accumulate: micro-batches per step.
        seed: seed of all random choices.
        rank: index of this process.
        world_size: number of processes.
        parts: the sources of a mixture, in the order of their images, each with epochs of its own; none: a single one.
        growth: the images that join the set.
        windows: of a single source whose images are shuffled window by window.

    Raises:
        ValueError: if the batch cannot be divided evenly.
    """

    length: int
    batch_size: int
    accumulate: int = 1
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    parts: tuple[Part, ...] = ()
    growth: Growth | None = None
    windows: ShardWindows | None = None

    def __post_init__(self) -> None:
        parts = self.accumulate * self.world_size
        if self.batch_size < 1 or parts < 1 or self.batch_size % parts:
            raise ValueError(
                f"batch_size {self.batch_size} can't be divided evenly among {self.accumulate} micro-batches on "
                f"{self.world_size} processes: make it a multiple of {max(parts, 1)}"
            )

    def micro_batches(self, start_step: int) -> Iterator[range]:
        """This process's sample numbers of each micro-batch, from a step on; endless."""
        per_slice = self.batch_size // self.accumulate
        share = per_slice // self.world_size
        for slice_number in itertools.count(start_step * self.accumulate):
            first = slice_number * per_slice + self.rank * share
            yield range(first, first + share)

    def draw(self, *samples: range) -> tuple[Tensor, Tensor]:
        """Sample numbers, in order -> [b] int64 indices into the set and [b] int64 keys of the images."""
        if self.growth is not None:
            self._reach(self.growth, samples)
        numbers = torch.cat([torch.arange(part.start, part.stop) for part in samples])
        if len(self.parts) < 2:
            epochs, indices = self._orders[0].draw(numbers)
        else:
            epochs, indices = torch.empty_like(numbers), torch.empty_like(numbers)
            sources, ordinals = self._interleaving.place(numbers)
            for source in sources.unique().tolist():
                here = sources == source
                epochs[here], indices[here] = self._orders[source].draw(ordinals[here])
        return indices, image_keys(self.seed, epochs, indices)

    def _reach(self, growth: Growth, samples: tuple[range, ...]) -> None:
        """Find out which images the epochs of these samples have: all processes together, at the same micro-batch."""
        size = self.batch_size // self.accumulate
        begin, end = samples[0].start // size * size, -(-samples[-1].stop // size) * size
        numbers = torch.arange(begin, end)
        sources, ordinals = torch.zeros_like(numbers), numbers
        if len(self.parts) > 1:
            sources, ordinals = self._interleaving.place(numbers)
        for source in sources.unique().tolist():
            here = ordinals[sources == source]
            growth.orders[source].reach(int(here[0]), int(here[-1]))

    def fetch_ahead(self, start_step: int) -> FetchAhead | None:
        """What fetches shards while they are read from a step on; None if all are on this machine."""
        order, store = self._orders[0], None if self.windows is None else self.windows.store
        if store is None or not isinstance(order, WindowedPermutations):
            return None
        return FetchAhead(order, store, start_step, self.batch_size)

    @functools.cached_property
    def _interleaving(self) -> Interleaving:
        return Interleaving(self.parts)

    @functools.cached_property
    def _orders(self) -> Sequence[Permutations | GrowingPermutations]:
        """The permutations of each source."""
        if self.growth is not None:
            return self.growth.orders
        if self.windows is not None:
            return [WindowedPermutations(self.seed, self.windows)]
        lengths = [part.length for part in self.parts] or [self.length]
        firsts = itertools.accumulate(lengths, initial=0)
        return [Permutations(self.seed, length, first) for length, first in zip(lengths, firsts, strict=False)]


@dataclass
class Batch:
    """A micro-batch, cropped and flipped, not normalized.

    Attributes:
        images: [b, C, h, w] uint8 or float32 on the 0..255 scale, NaN where invalid.
        keys: [b] int64, from which masks are drawn.
        unreadable: (name, reason) of images that could not be read and were replaced.
    """

    images: Tensor
    keys: Tensor
    unreadable: list[Report] = field(default_factory=list)

    def to(self, device: torch.device) -> "Batch":
        """Move the batch to a device; asynchronous from page-locked memory."""
        return Batch(
            self.images.to(device, non_blocking=True), self.keys.to(device, non_blocking=True), self.unreadable
        )


def _most_pixels(device: torch.device) -> int | None:
    """Largest images that are held in memory."""
    return None if device.type == "cuda" else MOST_PIXELS


def bytes_in_memory(source: Source, device: torch.device) -> int | None:
    """Size of a set that :class:`TrainLoader` holds in memory, as far as a few of its images tell; None for others."""
    return memory_needed(source, _most_pixels(device))


class TrainLoader:
    """Endless micro-batches of random crops, bit-identical for any number of workers and any start step.

    Sets of images of one size that take at most 1 GiB are held in memory and augmented in batches on the device (on
    the CPU only images of up to 96 x 96); others are read by worker processes. An unreadable image is replaced by one
    drawn from its key. Sets that may have invalid pixels are read by workers, too, and crops prefer the valid area.

    Args:
        source: the set.
        img_size: (h, w) of the crops.
        batch_size, accumulate, seed, rank, world_size: see :class:`Stream`.
        num_workers: data loading processes; None: cores / local processes, at most 8. A set in memory needs none.
        crop_scale: range of the crop's area, relative to the image.
        flip: flip half of the images.
        device: device of the batches.
        growth: the images that join the set. It is read by worker processes, whatever its size; if on the CPU it would
            be held in memory without, it has the same pixels, so that a run may be resumed with it or without.

    Attributes:
        unreadable: (name, reason) of images found unreadable while the set was loaded to memory.

    Raises:
        ValueError: if the batch cannot be divided evenly.
    """

    def __init__(
        self,
        source: Source,
        *,
        img_size: tuple[int, int],
        batch_size: int,
        accumulate: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int | None = None,
        crop_scale: tuple[float, float] = (0.5, 1.0),
        flip: bool = True,
        device: torch.device | None = None,
        growth: Growth | None = None,
    ) -> None:
        self.stream = Stream(
            len(source), batch_size, accumulate, seed, rank, world_size, source.parts, growth, source.windows
        )
        if source.windows is not None and rank == 0:
            source.windows.warn_if_below(batch_size)
        self.device = device or torch.device("cpu")
        self._augment = Augment(img_size, crop_scale, flip)
        self._source = source
        # Crops are computed in float64, which MPS lacks.
        self._crops_on = self.device if self.device.type == "cuda" else torch.device("cpu")
        most = _most_pixels(self.device) if growth is None else MOST_PIXELS
        held = load_to_memory(source, most) if source.windows is None else None
        self._memory = held if growth is None else None
        self._as_in_memory = growth is not None and held is not None
        if self._memory is not None:
            self._memory.images = self._memory.images.to(self._crops_on)
            num_workers = 0
        self.num_workers = auto_workers(world_size) if num_workers is None else num_workers
        self.unreadable = list(self._memory.unreadable.values()) if self._memory is not None else []

    @property
    def in_memory(self) -> bool:
        """Whether the whole set is held in memory."""
        return self._memory is not None

    def batches(self, start_step: int = 0) -> Generator[Batch, None, None]:
        """Endless micro-batches from a step on; closing the iterator ends its workers.

        Raises:
            UnreadableImage: if a hundred images in a row cannot be read.
        """
        requests = self.stream.micro_batches(start_step)
        if self._memory is not None:
            yield from self._from_memory(self._memory, requests)
            return
        ahead = self.stream.fetch_ahead(start_step)
        if ahead is not None:
            requests = ahead.when_here(requests)
        # Drawn in this process, because each worker would need the permutations, of 8 bytes per image.
        drawn = ((indices.numpy(), keys.numpy()) for indices, keys in map(self.stream.draw, requests))
        crops = CroppedImages(self._source, self._augment, self._as_in_memory)
        if (growth := self.stream.growth) is None:
            results = read_batches(crops, drawn, self.num_workers, self._pinned)
        else:  # workers cannot know the images that join later
            named = ((indices, keys, growth.among(indices)) for indices, keys in drawn)
            results = read_batches(GrownImages(crops, growth.sources), named, self.num_workers, self._pinned)
        with contextlib.closing(ahead) if ahead is not None else contextlib.nullcontext():
            for samples, result in zip(self.stream.micro_batches(start_step), results, strict=False):
                if ahead is not None:
                    ahead.received(samples)
                yield Batch(*result).to(self.device)

    @property
    def _pinned(self) -> bool:
        return self.device.type == "cuda"

    def _from_memory(self, memory: ImagesInMemory, requests: Iterator[range]) -> Iterator[Batch]:
        """Batches of a set in memory. Indices and boxes of several are drawn at once, because on small tensors the host
        spends more time on starting operations, and on waking its threads for them, than on arithmetic.
        """
        sides = torch.tensor(memory.images.shape[2:])
        while samples := list(itertools.islice(requests, self._batches_at_once)):
            drawn, keys = self.stream.draw(*samples)
            boxes, flipped = self._augment.draw(keys, sides.expand(len(keys), 2))
            wanted = (replace_unreadable(drawn, keys, memory.readable, self.stream.parts), keys, boxes, flipped)
            share = len(samples[0])
            parts = zip(*(self._send(x).split(share) for x in wanted), strict=True)
            for number, (indices, part_keys, part_boxes, part_flipped) in enumerate(parts):
                images = resample(memory.images.index_select(0, indices), part_boxes, self._augment.size, part_flipped)
                missing = self._missing(memory, drawn[number * share : (number + 1) * share])
                yield Batch(images, part_keys, missing).to(self.device)

    @property
    def _batches_at_once(self) -> int:
        """How many micro-batches are drawn at once."""
        parts = self.stream.accumulate * self.stream.world_size
        return max(1, _DRAWN_AT_ONCE * parts // self.stream.batch_size)

    @staticmethod
    def _missing(memory: ImagesInMemory, drawn: Tensor) -> list[Report]:
        """The unreadable ones among the drawn images."""
        if not memory.unreadable:
            return []
        return [memory.unreadable[int(i)] for i in drawn[~memory.readable[drawn]]]

    def _send(self, x: Tensor) -> Tensor:
        """Move a tensor to the device; asynchronous on a GPU, from page-locked memory."""
        return x.pin_memory().to(self._crops_on, non_blocking=True) if self._pinned else x


@dataclass(frozen=True)
class Augment:
    """Random crops of one size, and flips."""

    size: tuple[int, int]
    scale: tuple[float, float]
    flip: bool

    def draw(self, keys: Tensor, sides: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [b] and image sizes [b, 2] -> boxes (top, left, height, width) [b, 4] float64, and flips [b] bool."""
        return crop_boxes(keys, sides, self.scale), flips(keys) & self.flip


@dataclass(frozen=True)
class CroppedImages:
    """Reads the images of a micro-batch and crops, flips and stacks them, given their indices and keys.

    Images stay encoded until they are cropped, if possible: 64 decoded photographs would take gigabytes. With
    ``as_in_memory`` small ones have the pixels that they would have in a set in memory.
    """

    source: Source
    augment: Augment
    as_in_memory: bool = False

    def __call__(self, drawn: tuple[np.ndarray, np.ndarray]) -> tuple[Tensor, Tensor, list[Report]]:
        """Images, keys and reports."""
        indices, keys = (torch.from_numpy(x) for x in drawn)
        samples = list(zip(indices.tolist(), keys.tolist(), strict=True))
        unreadable: list[Report] = []
        self.source.prepare(indices.tolist())
        opened = [self._open(index, key, unreadable) for index, key in samples]
        boxes, flipped = self.augment.draw(keys, torch.tensor([image.size for image in opened]))
        boxes = self._preferring_valid(boxes, keys, opened)
        small = crop_small(opened, boxes, flipped, self.augment.size) if self.as_in_memory else {}
        crops = [
            small[i] if i in small else self._crop(image, box, flip, sample, unreadable)
            for i, (image, box, flip, sample) in enumerate(
                zip(opened, boxes.tolist(), flipped.tolist(), samples, strict=True)
            )
        ]
        return stack(crops, channels_last=not small), keys, unreadable

    def _preferring_valid(self, boxes: Tensor, keys: Tensor, images: Sequence[OpenImage | np.ndarray]) -> Tensor:
        if self.source.invalid is None:
            return boxes
        return prefer_valid(boxes, keys, images, lambda others, sides: self.augment.draw(others, sides)[0])

    def _open(self, index: int, key: int, unreadable: list[Report]) -> OpenImage:
        """The image, or its replacement."""
        if self.as_in_memory:
            return self._readable(lambda i: decode_small(self.source.open(i)), index, key, unreadable)
        return self._readable(self.source.open, index, key, unreadable)

    def _readable(self, read: Callable[[int], T], index: int, key: int, unreadable: list[Report]) -> T:
        source = self.source
        image, reports = read_or_replace(read, index, key, len(source), source.parts, source.home(index))
        unreadable += reports
        return image

    def _crop(
        self, image: OpenImage, box: list[float], flip: bool, sample: tuple[int, int], unreadable: list[Report]
    ) -> Tensor:
        """Crop an image, or its replacement if decoding shows that the image is damaged."""
        try:
            return crop_resize(*image.read_for(box, self.augment.size), self.augment.size, flip)
        except UnreadableImage:
            index, key = sample
        whole = self._readable(self.source.read, index, key, unreadable)
        keys = torch.tensor([key])
        boxes = self._preferring_valid(self.augment.draw(keys, torch.tensor([whole.shape[:2]]))[0], keys, [whole])
        return crop_resize(whole, boxes[0].tolist(), self.augment.size, flip)


@dataclass(frozen=True)
class GrownImages:
    """:class:`CroppedImages` of a set that grows, given the places of drawn images that have joined, too."""

    crops: CroppedImages
    sources: Sequence[FolderSource]

    def __call__(self, drawn: tuple[np.ndarray, np.ndarray, dict[int, Place]]) -> tuple[Tensor, Tensor, list[Report]]:
        """Images, keys and reports."""
        indices, keys, joined = drawn
        crops = (
            replace(self.crops, source=WithJoined(self.crops.source, self.sources, joined)) if joined else self.crops
        )
        return crops((indices, keys))


def stack(images: list[Tensor], channels_last: bool = True) -> Tensor:
    """[C, h, w] images -> [b, C, h, w]; float32 if any of them is, channels last in memory if all are and it may be."""
    if len({image.dtype for image in images}) > 1:
        images = [image.float() for image in images]
    permuted = [image.permute(1, 2, 0) for image in images]
    if channels_last and all(image.is_contiguous() for image in permuted):
        return torch.stack(permuted).permute(0, 3, 1, 2)
    return torch.stack(images)
