"""The built-in set: real handwritten digits in random colors, sizes and positions on colored gradients, 32 x 32.

The 8 x 8 originals are scikit-learn's (UCI Optical Recognition of Handwritten Digits, Alpaydin and Kaynak 1998).
Nearest neighbors of raw pixels reach 98 % on the originals, which leaves no room for learned features. On the
renderings they fail.
"""

import functools

import numpy as np
import torch

from dmjd.data.sources.base import Source, SourceOptions
from dmjd.images.reading import LUMINANCE
from dmjd.images.resampling import resample

SIZE = 32

_RENDERING = 1  # version; increased when the images change

_NUM_TRAIN_ORIGINALS = 1400  # the set is ordered by writer, so the other 397 are by other writers

_COUNTS = {"train": 12_000, "test": 2_000}

_TALLEST, _SHORTEST = 30, 22

_MIN_CONTRAST = 70.0  # of 255, in luminance, between a digit and the background behind it

_LUMINANCE = np.array(LUMINANCE, np.float32)


class DigitsSource(Source):
    """12,000 training or 2,000 test renderings, labeled with their digit.

    Args:
        split: "train" or "test".
        in_chans: see :func:`~dmjd.images.reading.read_image`.
    """

    name = "digits"
    names = ("digits",)
    kind = "the built-in set"

    def __init__(self, split: str = "train", in_chans: int = 3) -> None:
        self.split = split
        self.in_chans = in_chans
        self.classes = [str(digit) for digit in range(10)]
        self._images, self.labels = render(split)

    @classmethod
    def from_data(cls, data: str, options: SourceOptions) -> "DigitsSource":
        """Open a split of the digits."""
        return cls(options.split, options.in_chans)

    def __len__(self) -> int:
        return _COUNTS[self.split]

    def stored(self, index: int) -> np.ndarray:
        """[32, 32, 3] uint8."""
        return self._images[index]

    def describe(self, index: int) -> str:
        """Index and split."""
        return f"rendering {index} of digits ({self.split})"

    def _identity(self) -> list[str]:
        return ["digits", self.split, str(_RENDERING)]


@functools.lru_cache(maxsize=2)
def render(split: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Render a split.

    Args:
        split: "train" or "test".
        seed: seed of all random choices; the same seed gives the same images on every machine.

    Returns:
        [n, 32, 32, 3] uint8 images and [n] int64 labels.
    """
    from sklearn.datasets import load_digits  # slow to import

    originals = load_digits()
    part = slice(None, _NUM_TRAIN_ORIGINALS) if split == "train" else slice(_NUM_TRAIN_ORIGINALS, None)
    strokes, digits = originals.images[part].astype(np.float32) / 16, originals.target[part].astype(np.int64)
    rng = np.random.default_rng([seed, len(strokes)])
    pick = rng.integers(len(strokes), size=_COUNTS[split])
    ink = _enlarge(strokes[pick], rng)[..., None]  # n, 32, 32, 1 in 0..1
    background = _gradients(len(pick), rng)  # n, 32, 32, 3
    color = _visible_colors(background.mean((1, 2)), rng)[:, None, None]  # n, 1, 1, 3
    images = background + ink * (color - background)
    return np.rint(images).clip(0, 255).astype(np.uint8), digits[pick]


def _enlarge(strokes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[n, 8, 8] -> [n, 32, 32] in 0..1: each digit 22 to 30 pixels tall, at a random position."""
    n = len(strokes)
    side = rng.integers(_SHORTEST, _TALLEST + 1, n)
    top, left = (rng.integers(0, SIZE - side + 1) for _ in range(2))
    zoom = 8 / side
    padded = torch.from_numpy(np.pad(strokes, ((0, 0), (8, 8), (8, 8))))[:, None] * 255  # n, 1, 24, 24
    boxes = np.stack([8 - top * zoom, 8 - left * zoom, SIZE * zoom, SIZE * zoom], axis=1)
    ink = resample(padded, torch.from_numpy(boxes), (SIZE, SIZE))[:, 0]
    return (ink / 255).clamp(0, 1).numpy()


def _gradients(n: int, rng: np.random.Generator) -> np.ndarray:
    """[n, 32, 32, 3] in 0..255: linear in a random direction between two random colors."""
    angle = rng.uniform(0, 2 * np.pi, (n, 1, 1)).astype(np.float32)
    axis = np.linspace(-1, 1, SIZE, dtype=np.float32)
    along = axis[:, None] * np.sin(angle) + axis * np.cos(angle)  # n, 32, 32
    share = (along / np.abs(along).max((1, 2), keepdims=True) + 1)[..., None] / 2
    start, end = rng.uniform(0, 255, (2, n, 1, 1, 3)).astype(np.float32)
    return start + share * (end - start)


def _visible_colors(behind: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[n, 3] uniform colors, redrawn until each differs enough in luminance from the mean color behind it."""
    colors = rng.uniform(0, 255, behind.shape).astype(np.float32)
    while len(faint := np.flatnonzero(np.abs((colors - behind) @ _LUMINANCE) < _MIN_CONTRAST)):
        colors[faint] = rng.uniform(0, 255, (len(faint), 3))
    return colors
