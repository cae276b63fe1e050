"""Online kNN: accuracy at intervals during pre-training, on images that are read once."""

import torch
from torch import Tensor

from dmjd.data.cache import first_of_parts
from dmjd.data.eval_loader import read_all
from dmjd.data.sources.base import Source
from dmjd.data.sources.registry import align_labels
from dmjd.data.sources.subset import labeled_images
from dmjd.encoders.base import Encoder
from dmjd.evaluation.frozen.features import Features, check_labels, raw_pixels
from dmjd.evaluation.frozen.knn import knn
from dmjd.images.preprocess import Preprocess
from dmjd.nn.modes import evaluating

NUM_TRAIN, NUM_TEST = 2_000, 500

_MAX_BYTES = 1 << 30


class OnlineKnn:
    """Accuracy of a weighted kNN on up to 2,000 training and 500 test images, evenly spaced over their sets.

    The images are read by :meth:`read`, or when they are first needed, and kept, preprocessed, in main memory. Fewer
    images are used if they are large, to stay below 1 GiB.

    Args:
        train, test: labeled sources.
        preprocess: preprocessing of the encoder.
        device: device that the encoder runs on.
        batch_size: images per batch.
        num_workers: data loading processes; None: by the number of cores.

    Attributes:
        num_images: images used, of both sets.

    Raises:
        ValueError: if a source is unlabeled, has a single class, or their classes differ.
    """

    def __init__(
        self,
        train: Source,
        test: Source,
        preprocess: Preprocess,
        device: torch.device | str = "cpu",
        *,
        batch_size: int = 256,
        num_workers: int | None = None,
    ) -> None:
        train, test = labeled_images(train), labeled_images(test)
        self._preprocess, self._device, self._batch_size = preprocess, device, batch_size
        self._sources, self._num_workers = (train, test), num_workers
        self._all_labels = align_labels(train, test)
        height, width = preprocess.img_size
        fraction = min(1.0, _MAX_BYTES / ((NUM_TRAIN + NUM_TEST) * height * width * preprocess.in_chans))
        counts = ((train, NUM_TRAIN), (test, NUM_TEST))
        self._rows = [first_of_parts(len(source), max(1, int(n * fraction))) for source, n in counts]
        self.num_images = sum(map(len, self._rows))
        assert train.labels is not None
        check_labels(
            *(torch.from_numpy(x[r]) for x, r in zip((train.labels, self._all_labels), self._rows, strict=True))
        )
        self._raw: list[Tensor] = []
        self._labels: list[Tensor] = []

    def read(self) -> None:
        """Read the images, unless that was done.

        Raises:
            ValueError: if none of a set, or of all classes but one, can be read.
        """
        if self._raw:
            return
        pairs = zip(self._sources, self._rows, strict=True)
        kept = [read_all(source, self._preprocess, rows, self._num_workers) for source, rows in pairs]
        assert kept[0].labels is not None
        labels = [kept[0].labels, torch.from_numpy(self._all_labels[kept[1].index.numpy()])]
        check_labels(*labels)
        self._raw, self._labels = [images.raw for images in kept], labels

    def baselines(self, fresh: Encoder) -> dict[str, float]:
        """Top-1 accuracies of a randomly initialized encoder and of raw pixels."""
        self.read()
        pixels = (
            Features(raw_pixels(self._preprocess.normalize(raw)), labels, torch.arange(len(labels)))
            for raw, labels in zip(self._raw, self._labels, strict=True)
        )
        return {"knn_random_init": self(fresh), "knn_raw_pixels": knn(*pixels, device=self._device)["top1"]}

    def __call__(self, encoder: Encoder) -> float:
        """Top-1 accuracy of an encoder, 0 to 1; its mode is restored afterwards."""
        self.read()
        with evaluating(encoder):
            xs = [self._features(encoder, raw) for raw in self._raw]
        train, test = (Features(x, y, torch.arange(len(y))) for x, y in zip(xs, self._labels, strict=True))
        return knn(train, test, device=self._device)["top1"]

    def _features(self, encoder: Encoder, raw: Tensor) -> Tensor:
        """[n, C, H, W], 0..255 -> [n, D] float32 on the CPU."""
        batches = (self._preprocess.normalize(part.to(self._device)) for part in raw.split(self._batch_size))
        return torch.cat([encoder.encode(images).float().cpu() for images in batches])
