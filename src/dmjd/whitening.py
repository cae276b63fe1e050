"""Half whitening of features, so that no few directions decide which images are similar.

Shapes: n images, D width of a feature.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from dmjd.data.cache import first_of_parts

MOST_ROWS = 10_000  # features that the covariance is estimated from, evenly spaced over the set

_EXPONENT = -0.25  # of the covariance; -0.5 would be whitening

_LEAST = 1e-6  # of the largest variance: directions below it count as if they had this much


@dataclass(frozen=True)
class HalfWhitening:
    """A linear map that brings the variances of all directions closer: each becomes its square root.

    The features of encoders trained by masked image modeling vary mostly along few directions, and these decide every
    distance. Whitening gives all directions the same variance, noise too; half whitening is the middle: features less
    their mean, times C^(-1/4), where C is their covariance. No labels are needed. C is estimated by Ledoit and Wolf
    (2004), which holds for fewer features than D, too.

    Attributes:
        mean: [D] float32.
        matrix: [D, D] float32, symmetric.
    """

    mean: Tensor
    matrix: Tensor

    @classmethod
    def fit(cls, features: Tensor) -> Self:
        """The map for a set of features: [n, D] of any floating-point type.

        Raises:
            ValueError: for fewer than two features, or values that are not finite.
        """
        if features.dim() != 2 or len(features) < 2 or not features.shape[1]:
            raise ValueError(f"features must be [n, D] of at least two images, got {list(features.shape)}")
        rows = first_of_parts(len(features), MOST_ROWS)
        x = features.detach()[torch.from_numpy(rows).to(features.device)].cpu().double()
        if not bool(x.isfinite().all()):
            raise ValueError("features are not finite: the encoder's weights may have diverged")
        from sklearn.covariance import ledoit_wolf  # slow to import

        mean = x.mean(dim=0)
        variances, directions = torch.linalg.eigh(torch.from_numpy(ledoit_wolf((x - mean).numpy())[0]))
        largest = float(variances[-1])
        if largest <= 0:  # all features are equal
            return cls(mean.float(), torch.eye(len(mean), device="cpu"))
        scales = variances.clamp(min=_LEAST * largest).pow(_EXPONENT)
        return cls(mean.float(), (directions * scales @ directions.T).float())

    def __call__(self, features: Tensor) -> Tensor:
        """Features [n, D], of the same set or others -> [n, D] float32, on their device.

        Raises:
            ValueError: for another width.
        """
        if features.shape[-1] != len(self.mean):
            raise ValueError(f"features have {features.shape[-1]} values, those of the map {len(self.mean)}")
        return (features.float() - self.mean.to(features.device)) @ self.matrix.to(features.device)
