"""Images that a run does not train on, and its loss on them."""

from collections.abc import Sequence
from itertools import accumulate, islice

import numpy as np
import torch

from dmjd.config.pretrain import PretrainConfig
from dmjd.data.order import Part
from dmjd.data.sources.base import Source
from dmjd.data.sources.subset import SubsetSource
from dmjd.data.train_loader import Batch, TrainLoader
from dmjd.data.unreadable import Report
from dmjd.images.preprocess import Preprocess
from dmjd.model import MaskedImageModel
from dmjd.nn.modes import evaluating
from dmjd.rng import STREAM_HELD_OUT, hash64

SHARE, MOST = 0.02, 2000  # of the set, and images, that are held out by default

_BATCH_SIZE = 64

_MAX_BYTES = 1 << 28  # of the images kept in main memory


def hold_out(config: PretrainConfig, source: Source) -> tuple[PretrainConfig, Source, Source | None]:
    """Divide a set into images to train on and images that are held out, the same ones for every run on this set.

    Of a mixture, each source gives its part.

    Returns:
        The configuration, with the default number of held-out images filled in; the images to train on; the others, or
        None if there are none.

    Raises:
        ValueError: if no image is left to train on.
    """
    parts, count = source.parts or (Part(len(source)),), config.held_out
    if count is None:
        count = min(int(SHARE * len(source)), MOST, len(source) - len(parts))
    if count > len(source) - len(parts):
        of_each = " of each set" if source.parts else ""
        raise ValueError(
            f"--held-out {count} leaves nothing{of_each} to train on: {source.name} has {len(source)} image(s)"
        )
    config = config.replace(held_out=count)
    if count == 0:
        return config, source, None
    counts = proportional([part.length for part in parts], count)
    rows = [_divided(start, part.length, n) for start, part, n in zip(_starts(parts), parts, counts, strict=True)]
    held, trained = (np.concatenate(each) for each in zip(*rows, strict=True))
    rest = tuple(Part(part.length - n, part.weight) for part, n in zip(parts, counts, strict=True))
    trained_parts = rest if source.parts else ()
    return config, SubsetSource(source, trained, trained_parts, trained=True), SubsetSource(source, held)


def proportional(lengths: Sequence[int], count: int) -> list[int]:
    """Divide a number of images among sources in proportion to their lengths; each keeps at least one."""
    exact = [count * length / sum(lengths) for length in lengths]
    counts = [min(int(number), length - 1) for number, length in zip(exact, lengths, strict=True)]
    while sum(counts) < count:  # the largest remainders first
        free = [i for i, length in enumerate(lengths) if counts[i] < length - 1]
        counts[max(free, key=lambda i: exact[i] - counts[i])] += 1
    return counts


def _starts(parts: Sequence[Part]) -> list[int]:
    return list(accumulate((part.length for part in parts[:-1]), initial=0))


def _divided(start: int, length: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The indices of one source from ``start`` on, held-out ones and others, each ascending."""
    order = start + hash64(STREAM_HELD_OUT, torch.arange(start, start + length)).argsort().numpy()
    return np.sort(order[:count]), np.sort(order[count:])


class HeldOutLoss:
    """The loss of a run on images that it does not train on, with the same crops and masks at every measurement.

    The images are cropped and flipped like training images, so that both losses can be compared. They are read when
    they are first needed, and kept in main memory; fewer if they are large, to stay below 256 MiB.

    Args:
        source: the held-out images.
        config: of the run.
        preprocess: preprocessing of the encoder.
        device: device of the model.

    Attributes:
        num_images: images used.
        unreadable: (name, reason) of those that could not be read and were replaced, once they were read.
    """

    def __init__(
        self, source: Source, config: PretrainConfig, preprocess: Preprocess, device: torch.device | str = "cpu"
    ) -> None:
        self._source, self._config, self._preprocess, self._device = source, config, preprocess, device
        height, width = config.size
        count = min(len(source), max(1, _MAX_BYTES // (height * width * config.in_chans)))
        self._num_batches = -(-count // _BATCH_SIZE)
        self._batch_size = count // self._num_batches  # equal ones, which leave out as few images as possible
        self.num_images = self._num_batches * self._batch_size
        self._batches: list[Batch] = []
        self.unreadable: list[Report] = []

    def read(self) -> None:
        """Read the images, unless that was done.

        Raises:
            UnreadableImage: if hardly any can be read.
        """
        if self._batches:
            return
        config = self._config
        loader = TrainLoader(
            self._source,
            img_size=config.size,
            batch_size=self._batch_size,
            num_workers=0,
            crop_scale=(config.crop_scale[0], config.crop_scale[1]),
            flip=config.flip,
        )
        self._batches = list(islice(loader.batches(), self._num_batches))
        self.unreadable = loader.unreadable + [report for batch in self._batches for report in batch.unreadable]

    def __call__(self, model: MaskedImageModel) -> dict[str, float]:
        """{"held_out_loss", "held_out_mim", "held_out_vis"}, means over the images; a branch that is off has none."""
        self.read()
        sums: dict[str, float] = {}
        with evaluating(model):
            for batch in (batch.to(torch.device(self._device)) for batch in self._batches):
                out = model(self._preprocess.normalize(batch.images), batch.images, keys=batch.keys)
                for name in ("loss", *model.branches):
                    sums[name] = sums.get(name, 0.0) + float(out[name])
        return {f"held_out_{name}": total / len(self._batches) for name, total in sums.items()}
