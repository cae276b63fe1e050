"""Online kNN: accuracy at intervals during pre-training, on images that are read once."""

import torch
from torch import Tensor

from dmjd.data.cache import first_of_parts
from dmjd.data.eval_loader import read_all
from dmjd.data.sources.base import Source
from dmjd.data.sources.registry import align_labels
from dmjd.encoders.base import Encoder
from dmjd.evaluation.frozen.features import Features, check_labels, raw_pixels
from dmjd.evaluation.frozen.knn import knn
from dmjd.images.preprocess import Preprocess
from dmjd.nn.modes import evaluating

NUM_TRAIN, NUM_TEST = 5_000, 2_000

_MAX_BYTES = 1 << 30


class OnlineKnn:
    """Accuracy of a weighted kNN on up to 5,000 training and 2,000 test images, evenly spaced over their sets.

    The images are read by the constructor and kept, preprocessed, in main memory. Fewer images are used if they are
    large, to stay below 1 GiB.

    Args:
        train, test: labeled sources.
        preprocess: preprocessing of the encoder.
        device: device that the encoder runs on.
        batch_size: images per batch.
        num_workers: data loading processes; None: by the number of cores.

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
        self._preprocess, self._device, self._batch_size = preprocess, device, batch_size
        labels = align_labels(train, test)
        height, width = preprocess.img_size
        fraction = min(1.0, _MAX_BYTES / ((NUM_TRAIN + NUM_TEST) * height * width * preprocess.in_chans))
        rows = [first_of_parts(len(s), max(1, int(n * fraction))) for s, n in ((train, NUM_TRAIN), (test, NUM_TEST))]
        kept = [read_all(s, preprocess, r, num_workers) for s, r in zip((train, test), rows, strict=True)]
        assert kept[0].labels is not None
        self._raw = [images.raw for images in kept]
        self._labels = [kept[0].labels, torch.from_numpy(labels[kept[1].index.numpy()])]
        check_labels(*self._labels)

    def baselines(self, fresh: Encoder) -> dict[str, float]:
        """Top-1 accuracies of a randomly initialized encoder and of raw pixels."""
        pixels = (
            Features(raw_pixels(self._preprocess.normalize(raw)), labels, torch.arange(len(labels)))
            for raw, labels in zip(self._raw, self._labels, strict=True)
        )
        return {"knn_random_init": self(fresh), "knn_raw_pixels": knn(*pixels, device=self._device)["top1"]}

    def __call__(self, encoder: Encoder) -> float:
        """Top-1 accuracy of an encoder, 0 to 1; its mode is restored afterwards."""
        with evaluating(encoder):
            xs = [self._features(encoder, raw) for raw in self._raw]
        train, test = (Features(x, y, torch.arange(len(y))) for x, y in zip(xs, self._labels, strict=True))
        return knn(train, test, device=self._device)["top1"]

    def _features(self, encoder: Encoder, raw: Tensor) -> Tensor:
        """[n, C, H, W], 0..255 -> [n, D] float32 on the CPU."""
        batches = (self._preprocess.normalize(part.to(self._device)) for part in raw.split(self._batch_size))
        return torch.cat([encoder.pool(encoder(images)).float().cpu() for images in batches])
