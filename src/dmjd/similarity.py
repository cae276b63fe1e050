"""Similar images in a set of features: near duplicates and nearest neighbors. Exact, and computed block by block.

The measure is the centered cosine: that of two features less the mean feature of the set. The mean is far from zero, so
that without this the cosine of any two images is close to 1.

Shapes: n images, D width of a feature, b rows of a block, c columns of a block.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dmjd.config.checks import Bounds, check_float, check_int
from dmjd.config.fields import NEAR_DUPLICATE
from dmjd.engine.console import tracked

_ROWS = {"cpu": 1024}  # of a block; more on a GPU

_ROWS_ELSEWHERE = 4096

_AT_ONCE = 1 << 24  # similarities: 64 MiB

_ROUNDING = 1e-6  # of a cosine in float32: equal images must be near duplicates at a threshold of 1

_AT_MEAN = 1e-5  # length, relative to the feature's, from which on a centered feature has a direction


def check_threshold(name: str, value: float) -> float:
    """A centered cosine from which on images count as near duplicates; ValueError unless it lies between 0 and 1."""
    return check_float(name, value, Bounds(gt=0, le=1))


def centered(features: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Unit vectors whose products are the centered cosines.

    Features at the mean itself have no direction. They are equal to each other, and unlike any other: they get a
    dimension of their own.

    Args:
        features: [n, D] of any floating-point type.
        device: device of the result.

    Returns:
        [n, D] or [n, D + 1] float32.

    Raises:
        ValueError: for fewer than two features, or values that are not finite.
    """
    if features.dim() != 2 or len(features) < 2:
        raise ValueError(f"features must be [n, D] of at least two images, got {list(features.shape)}")
    x = features.to(device, torch.float32)
    if not bool(x.isfinite().all()):
        row = int((~x.isfinite()).any(dim=1).nonzero()[0])
        raise ValueError(
            f"features must be finite; those of row {row} are not: the encoder's weights may have diverged"
        )
    mean = x.mean(dim=0, dtype=torch.float64 if x.device.type != "mps" else torch.float32).float()
    difference = x - mean
    at_mean = difference.norm(dim=1) <= _AT_MEAN * x.norm(dim=1)  # rounding errors are no direction
    unit = F.normalize(difference, dim=1)
    if not bool(at_mean.any()):
        return unit
    unit[at_mean] = 0
    return torch.cat([unit, at_mean.float().unsqueeze(1)], dim=1)


def near_duplicates(features: Tensor, threshold: float = NEAR_DUPLICATE, device: torch.device | str = "cpu") -> Tensor:
    """For each image the first earlier image that it is a near duplicate of.

    Images are kept or left out in order: one is left out if its centered cosine with an earlier, kept one is at least
    the threshold. So no two kept images are near duplicates, and every other image is one of the kept image named here.

    Args:
        features: [n, D].
        threshold: smallest centered cosine of near duplicates, 0 to 1.
        device: device to compute on. Besides the features it holds 64 MiB.

    Returns:
        [n] int64 on the CPU: the row of the kept image, -1 for a kept image.

    Raises:
        ValueError: see :func:`centered`.
    """
    threshold = check_threshold("threshold", threshold) - _ROUNDING
    unit = centered(features, device)
    first = torch.full((len(unit),), -1, device=unit.device)
    rows = _rows(unit)
    for start in tracked(range(0, len(unit), rows), "near duplicates", len(unit), lambda _: rows):
        block = unit[start : start + rows]
        found = _in_earlier_blocks(block, unit[:start], first[:start], threshold)
        first[start : start + rows] = _within_block(block, found, threshold, start)
    return first.cpu()


def _in_earlier_blocks(block: Tensor, earlier: Tensor, first: Tensor, threshold: float) -> Tensor:
    """The first kept row of ``earlier`` that is a near duplicate, for each row of a block: [b] int64; -1: none."""
    found = torch.full((len(block),), -1, device=block.device)
    columns = max(1, _AT_ONCE // len(block))
    for start in range(0, len(earlier), columns):
        cosine = block @ earlier[start : start + columns].T  # b, c
        if float(cosine.max()) < threshold:
            continue
        similar = (cosine >= threshold) & (first[start : start + columns] < 0)
        new = similar.any(dim=1) & (found < 0)
        found[new] = start + similar[new].int().argmax(dim=1)
    return found


def _within_block(block: Tensor, found: Tensor, threshold: float, start: int) -> Tensor:
    """Complete what was found in earlier blocks by near duplicates within a block, whose first row is ``start``."""
    similar = ((block @ block.T) >= threshold).tril(-1)  # b, b; the columns of a row are earlier images
    similar &= (found < 0).unsqueeze(0)
    pending = similar.any(dim=1) & (found < 0)
    first, similar = found.cpu(), similar.cpu()
    for row in pending.nonzero().flatten().tolist():
        kept = similar[row] & (first < 0)
        if bool(kept.any()):
            first[row] = start + int(kept.int().argmax())
    return first.to(block.device)


def nearest_neighbors(features: Tensor, count: int = 1, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """The most similar other images of each image.

    Args:
        features: [n, D].
        count: number of neighbors, less than n.
        device: device to compute on. Besides the features it holds 64 MiB.

    Returns:
        Centered cosines [n, count] float32, descending, and rows [n, count] int64, on the CPU.

    Raises:
        ValueError: see :func:`centered`; and if there are too few images.
    """
    check_int("num_neighbors", count, Bounds(ge=1))
    if len(features) > 1 and count >= len(features):
        raise ValueError(f"num_neighbors must be less than the number of images, {len(features)}, got {count}")
    unit = centered(features, device)
    rows, best = _rows(unit), []
    for start in tracked(range(0, len(unit), rows), "nearest neighbors", len(unit), lambda _: rows):
        best.append(_nearest(unit[start : start + rows], unit, start, count))
    cosines, index = (torch.cat(parts) for parts in zip(*best, strict=True))
    return cosines, index


def _nearest(block: Tensor, unit: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Cosines and rows [b, count] of the nearest neighbors of a block, whose first row is ``first``."""
    values = block.new_full((len(block), count), -torch.inf)
    index = torch.zeros(len(block), count, dtype=torch.int64, device=block.device)
    columns = max(1, _AT_ONCE // len(block))
    for start in range(0, len(unit), columns):
        cosine = block @ unit[start : start + columns].T  # b, c
        own = torch.arange(len(block), device=block.device) + first - start
        inside = (own >= 0) & (own < cosine.shape[1])
        cosine[inside.nonzero().flatten(), own[inside]] = -torch.inf
        new, at = cosine.max(dim=1, keepdim=True) if count == 1 else cosine.topk(min(count, cosine.shape[1]), dim=1)
        values, order = torch.cat([values, new], dim=1).topk(count, dim=1)
        index = torch.cat([index, at + start], dim=1).gather(1, order)
    return values.cpu(), index.cpu()


def _rows(unit: Tensor) -> int:
    return _ROWS.get(unit.device.type, _ROWS_ELSEWHERE)
