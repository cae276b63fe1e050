"""What a set of images is: formats, sizes, channels, unreadable and equal images, classes, and how fast it is read.

Only facts of each image that is looked at are kept: a few hundred bytes.
"""

import hashlib
import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dmjd.data.cache import evenly_spaced
from dmjd.data.sources.base import Source
from dmjd.data.sources.subset import SubsetSource
from dmjd.data.train_loader import TrainLoader
from dmjd.data.unreadable import Report
from dmjd.data.workers import available_cores
from dmjd.images.decoding import ImageLike, open_stored
from dmjd.images.dicom import frame_of
from dmjd.images.invalid import has_invalid
from dmjd.images.jpeg import PlainJpeg
from dmjd.images.stored import UnreadableImage
from dmjd.regular import check_regular

_BLOCK = 256  # images that are looked at between two reports of progress

_MEASURED = 1024  # images whose reading is timed

_SECONDS = 4.0  # of that

_BATCH = 32

_NUMBER = re.compile(r"((?<!\w)-?\d+(?:[.,]\d+)*(?:e[-+]?\d+)?(?!\w))")

# first bytes -> format
_SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG", "PNG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "BigTIFF"),
    (b"MM\0+", "BigTIFF"),
    (b"\x93NUMPY", "npy"),
)


class ImageFacts(NamedTuple):
    """What is known of a readable image.

    Attributes:
        format: e.g. "JPEG"; "array" if it is stored decoded.
        num_bytes: as stored. height, width: in pixels, upright.
        channels: as stored, e.g. "3 x uint8" or "3 + alpha x uint8".
        digest: 64 bits of a hash of what is stored.
        invalid: share of the values that are invalid.
    """

    format: str
    num_bytes: int
    height: int
    width: int
    channels: str
    digest: int
    invalid: float = 0.0


class Inspection:
    """Facts of the images of a set that were looked at.

    Args:
        source: the set.
        sample: images to look at, evenly spaced; 0: all.

    Attributes:
        indices: [m] int64 of the images that were looked at. facts: of the readable ones, by index.
        unreadable: index -> (name, reason).
    """

    def __init__(self, source: Source, sample: int) -> None:
        self.source = source
        self.indices = evenly_spaced(len(source), sample or len(source))
        self.facts: dict[int, ImageFacts] = {}
        self.unreadable: dict[int, Report] = {}

    def look(self) -> Iterator[int]:
        """Read the images in several threads; yields how many were read, again and again."""
        with ThreadPoolExecutor(available_cores()) as pool:
            numbers = iter(self.indices.tolist())
            while block := list(islice(numbers, _BLOCK)):
                self.source.prepare(block)
                for index, found in zip(block, pool.map(lambda i: facts_of(self.source, i), block), strict=True):
                    if isinstance(found, ImageFacts):
                        self.facts[index] = found
                    else:
                        self.unreadable[index] = found
                yield len(block)

    def summary(self) -> dict[str, Any]:
        """The facts in numbers.

        Raises:
            ValueError: if no image is readable.
        """
        if not self.facts:
            name, reason = next(iter(self.unreadable.values()))
            raise ValueError(f"none of {len(self.indices)} images of {self.source.name} can be read; {name}: {reason}")
        facts = list(self.facts.values())
        sides, weights = (np.array([f[k] for f in facts]) for k in (slice(2, 4), 1))
        order = np.argsort(sides.prod(axis=1), kind="stable")
        pairs = self._equal()
        return {
            "num_images": len(self.source),
            "looked_at": len(self.indices),
            "formats": dict(Counter(f.format for f in facts).most_common()),
            "channels": dict(Counter(f.channels for f in facts).most_common()),
            "bytes": {"median": int(np.median(weights)), "largest": int(weights.max()), "mean": float(weights.mean())},
            "sizes": {
                "smallest": sides[order[0]].tolist(),
                "median": np.median(sides, axis=0).astype(int).tolist(),
                "largest": sides[order[-1]].tolist(),
                "different": len(np.unique(sides, axis=0)),
            },
            "unreadable": {
                "count": len(self.unreadable),
                "reasons": _counted_reasons([reason for _, reason in self.unreadable.values()]),
                "first": [list(report) for report in list(self.unreadable.values())[:10]],
            },
            "invalid": {
                "images": sum(f.invalid > 0 for f in facts),
                "share": float(np.mean([f.invalid for f in facts])),
            },
            "equal": {
                "count": len(pairs),
                "first": [[self.source.describe(i) for i in pair] for pair in pairs[:5]],
            },
        }

    def _equal(self) -> list[tuple[int, int]]:
        """Each image that is stored with the same bytes as an earlier one, after that one."""
        first: dict[int, int] = {}
        found = []
        for index, facts in self.facts.items():
            earlier = first.setdefault(facts.digest, index)
            if earlier != index:
                found.append((earlier, index))
        return found


def _counted_reasons(reasons: list[str]) -> dict[str, int]:
    """The ten most frequent reasons. Those that differ in numbers only are one, with "..." in place of the numbers."""
    groups: dict[str, list[list[str]]] = {}
    for reason in reasons:
        groups.setdefault(_NUMBER.sub("", reason), []).append(_NUMBER.split(reason))
    most = sorted(groups.values(), key=len, reverse=True)[:10]
    return {
        "".join(one[0] if len(set(one)) == 1 else "..." for one in zip(*group, strict=True)): len(group)
        for group in most
    }


def facts_of(source: Source, index: int) -> ImageFacts | Report:
    """Decode an image as training does; its facts, or (name, reason) if it cannot be read."""
    try:
        stored = source.stored(index)
        data = _stored_bytes(stored)
        opened = source.open(index)
        pixels = opened.read()
        H, W = pixels.shape[:2]
        if isinstance(opened.stored, PlainJpeg):
            channels = f"{opened.stored.channels} x uint8"
        else:
            raw = open_stored(stored if data is None else data, source.in_chans)
            assert not isinstance(raw, PlainJpeg)
            bands = raw.values.shape[2] - raw.alpha
            channels = f"{bands}{' + alpha' * raw.alpha} x {raw.values.dtype}"
    except UnreadableImage as error:
        return source.describe(index), error.reason
    except OSError as error:
        return source.describe(index), error.strerror or str(error)
    content = np.asarray(stored).tobytes() if data is None else data
    frame = frame_of(stored)[1] if isinstance(stored, str | Path) else 1
    digest = int.from_bytes(hashlib.blake2b(content, digest_size=8, salt=b"%d" % frame).digest(), "big")
    invalid = float(np.isnan(pixels).mean()) if has_invalid(pixels) else 0.0
    return ImageFacts(_format_of(data), len(content), H, W, channels, digest, invalid)


def _stored_bytes(stored: ImageLike) -> bytes | None:
    """The encoded image; None for one that is stored decoded."""
    if isinstance(stored, bytes):
        return stored
    if isinstance(stored, str | Path):
        path = Path(frame_of(stored)[0])
        check_regular(path)
        return path.read_bytes()
    return None


def _format_of(data: bytes | None) -> str:
    if data is None:
        return "array"
    if data[128:132] == b"DICM":
        return "DICOM"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WebP"
    return next((name for start, name in _SIGNATURES if data.startswith(start)), "other")


def class_counts(parts: dict[str, Source]) -> dict[str, Any] | None:
    """Class -> images in each part, and the classes that a part lacks; None without labels."""
    counts: dict[str, dict[str, int]] = {}
    for split, source in parts.items():
        if source.labels is None:
            return None
        numbers = np.bincount(source.labels[source.labels >= 0], minlength=len(source.classes))
        for name, count in zip(source.classes, numbers.tolist(), strict=True):
            counts.setdefault(name, dict.fromkeys(parts, 0))[split] = count
    missing = {split: [name for name, own in counts.items() if not own[split]] for split in parts}
    return {"counts": counts, "missing": {split: names for split, names in missing.items() if names}}


def reading_speed(
    source: Source, img_size: tuple[int, int], crop_scale: tuple[float, float], num_workers: int | None, seed: int
) -> dict[str, Any]:
    """Images/s of the training loader on other images than were looked at, and minutes of an epoch.

    A set that is held in memory is read once; its later epochs take no reading.
    """
    n = len(source)
    rows = evenly_spaced(n, _MEASURED)
    if n > 2 * _MEASURED:
        rows = rows[:-1] + (rows[1:] - rows[:-1]) // 2
    part = SubsetSource(source, rows)
    started = time.perf_counter()
    loader = TrainLoader(
        part,
        img_size=img_size,
        batch_size=min(_BATCH, len(part)),
        seed=seed,
        num_workers=num_workers,
        crop_scale=crop_scale,
    )
    if loader.in_memory:
        rate = len(part) / (time.perf_counter() - started)
    else:
        rate = _rate(loader)
    in_memory = loader.in_memory
    return {"images_per_s": rate, "epoch_minutes": n / rate / 60, "in_memory": in_memory, "workers": loader.num_workers}


def _rate(loader: TrainLoader) -> float:
    """Images/s once the workers run, over at most four seconds or the whole part."""
    size = loader.stream.batch_size
    most = max(4, loader.stream.length // size)
    batches = loader.batches()
    try:
        for _ in range(max(1, loader.num_workers)):
            next(batches)
        started, count = time.perf_counter(), 0
        while count < most and time.perf_counter() - started < _SECONDS:
            next(batches)
            count += 1
        return count * size / (time.perf_counter() - started)
    finally:
        batches.close()
