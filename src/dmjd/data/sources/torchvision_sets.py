"""Sets that torchvision downloads, under short names."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dmjd.data.sources.base import Source, SourceOptions

# Name -> torchvision class, and the arguments of its training and test splits.
NAMED_SETS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "cifar10": ("CIFAR10", {"train": True}, {"train": False}),
    "cifar100": ("CIFAR100", {"train": True}, {"train": False}),
    "dtd": ("DTD", {"split": "train"}, {"split": "test"}),
    "fashion_mnist": ("FashionMNIST", {"train": True}, {"train": False}),
    "flowers102": ("Flowers102", {"split": "train"}, {"split": "test"}),
    "food101": ("Food101", {"split": "train"}, {"split": "test"}),
    "oxford_pets": ("OxfordIIITPet", {"split": "trainval"}, {"split": "test"}),
    "stl10": ("STL10", {"split": "train"}, {"split": "test"}),
    "svhn": ("SVHN", {"split": "train"}, {"split": "test"}),
}

_VAL: dict[str, dict[str, Any]] = {"dtd": {"split": "val"}, "flowers102": {"split": "val"}}  # published ones


class NamedSource(Source):
    """A torchvision set, downloaded to ``$XDG_CACHE_HOME/dmjd`` (default ``~/.cache/dmjd``) at first use; labeled.

    Raises:
        ValueError: if it cannot be downloaded.
    """

    names = tuple(NAMED_SETS)
    kind = "a set that torchvision downloads"

    def __init__(
        self, name: str, split: str = "train", in_chans: int = 3, value_range: tuple[float, float] | None = None
    ) -> None:
        self.name, self.split, self.in_chans, self.value_range = name, split, in_chans, value_range
        self._data = _download(name, split)
        self.labels = np.array(_targets(self._data), dtype=np.int64)
        named = getattr(self._data, "classes", None)
        self.classes = [str(c) for c in named] if named else [str(c) for c in range(self.labels.max() + 1)]

    @classmethod
    def matches(cls, data: str, split: str) -> bool:
        """Whether ``data`` is the name of a set that has this split."""
        return data in (_VAL if split == "val" else cls.names)

    @classmethod
    def from_data(cls, data: str, options: SourceOptions) -> "NamedSource":
        """Open a split of the set named ``data``."""
        return cls(data, options.split, options.in_chans, options.value_range)

    def __len__(self) -> int:
        return len(self._data)

    def stored(self, index: int) -> Image.Image:
        """The image as torchvision returns it."""
        return self._data[index][0]

    def describe(self, index: int) -> str:
        """Index, name and split."""
        return f"image {index} of {self.name} ({self.split})"

    def _identity(self) -> list[str]:
        return [self.name, self.split]


def _targets(data: Any) -> Any:
    """The labels, which torchvision's classes store under different names."""
    for field in ("targets", "labels", "_labels"):
        if hasattr(data, field):
            return getattr(data, field)
    return [data[i][1] for i in range(len(data))]


def _download(name: str, split: str) -> Any:
    import torchvision.datasets  # slow to import

    kind, train, test = NAMED_SETS[name]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dmjd" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        arguments = {"train": train, "test": test}[split] if split != "val" else _VAL[name]
        return getattr(torchvision.datasets, kind)(folder, download=True, **arguments)
    except Exception as error:  # network, disk or a damaged archive, each with types of its own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        own = f"write ./{name} for the folder {name}/ that lies here" if os.path.isdir(name) else ""
        raise ValueError(
            f"{name} can't be loaded from {folder} or downloaded ({reason}): "
            f"{own or 'check the network, or give --data a folder or a .parquet file'}"
        ) from None
