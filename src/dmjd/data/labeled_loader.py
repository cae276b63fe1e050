"""Labeled training batches for a classifier: crops, RandAugment, erasing, mixup and CutMix, drawn from image keys.

timm's augmentations draw from the global generators of Python, NumPy and torch. These are seeded for each image and
restored afterwards, so that a batch is a function of its step, independent of the process and of what ran before.
"""

import contextlib
import dataclasses
import functools
import itertools
import random
import warnings
from collections.abc import Generator, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from dmjd.config.finetune import FinetuneConfig
from dmjd.data.cache import load_to_memory
from dmjd.data.sources.base import Source
from dmjd.data.train_loader import Augment, Stream
from dmjd.data.transforms import crop_resize
from dmjd.data.unreadable import Report, UnreadableImages, read_or_replace
from dmjd.data.workers import auto_workers, read_batches
from dmjd.images.preprocess import Preprocess
from dmjd.rng import STREAM_AUGMENT, STREAM_MIX, hash64
from dmjd.warning import DMJDWarning

_MOST_PIXELS_IN_MEMORY = 96 * 96  # larger images take longer to augment than to transfer from workers

_MOST_MAGNITUDE = 9.99  # at 10 timm posterizes to 0 bits per channel, which Pillow refuses

_PIL_CHANNELS = {1: "L", 3: "RGB"}  # of 8-bit images; RandAugment's color operations support no others


@contextlib.contextmanager
def seeded(key: int) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and torch (CPU) with a key, and restore them afterwards."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(key)
        np.random.seed(key % 2**32)
        torch.manual_seed(key)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


class Augmentation:
    """Crop, flip, RandAugment and erasing of one image, with the settings of :class:`FinetuneConfig`.

    Args:
        config: resolved configuration.
        preprocess: preprocessing of the encoder.
    """

    def __init__(self, config: FinetuneConfig, preprocess: Preprocess) -> None:
        assert config.crop_scale is not None
        self.preprocess = preprocess
        self.draw = Augment(preprocess.img_size, (config.crop_scale[0], config.crop_scale[1]), config.flip).draw
        self.mode = _PIL_CHANNELS.get(preprocess.in_chans)
        gray = tuple(round(255 * m) for m in preprocess.mean)
        hparams = {
            "img_mean": gray[0] if self.mode == "L" else gray,
            "translate_const": int(0.45 * min(preprocess.img_size)),
            "interpolation": Image.Resampling.BICUBIC,
            "magnitude_max": _MOST_MAGNITUDE,
        }
        self._rand_augment = None
        if config.rand_augment and self.mode is not None:
            text = f"rand-m{config.rand_augment:g}-mstd0.5-inc1"
            self._rand_augment = rand_augment_transform(text, hparams)
        self._erase = RandomErasing(config.erase, mode="pixel", device="cpu") if config.erase else None

    def __call__(self, image: np.ndarray, box: list[float], flip: bool, key: int) -> Tensor:
        """[H, W, C] uint8 or float32 -> normalized [C, h, w] float32.

        Images that are not 8-bit, or do not have 1 or 3 channels, are only cropped, flipped and erased.
        """
        crop = crop_resize(image, box, self.preprocess.img_size, flip)  # C, h, w
        with seeded(int(hash64(STREAM_AUGMENT, key)) & (2**63 - 1)):
            if self._rand_augment is not None and crop.dtype == torch.uint8:
                crop = self._colors(crop)
            normalized = self.preprocess.normalize(crop[None].float())[0]
            return normalized if self._erase is None else self._erase(normalized)

    def _colors(self, image: Tensor) -> Tensor:
        assert self._rand_augment is not None
        array = image.permute(1, 2, 0).numpy()
        pil = Image.fromarray(array[:, :, 0] if self.mode == "L" else array)
        augmented = np.array(self._rand_augment(pil)).reshape(array.shape)
        return torch.from_numpy(augmented).permute(2, 0, 1)


@dataclasses.dataclass(frozen=True)
class _LabeledCrops:
    """Reads and augments the labeled images of a micro-batch, given its sample numbers."""

    source: Source
    images: np.ndarray | None  # n, H, W, C: the decoded set, if held in memory
    stream: Stream
    augmentation: Augmentation
    pairs: bool  # whether the images are mixed in pairs

    def __call__(self, samples: range) -> tuple[Tensor, Tensor, Tensor, list[Report]]:
        """Images [b, C, h, w], labels [b], keys [b] and reports."""
        indices, keys = self.stream.draw(samples)
        if self.pairs:
            order = mirrored_pairs(len(samples))
            indices, keys = indices[order], keys[order]
        unreadable: list[Report] = []
        images, labels = [], []
        assert self.source.labels is not None
        if self.images is None:
            self.source.prepare(indices.tolist())
        for index, key in zip(indices.tolist(), keys.tolist(), strict=True):
            (image, shown), reports = read_or_replace(self._read, index, key, self.stream.length)
            unreadable += reports
            images.append(image)
            labels.append(int(self.source.labels[shown]))
        sides = torch.tensor([image.shape[:2] for image in images])
        boxes, flipped = self.augmentation.draw(keys, sides)
        crops = map(self.augmentation, images, boxes.tolist(), flipped.tolist(), keys.tolist())
        return torch.stack(list(crops)), torch.tensor(labels), keys, unreadable

    def _read(self, index: int) -> tuple[np.ndarray, int]:
        """The image and its index, from which the label follows; a replacement has another index."""
        return (self.source.read(index) if self.images is None else self.images[index]), index


def mirrored_pairs(n: int) -> Tensor:
    """Order of n images, n even, in which neighbors 2i and 2i + 1 stand at mirrored places: [n] int64.

    timm's Mixup mixes mirrored images. So each image is mixed with its neighbor in the step's batch, however that is
    divided into micro-batches.
    """
    return torch.cat([torch.arange(0, n, 2), torch.arange(1, n, 2).flip(0)])


class LabeledBatches:
    """Endless micro-batches on the device, from any step on: images, soft targets and keys.

    Images are [b, C, h, w] normalized, targets [b, classes], keys [b] int64.

    Mixup and CutMix mix the images 2i and 2i + 1 of a step's batch. The coefficient, the box and the choice between the
    two are drawn once a step, from seed and step. So neither ``accumulate`` nor the number of processes changes what is
    mixed.

    Args:
        source: labeled set.
        config: resolved configuration.
        preprocess: preprocessing of the encoder.
        num_classes: K.
        seed: seed of order and augmentation.
        num_workers: data loading processes; None: by the number of cores, none for small
            images that fit into memory.

    Attributes:
        unreadable: the unreadable images so far; each is reported once by a warning.

    Raises:
        ValueError: for a batch that cannot be divided by ``accumulate``, or, when called, for micro-batches that cannot
            be divided among the processes or into pairs for mixing.
    """

    def __init__(
        self,
        source: Source,
        config: FinetuneConfig,
        preprocess: Preprocess,
        num_classes: int,
        seed: int,
        num_workers: int | None = None,
    ) -> None:
        self.source, self.config, self.seed, self.num_workers = source, config, seed, num_workers
        self.num_classes = num_classes
        self.augmentation = Augmentation(config, preprocess)
        self.unreadable = UnreadableImages()
        self._mix = None
        assert config.batch_size is not None
        self._stream = Stream(len(source), config.batch_size, config.accumulate, seed)
        if config.mixup or config.cutmix:
            self._check_pairs(1)
            self._mix = Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                switch_prob=config.switch,
                label_smoothing=config.label_smoothing,
                num_classes=num_classes,
            )

    def __call__(self, start_step: int, fabric: Fabric) -> Generator[tuple[Tensor, Tensor, Tensor], None, None]:
        """Micro-batches from a step on; closing the iterator ends its workers."""
        memory = load_to_memory(self.source, _MOST_PIXELS_IN_MEMORY)
        held = memory.images.permute(0, 2, 3, 1).numpy() if memory is not None and not memory.unreadable else None
        stream = dataclasses.replace(self._stream, rank=fabric.global_rank, world_size=fabric.world_size)
        if self._mix is not None:
            self._check_pairs(fabric.world_size)
        crops = _LabeledCrops(self.source, held, stream, self.augmentation, self._mix is not None)
        workers = self.num_workers if self.num_workers is not None else 0 if held is not None else auto_workers()
        results = read_batches(crops, stream.micro_batches(start_step), workers, fabric.device.type == "cuda")
        first = start_step * self.config.accumulate
        try:
            for number, (images, labels, keys, unreadable) in zip(itertools.count(first), results, strict=False):
                self.unreadable.add_and_warn(
                    unreadable, functools.partial(warnings.warn, category=DMJDWarning, stacklevel=3)
                )
                images, labels, keys = (x.to(fabric.device, non_blocking=True) for x in (images, labels, keys))
                key = hash64(STREAM_MIX, self.seed, number // self.config.accumulate)
                images, targets = self._mixed(images, labels, int(key) & (2**63 - 1))
                yield images, targets, keys
        finally:
            results.close()  # type: ignore[attr-defined]

    def _check_pairs(self, world_size: int) -> None:
        """Check that the images of every micro-batch are pairs."""
        parts, batch_size = self.config.accumulate * world_size, self._stream.batch_size
        if batch_size // parts % 2:
            processes = f" on {world_size} processes" if world_size > 1 else ""
            raise ValueError(
                f"mixup and cutmix mix images in pairs: batch_size {batch_size} over accumulate "
                f"{self.config.accumulate}{processes} must be even: give a --batch-size that is a multiple of "
                f"{2 * parts}, or switch both off (--mixup 0 --cutmix 0)"
            )

    def _mixed(self, images: Tensor, labels: Tensor, key: int) -> tuple[Tensor, Tensor]:
        """Images and soft targets [b, classes]; pairs of images are mixed if mixup or CutMix is on."""
        if self._mix is not None:
            with seeded(key):
                return self._mix(images, labels)
        smoothing = self.config.label_smoothing
        one_hot = F.one_hot(labels, self.num_classes).to(images.dtype)
        return images, one_hot * (1 - smoothing) + smoothing / self.num_classes
