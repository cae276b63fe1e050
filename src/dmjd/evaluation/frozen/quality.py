"""Measures of an encoder's features without labels, as a run logs them while it trains.

Shapes: n images, D width of a feature.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dmjd.data.cache import first_of_parts
from dmjd.data.eval_loader import read_all
from dmjd.data.sources.base import Source
from dmjd.encoders.base import Encoder
from dmjd.evaluation.frozen.drift import shared_neighbors
from dmjd.images.preprocess import Preprocess
from dmjd.nn.modes import evaluating

NUM_IMAGES = 512  # of the set whose features are measured

LEAST_IMAGES = 3  # fewer have neither neighbors nor a spectrum

_MAX_BYTES = 1 << 28  # of the images kept in main memory

_BATCH_SIZE = 64

_FIRST_RANK = 4  # of the power law, counted from 0: the few largest eigenvalues do not follow it


def effective_rank(x: Tensor) -> float:
    """Effective rank of features, 1 to min(n, D): the number of directions that they use.

    The exponential of the entropy of the singular values of the features less their mean. RankMe (Garrido et al., 2023)
    does not subtract the mean, which for pooled features of masked autoencoders is nearly all there is.

    Args:
        x: [n, D].
    """
    singular = _eigenvalues(x).sqrt()
    share = singular / singular.sum().clamp_min(torch.finfo(singular.dtype).tiny)
    return float(torch.special.entr(share).sum().exp())


def feature_std(x: Tensor) -> float:
    """Mean standard deviation over the images of the dimensions of unit-length features, times the root of D.

    About 1 if the features of different images have nothing in common, 0 if all images have the same feature.

    Args:
        x: [n, D].
    """
    return float(F.normalize(x.double(), dim=1).std(dim=0).mean() * x.shape[1] ** 0.5)


def alpha_req(x: Tensor) -> float:
    """Exponent of the power law of the eigenvalues of the covariance of features (Agrawal et al., 2022).

    Eigenvalue i falls like i ** -alpha: a large alpha means few directions, a small one that all are alike.

    Args:
        x: [n, D]; not a number if there are too few images or dimensions.
    """
    values = _eigenvalues(x)
    values = values[values > values[0] * 1e-10][_FIRST_RANK : max(_FIRST_RANK, min(x.shape) // 2)]
    if len(values) < 2:
        return float("nan")
    log_rank = torch.arange(_FIRST_RANK + 1, _FIRST_RANK + 1 + len(values), dtype=values.dtype).log()
    centered = log_rank - log_rank.mean()
    return float(-(centered * values.log()).sum() / centered.square().sum())


def _eigenvalues(x: Tensor) -> Tensor:
    """Eigenvalues of the covariance of features [n, D], descending, [min(n, D)] float64."""
    centered = x.double() - x.double().mean(dim=0)
    gram = centered.T @ centered if len(x) > x.shape[1] else centered @ centered.T
    return torch.linalg.eigvalsh(gram / len(x)).flip(0).clamp_min(0)


class FeatureQuality:
    """Measures of the pooled features of up to 512 images of a set, without labels.

    The images are read by :meth:`read`, or when they are first needed, and kept in main memory; fewer if they are
    large, to stay below 256 MiB.

    Args:
        source: images of the run, evenly sampled.
        preprocess: preprocessing of the encoder.
        device: device that the encoder runs on.

    Attributes:
        num_images: images used.

    Raises:
        ValueError: if there are too few images.
    """

    def __init__(self, source: Source, preprocess: Preprocess, device: torch.device | str = "cpu") -> None:
        if len(source) < LEAST_IMAGES:
            raise ValueError(f"{len(source)} image(s) are too few to measure features: {LEAST_IMAGES} are needed")
        self._source, self._preprocess, self._device = source, preprocess, device
        height, width = preprocess.img_size
        fitting = max(LEAST_IMAGES, _MAX_BYTES // (height * width * preprocess.in_chans))
        self._rows = first_of_parts(len(source), min(NUM_IMAGES, fitting))
        self.num_images = len(self._rows)
        self._raw: Tensor | None = None
        self._last: Tensor | None = None  # features of the last measurement

    def read(self) -> Tensor:
        """The images, [n, C, H, W] on the 0..255 scale; ValueError if none can be read."""
        if self._raw is None:
            self._raw = read_all(self._source, self._preprocess, self._rows).raw
        return self._raw

    def __call__(self, encoder: Encoder) -> dict[str, float]:
        """Measure; the mode of the encoder is restored afterwards.

        Returns:
            "effective_rank", "feature_std" and "alpha_req" of the functions of these names, and "neighbors_kept": the
            fraction of the 10 nearest neighbors of an image that are those of the last measurement. Measures that need
            more images, or a former measurement, are left out.
        """
        with evaluating(encoder):
            batches = (self._preprocess.normalize(part.to(self._device)) for part in self.read().split(_BATCH_SIZE))
            features = torch.cat([encoder.encode(images).float().cpu() for images in batches])
        return self.of_features(features)

    def of_features(self, features: Tensor) -> dict[str, float]:
        """The measures of features [n, D] float32 of the images."""
        measures = {f.__name__: f(features) for f in (effective_rank, feature_std, alpha_req)}
        measures = {name: value for name, value in measures.items() if value == value}
        if self._last is not None:
            measures["neighbors_kept"] = shared_neighbors(features, self._last)
        self._last = features
        return measures
