"""What a set of images is: formats, sizes, channels, unreadable and equal images, classes, and how fast it is read.

Of each image that is looked at, 41 bytes are kept.
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

_MOST_REASONS = 1000  # that are told apart

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


# How facts are kept: 41 bytes an image. Formats and channels are numbers of their texts.
_KEPT = np.dtype(
    [
        ("readable", "?"),
        ("format", "i4"),
        ("num_bytes", "i8"),
        ("height", "i4"),
        ("width", "i4"),
        ("channels", "i4"),
        ("digest", "u8"),
        ("invalid", "f8"),
    ]
)

_NAMED = 10  # unreadable images, and reasons


class Inspection:
    """Facts of the images of a set that were looked at.

    Args:
        source: the set.
        sample: images to look at, evenly spaced; 0: all.

    Attributes:
        indices: [m] int64 of the images that were looked at.
    """

    def __init__(self, source: Source, sample: int) -> None:
        self.source = source
        self.indices = evenly_spaced(len(source), sample or len(source))
        self._kept = np.zeros(len(self.indices), _KEPT)
        self._formats: dict[str, int] = {}
        self._channels: dict[str, int] = {}
        self._reasons = _Reasons()
        self._first: list[Report] = []

    def look(self) -> Iterator[int]:
        """Read the images in several threads; yields how many were read, again and again."""
        with ThreadPoolExecutor(available_cores()) as pool:
            rows = iter(enumerate(self.indices.tolist()))
            while block := list(islice(rows, _BLOCK)):
                indices = [index for _, index in block]
                self.source.prepare(indices)
                found = pool.map(lambda index: facts_of(self.source, index), indices)
                for (row, _), facts in zip(block, found, strict=True):
                    self.keep(row, facts)
                yield len(block)

    def keep(self, row: int, facts: ImageFacts | Report) -> None:
        """Keep what was found of the image ``indices[row]``."""
        if isinstance(facts, ImageFacts):
            kind = self._formats.setdefault(facts.format, len(self._formats))
            channels = self._channels.setdefault(facts.channels, len(self._channels))
            self._kept[row] = (True, kind, *facts[1:4], channels, *facts[5:])
            return
        if len(self._first) < _NAMED:
            self._first.append(facts)
        self._reasons.add(facts[1])

    @property
    def readable(self) -> np.ndarray:
        """[n] int64 of the images that can be read."""
        return self.indices[self._kept["readable"]]

    @property
    def sides(self) -> np.ndarray:
        """Height and width of each readable image: [n, 2] int64."""
        own = self._kept[self._kept["readable"]]
        return np.stack([own["height"], own["width"]], axis=1).astype(np.int64)

    def summary(self) -> dict[str, Any]:
        """The facts in numbers.

        Raises:
            ValueError: if no image is readable.
        """
        kept, sides = self._kept[self._kept["readable"]], self.sides
        if not len(kept):
            name, reason = self._first[0]
            raise ValueError(f"none of {len(self.indices)} images of {self.source.name} can be read; {name}: {reason}")
        weights, order = kept["num_bytes"], np.argsort(sides.prod(axis=1), kind="stable")
        return {
            "num_images": len(self.source),
            "looked_at": len(self.indices),
            "formats": _counted(self._formats, kept["format"]),
            "channels": _counted(self._channels, kept["channels"]),
            "bytes": {"median": int(np.median(weights)), "largest": int(weights.max()), "mean": float(weights.mean())},
            "sizes": {
                "smallest": sides[order[0]].tolist(),
                "median": np.median(sides, axis=0).astype(int).tolist(),
                "largest": sides[order[-1]].tolist(),
                "different": len(np.unique(sides[:, 0] << 32 | sides[:, 1])),
            },
            "unreadable": {
                "count": len(self.indices) - len(kept),
                "reasons": self._reasons.most(),
                "first": [list(report) for report in self._first],
            },
            "invalid": {"images": int((kept["invalid"] > 0).sum()), "share": float(kept["invalid"].mean())},
            "equal": self._equal(),
        }

    def _equal(self) -> dict[str, Any]:
        """The number of images that are stored with the same bytes as an earlier one, and the first of them."""
        digests, indices = self._kept["digest"][self._kept["readable"]], self.readable
        order = np.argsort(digests, kind="stable")  # equal ones in a row, the earliest first
        repeats = np.flatnonzero(digests[order][1:] == digests[order][:-1]) + 1
        later = np.sort(order[repeats])
        first = [[indices[np.argmax(digests == digests[row])], indices[row]] for row in later[:5]]
        return {"count": len(later), "first": [[self.source.describe(int(i)) for i in pair] for pair in first]}


def _counted(names: dict[str, int], numbers: np.ndarray) -> dict[str, int]:
    """How often each text occurs, the most frequent first."""
    counts = np.bincount(numbers, minlength=len(names)).tolist()
    return dict(Counter(dict(zip(names, counts, strict=True))).most_common())


class _Reasons:
    """Counts of reasons. Those that differ in numbers only are one, with "..." in place of the numbers."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, ...]] = Counter()  # by what lies between the numbers
        self._parts: dict[tuple[str, ...], list[str]] = {}

    def add(self, reason: str) -> None:
        """Count a reason. After the first thousand kinds, others are one."""
        parts = _NUMBER.split(reason)
        if tuple(parts[::2]) not in self._parts and len(self._parts) >= _MOST_REASONS:
            parts = ["other reasons"]
        key = tuple(parts[::2])
        known = self._parts.setdefault(key, parts)
        self._parts[key] = [one if one == other else "..." for one, other in zip(known, parts, strict=True)]
        self._counts[key] += 1

    def most(self) -> dict[str, int]:
        """The most frequent ones, in words."""
        return {"".join(self._parts[key]): count for key, count in self._counts.most_common(_NAMED)}


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
