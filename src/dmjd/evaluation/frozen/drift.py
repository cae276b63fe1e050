"""Drift: how far an encoder has moved from the weights that it started from, measured without labels."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dmjd.data.cache import first_of_parts
from dmjd.data.eval_loader import read_all
from dmjd.data.sources.base import Source
from dmjd.encoders.base import Encoder
from dmjd.files import read_safetensors, safetensors_bytes, write_bytes
from dmjd.images.preprocess import Preprocess
from dmjd.nn.modes import evaluating

NUM_IMAGES = 256  # enough for two digits, and a second or two per measurement on CPU

NEIGHBORS = 10

_BATCH_SIZE = 64

_MIN_IMAGES = 3  # fewer have no neighbors to compare


class Drift:
    """Compares pooled features of up to 256 training images with those of the starting weights.

    A forgetting encoder is seen while it happens: both measures are 1 at the start, and fall.

    Args:
        source: images of the run, evenly sampled; they are read by the constructor and kept in main memory.
        preprocess: preprocessing of the encoder.
        file: file of the starting features, which a resumed run needs: its starting weights are gone.
        encoder: the encoder with its starting weights; its features are written to ``file``. None: they are read.
        device: device that the encoder runs on.

    Raises:
        ValueError: if there are too few images, or the file cannot be read or belongs to other images.
    """

    def __init__(
        self,
        source: Source,
        preprocess: Preprocess,
        file: Path,
        encoder: Encoder | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if len(source) < _MIN_IMAGES:
            raise ValueError(f"{len(source)} image(s) are too few to measure drift: {_MIN_IMAGES} are needed")
        self._preprocess, self._device = preprocess, device
        rows = first_of_parts(len(source), min(NUM_IMAGES, len(source)))
        images = read_all(source, preprocess, rows)
        self._raw = images.raw
        if encoder is not None:
            self._start = self._features(encoder)
            write_bytes(file, safetensors_bytes({"features": self._start, "index": images.index}, {"kind": "drift"}))
            return
        tensors, _ = read_safetensors(file)
        if not torch.equal(tensors.get("index", torch.empty(0)), images.index):
            raise ValueError(f"{file} holds the features of other images than those that can be read now")
        self._start = tensors["features"]

    def __call__(self, encoder: Encoder) -> dict[str, float]:
        """Measure; the mode of the encoder is restored afterwards.

        Returns:
            "drift_cosine": mean cosine between the features of an image now and at the start, both less the mean
            feature at the start. "drift_neighbors": fraction of the 10 nearest neighbors of an image that are the same.
        """
        features, mean = self._features(encoder), self._start.mean(dim=0)
        cosine = F.cosine_similarity(features - mean, self._start - mean, dim=1).mean()
        return {"drift_cosine": float(cosine), "drift_neighbors": shared_neighbors(features, self._start)}

    def _features(self, encoder: Encoder) -> Tensor:
        """[n, D] float32 on the CPU."""
        with evaluating(encoder):
            batches = (self._preprocess.normalize(part.to(self._device)) for part in self._raw.split(_BATCH_SIZE))
            return torch.cat([encoder.encode(images).float().cpu() for images in batches])


def shared_neighbors(a: Tensor, b: Tensor, k: int = NEIGHBORS) -> float:
    """Fraction of the k nearest neighbors of each image, by centered cosine similarity, that two encoders share.

    Args:
        a, b: features [n, D] and [n, E] of the same images, n > 2.
        k: number of neighbors; at most half of the other images.
    """
    k = max(1, min(k, (len(a) - 1) // 2))
    neighbors = []
    for features in (a, b):
        unit = F.normalize(features - features.mean(dim=0), dim=1)
        similarity = (unit @ unit.T).fill_diagonal_(-torch.inf)  # n, n
        neighbors.append(similarity.topk(k, dim=1).indices)
    shared = (neighbors[0].unsqueeze(2) == neighbors[1].unsqueeze(1)).any(dim=2)  # n, k
    return float(shared.float().mean())
