"""Instance masks as COCO stores them: polygons or run lengths. They are checked before C code decodes them."""

import math
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from dmjd.images.stored import UnreadableImage

_MOST_DISTANT = 1e6  # pixels; farther coordinates overflow the decoder's integers

_LONGEST_EDGE = 5_000_000  # pixels along a polygon; the decoder takes about a hundred bytes for each


def mask_error(segmentation: Any, size: tuple[int, int]) -> str | None:
    """What is wrong with a COCO "segmentation" for an image of (height, width), or None if it can be decoded."""
    if isinstance(segmentation, dict):
        return _run_length_error(segmentation, size)
    try:
        polygons = msgspec.convert(segmentation, list[list[float]])
    except msgspec.ValidationError:
        return "it is neither a list of polygons nor run lengths"
    for polygon in polygons:
        # pycocotools takes four numbers for a box.
        if len(polygon) < 6 or len(polygon) % 2:
            return f"a polygon has {len(polygon)} numbers, not an even number from 6 on"
        # A sum is not finite if one of its terms is not; these checks of lists take less time than an array would.
        if not math.isfinite(sum(polygon)) or max(polygon) > _MOST_DISTANT or min(polygon) < -_MOST_DISTANT:
            return "a polygon has coordinates that are not finite or far outside of the image"
        if len(polygon) * (max(polygon) - min(polygon)) > _LONGEST_EDGE and _length(polygon) > _LONGEST_EDGE:
            return f"a polygon is longer than {_LONGEST_EDGE:,} pixels"
    return None if polygons else "it has no polygon"


def _length(polygon: list[float]) -> float:
    """The length along a polygon in pixels, with diagonal steps counted as one."""
    points = np.array(polygon).reshape(-1, 2)
    return float(np.abs(points - np.roll(points, 1, axis=0)).max(1).sum())


def _run_length_error(segmentation: dict[str, Any], size: tuple[int, int]) -> str | None:
    """What is wrong with run lengths {"size": [h, w], "counts": list or compressed text}."""
    given, counts = segmentation.get("size"), segmentation.get("counts")
    if given != list(size):
        return f"its run lengths are for the size {str(given)[:40]}, not {list(size)}"
    try:
        runs = _decompressed(counts) if isinstance(counts, str) else msgspec.convert(counts, list[int])
    except (msgspec.ValidationError, ValueError):
        return "its run lengths are damaged"
    if min(runs, default=0) < 0 or sum(runs) != size[0] * size[1]:
        return f"its run lengths are not those of {size[0]} x {size[1]} pixels"
    return None


def _decompressed(counts: str) -> list[int]:
    """The run lengths of COCO's compressed text: groups of five bits, and differences to the last but one run."""
    runs: list[int] = []
    value = shift = 0
    for byte in counts.encode("ascii"):
        group = byte - 48
        if not 0 <= group < 64 or shift > 30:
            raise ValueError("not a compressed run length")
        value |= (group & 0x1F) << shift
        shift += 5
        if not group & 0x20:
            if group & 0x10:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("cut short")
    return runs


def instance_mask(segmentation: Any, size: tuple[int, int], name: str) -> Tensor:
    """A COCO "segmentation" without :func:`mask_error` as [H, W] uint8 of 0 and 1.

    Raises:
        UnreadableImage: if it cannot be decoded.
    """
    from pycocotools import mask as coco_mask  # an extra

    try:
        if isinstance(segmentation, dict):
            segmentation = {"size": list(size), "counts": segmentation["counts"]}
            if isinstance(segmentation["counts"], list):
                segmentation = coco_mask.frPyObjects(segmentation, *size)
        if isinstance(segmentation, list):
            segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))
        mask = coco_mask.decode(segmentation)
    except Exception as error:  # the C library raises many types
        raise UnreadableImage(name, f"an object's mask can't be decoded ({str(error)[:100]})") from None
    return torch.from_numpy(np.ascontiguousarray(mask))
