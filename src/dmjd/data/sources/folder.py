"""A folder of images, flat or nested. It is walked once; a run keeps the sorted list."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from dmjd.checked_json import read_json
from dmjd.data.sources.base import Source, SourceOptions
from dmjd.data.sources.paths import EXTENSIONS, existing_path, split_folder, warn_of_loose_images
from dmjd.files import write_text
from dmjd.images.reading import OpenImage, open_image

_SIZES_IN_FINGERPRINT = 256


class FolderSource(Source):
    """The images below a folder, in the sorted order of their relative paths.

    Args:
        root: the folder. Hidden files and folders, and files of unknown extensions, are left out.
        with_labels: use the first folder below the root as the class.
        in_chans, value_range: see :func:`~dmjd.images.reading.read_image`.
        listing: file that may hold the sorted list (see :meth:`save_listing`). If it exists, the folder is not
            walked, so that a resumed run sees the images it started with.
        extensions: file extensions of images.

    Raises:
        ValueError: if the folder has no images or cannot be read, or an image is not in a class folder.
    """

    kind = "a folder of images"
    label_option = "folder"

    def __init__(
        self,
        root: Path,
        with_labels: bool = False,
        in_chans: int = 3,
        value_range: tuple[float, float] | None = None,
        listing: Path | None = None,
        extensions: tuple[str, ...] = EXTENSIONS,
    ) -> None:
        self.name, self.root = str(root), root
        self.in_chans, self.value_range = in_chans, value_range
        paths = _listed(root, listing, extensions)
        if not paths:
            raise ValueError(f"no images found in {root}; known extensions: {' '.join(extensions)}")
        self._paths = _Strings(paths)
        self.classes: list[str] = []
        if with_labels:
            self.labels, self.classes = _folder_labels(root, paths)

    @classmethod
    def matches(cls, data: str, split: str) -> bool:
        """Whether this folder exists and has the split."""
        path = existing_path(data)
        return path is not None and split_folder(path, split) is not None

    @classmethod
    def from_data(cls, data: str, options: SourceOptions) -> "FolderSource":
        """Open a split of the folder ``data``."""
        root = Path(data).expanduser()
        folder = split_folder(root, options.split)
        assert folder is not None, "see matches"
        warn_of_loose_images(root)
        return cls(folder, options.with_labels, options.in_chans, options.value_range, options.listing)

    def __len__(self) -> int:
        return len(self._paths)

    def stored(self, index: int) -> Path:
        """The image's path."""
        return self.root / self._paths[index]

    def save_listing(self, file: Path) -> None:
        """Write the sorted list of paths to a file, atomically, unless the file exists."""
        if file.exists():
            return
        write_text(file, json.dumps({"paths": [self._paths[i] for i in range(len(self))]}, indent=0))

    def describe(self, index: int) -> str:
        """The image's path; bytes that are not UTF-8 are escaped."""
        return os.fsencode(self._path(index)).decode("utf-8", "backslashreplace")

    def open(self, index: int) -> OpenImage:
        """See :meth:`Source.open`. Avoids pathlib, which takes as long as opening the file."""
        return open_image(self._path(index), self.in_chans, self.value_range, self.describe(index))

    def _path(self, index: int) -> str:
        return os.path.join(self.name, self._paths[index])

    def _identity(self) -> Iterable[str]:
        """All names, and the sizes of some files: reading all sizes would take minutes on a network drive."""
        yield from (self._paths[i] for i in range(len(self)))
        for index in np.linspace(0, len(self) - 1, min(len(self), _SIZES_IN_FINGERPRINT)).astype(int):
            path = self.stored(int(index))
            yield str(path.stat().st_size if path.exists() else -1)


class _Strings:
    """A list of strings in two buffers, which worker processes share instead of copying a million objects."""

    def __init__(self, strings: list[str]) -> None:
        encoded = [os.fsencode(s) for s in strings]
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._bytes = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return os.fsdecode(self._bytes[self._ends[index] : self._ends[index + 1]])


def walk(root: Path, extensions: tuple[str, ...] = EXTENSIONS) -> list[str]:
    """Sorted relative paths, with "/", of the files below ``root`` that have one of the extensions.

    Links are followed; a folder that was already visited is not entered again.

    Raises:
        ValueError: naming a folder that may not be read.
    """
    return sorted(_walk(str(root), "", extensions, set()))


def _walk(folder: str, prefix: str, extensions: tuple[str, ...], seen: set[tuple[int, int]]) -> Iterator[str]:
    try:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            visible = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    except PermissionError:
        raise ValueError(
            f"no permission to read the folder {folder}: change its permissions, or move it away"
        ) from None
    for entry in visible:
        if entry.is_dir():
            yield from _walk(entry.path, f"{prefix}{entry.name}/", extensions, seen)
        elif entry.name.lower().endswith(extensions) and entry.is_file():
            yield prefix + entry.name


def _listed(root: Path, listing: Path | None, extensions: tuple[str, ...]) -> list[str]:
    """The sorted paths: from the listing if it exists, else from a walk."""
    if listing is not None and listing.exists():
        try:
            return read_json(listing, dict[str, list[str]])["paths"]
        except (ValueError, KeyError):
            raise ValueError(f"{listing} is not a list of images: delete it, and the folder is walked again") from None
    return walk(root, extensions)


def _folder_labels(root: Path, paths: list[str]) -> tuple[np.ndarray, list[str]]:
    """[n] int64 and the sorted class names."""
    loose = [path for path in paths if "/" not in path]
    if loose:
        raise ValueError(
            f"{len(loose)} of {len(paths)} images lie in no class folder, {root / loose[0]} for one: "
            f"with labels 'folder', put each class in a folder below {root}"
        )
    names = [path.split("/", 1)[0] for path in paths]
    classes, labels = np.unique(names, return_inverse=True)
    return labels.astype(np.int64), [str(name) for name in classes]
