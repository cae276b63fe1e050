"""A folder of images, flat or nested. It is walked once; a run keeps the sorted list."""

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np

from dmjd.checked_json import read_json
from dmjd.data.sources.base import SourceOptions
from dmjd.data.sources.dicom_files import with_frames
from dmjd.data.sources.listed import ListedSource
from dmjd.data.sources.paths import (
    EXTENSIONS,
    SHARDS,
    SPLIT_NAMES,
    existing_path,
    expanded,
    folders_to_test,
    one_line,
    permission_checked,
    split_folder,
    warn_of_loose_images,
    without_masks,
)
from dmjd.files import write_text
from dmjd.images.dicom import frame_of, may_be_dicom
from dmjd.images.reading import OpenImage, open_image
from dmjd.text import printable


class FolderSource(ListedSource):
    """The images below a folder, in the sorted order of their relative paths.

    Args:
        root: the folder. Hidden files and folders, files of unknown extensions, and masks (see
            :func:`~dmjd.data.sources.paths.without_masks`) are left out.
        with_labels: use the first folder below the root as the class.
        in_chans, value_range: see :func:`~dmjd.images.reading.read_image`.
        listing: file that may hold the sorted list (see :meth:`save_listing`). If it exists, the folder is not
            walked, so that a resumed run sees the images it started with.
        extensions: file extensions of images.

    Raises:
        ValueError: if the folder has no images or cannot be read, or an image is not in a class folder.
    """

    kind = "a folder of images"
    label_option: ClassVar[str | None] = "folder"
    may_grow: ClassVar[bool] = True
    removable = True

    def __init__(
        self,
        root: Path,
        with_labels: bool = False,
        in_chans: int = 3,
        value_range: tuple[float, float] | None = None,
        listing: Path | None = None,
        extensions: tuple[str, ...] = EXTENSIONS,
    ) -> None:
        self.name = str(root)
        self.in_chans, self.value_range = in_chans, value_range
        listed = read_listing(listing) if listing is not None else None
        self._extensions = extensions
        paths = images_below(root, extensions) if listed is None else listed.paths
        if not paths:
            deeper = (
                f"; the shards below are given by a pattern, '{printable(root)}/**/*.tar'" if walk(root, SHARDS) else ""
            )
            known = " ".join(extensions)
            raise ValueError(f"no images found in {printable(root)}; known extensions: {known}{deeper}")
        self._take(root, paths, with_labels, listed)
        self.listing = listing if listed is not None else None

    def _take(self, root: Path, paths: "list[str] | Strings", with_labels: bool, listed: "Listing | None") -> None:
        """Take the images of these paths below a folder; ``listed`` holds them if they come from a run's list."""
        self.root, self._folder = root, str(root)
        self._paths = paths if isinstance(paths, Strings) else Strings(map(os.fsencode, paths))
        self._listed_sizes = listed.sizes if listed is not None else None
        self.classes: list[str] = []
        if with_labels:
            self.labels, self.classes = labels_of_folders(str(root), self._listed())

    @classmethod
    def matches(cls, data: str, split: str) -> bool:
        """Whether this folder exists and has the split."""
        path = existing_path(data)
        return path is not None and split_folder(path, split) is not None

    @classmethod
    def from_data(cls, data: str, options: SourceOptions) -> "FolderSource":
        """Open a split of the folder ``data``."""
        root = expanded(data)
        found = split_folder(root, options.split)
        assert found is not None, "see matches"
        taken, folder = found
        if folder != root and options.listing is not None and (listed := read_listing(options.listing)):
            # Folders such as Train/ and Test/ were no splits in version 0.1: runs began with all of their images.
            in_root, in_folder = ((base / listed.paths[0]).exists() for base in (root, folder))
            folder = root if in_root and not in_folder else folder
        warn_of_loose_images(root)
        source = cls(folder, options.with_labels, options.in_chans, options.value_range, options.listing)
        source.split = taken
        return source

    def __len__(self) -> int:
        return len(self._paths)

    def stored(self, index: int) -> Path:
        """The image's path."""
        return self.root / self._paths[index]

    def save_listing(self, file: Path) -> None:
        """Write the sorted list of paths, and the sizes in the fingerprint, unless they were read from there."""
        if self._listed_sizes is None:
            self._listed_sizes = list(self._sizes())
            write_text(
                file, json.dumps({"paths": self._listed(), "sizes": self._listed_sizes} | self._place(), indent=0)
            )

    def _listed(self) -> list[str]:
        return [self._paths[i] for i in range(len(self))]

    def _place(self) -> dict[str, str]:
        """What a list of a run says about the folder, besides the configuration; see :class:`Listing`."""
        return {}

    def describe(self, index: int) -> str:
        """The image's path; bytes that are not UTF-8, and control characters, are escaped."""
        return one_line(self._path(index))

    def open(self, index: int) -> OpenImage:
        """See :meth:`Source.open`. Avoids pathlib, which takes as long as opening the file."""
        return self.open_path(self._path(index))

    def open_path(self, path: str) -> OpenImage:
        """:meth:`open` for an image by its path, such as one that has joined the set."""
        return open_image(path, self.in_chans, self.value_range, one_line(path), self.invalid)

    def present(self) -> tuple[str, list[str]]:
        """The images that are there now: a folder for :meth:`folder_of`, and their paths below it.

        A test/ or val/ that came later, with a train/, is left out.

        Raises:
            ValueError: if the folder cannot be read.
        """
        others = tuple(os.path.join(os.path.relpath(folder, self.root), "") for folder in folders_to_test(self.root))
        paths = images_below(self.root, self._extensions)
        return ".", [path for path in paths if not path.startswith(others)] if others else paths

    def known(self, folder: str) -> set[str]:
        """The paths of the images of this set, relative to a folder that :meth:`present` named."""
        if os.path.normpath(self.folder_of(folder)) == os.path.normpath(self._folder):
            return set(self._listed())
        below = self.folder_of(folder)
        return {os.path.relpath(self._path(i), below) for i in range(len(self))}

    def identity(self, folder: str, path: str) -> str:
        """What an image is known by: its file, below a folder. A file that is replaced has no new images."""
        return without_frame(folder, path)[0]

    def folder_of(self, root: str) -> str:
        """The path of a folder that a run's record of joined images names."""
        return os.path.normpath(os.path.join(self._folder, root))

    def _path(self, index: int) -> str:
        return os.path.join(self._folder, self._paths[index])

    def _name_of(self, index: int) -> str:
        return self._paths[index]

    def _sizes(self) -> Iterable[int]:
        """Bytes of the sampled files; -1 for one that is missing."""
        for index in self._sampled():
            try:
                yield os.stat(frame_of(self._path(index))[0]).st_size
            except OSError:
                yield -1


class Strings:
    """Strings in two buffers, which worker processes share instead of copying a million objects.

    Args:
        encoded: the strings, by ``os.fsencode``.
    """

    def __init__(self, encoded: Iterable[bytes]) -> None:
        parts = list(encoded)
        self._ends = np.cumsum([0, *map(len, parts)])
        self._bytes = b"".join(parts)

    @classmethod
    def of_arrow(cls, array: Any) -> "Strings":
        """The values of a ``pyarrow.LargeBinaryArray``."""
        strings = cls(())
        _, offsets, data = array.buffers()
        ends = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
        strings._ends = ends - ends[0]
        strings._bytes = data[int(ends[0]) : int(ends[-1])].to_pybytes() if data is not None else b""
        return strings

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return os.fsdecode(self._bytes[self._ends[index] : self._ends[index + 1]])


def images_below(root: Path, extensions: tuple[str, ...] = EXTENSIONS) -> list[str]:
    """Sorted relative paths of the images below a folder, without masks; with :data:`EXTENSIONS` DICOM files too.

    Raises:
        ValueError: if a folder cannot be read, or all images are DICOM files and pydicom is missing.
    """
    paths = without_masks(root, walk(root, extensions))
    return with_frames(root, paths) if extensions == EXTENSIONS else paths


def without_frame(folder: str, path: str) -> tuple[str, int]:
    """A path below a folder without the number of the frame that it names, and this number, or 1."""
    if "#" not in path:
        return path, 1
    whole = os.path.join(folder, path)
    file, frame = frame_of(whole)
    return path.removesuffix(whole[len(file) :]), frame


def walk(root: Path, extensions: tuple[str, ...] = EXTENSIONS) -> list[str]:
    """Sorted relative paths, with "/", of the files below ``root`` that have one of the extensions.

    With :data:`EXTENSIONS`, names without one are listed too if they may be those of DICOM files.

    Links are followed; a folder that was already visited is not entered again. Links to nothing, and what is not a
    regular file, are listed too, and are unreadable images.

    Raises:
        ValueError: naming a folder that cannot be read.
    """

    def wanted(name: str) -> bool:
        return name.lower().endswith(extensions) or (extensions == EXTENSIONS and may_be_dicom(name))

    paths: list[str] = []
    seen: set[tuple[int, int]] = set()
    pending = [(str(root), "")]
    while pending:
        folder, prefix = pending.pop()
        with permission_checked(Path(folder)):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                visible = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
        folders = [entry for entry in visible if _is_folder(entry)]
        pending += [(entry.path, f"{prefix}{entry.name}/") for entry in reversed(folders)]  # in order from the end
        names = {entry.name for entry in folders}
        paths += [prefix + e.name for e in visible if e.name not in names and wanted(e.name)]
    return sorted(paths)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    with contextlib.suppress(OSError):  # a link to itself, or to a name that is too long
        return entry.is_dir()
    return False


class Listing(msgspec.Struct, forbid_unknown_fields=False):
    """The images that a run began with: relative paths, and the sizes in the fingerprint (since version 0.2).

    ``root`` is the folder that holds them, relative to the list of images that the run was given, if it was given one.
    """

    paths: list[str]
    sizes: list[int] | None = None
    root: str | None = None


def read_listing(file: Path) -> Listing | None:
    """The list of images of a run, or None if there is none.

    Raises:
        ValueError: if the file is damaged.
    """
    with contextlib.suppress(FileNotFoundError):
        name = f"{file} is not a list of images: delete it, and the folder is walked again"
        listing = read_json(file, Listing, name)
        if not listing.paths:
            raise ValueError(f"{name} (it is empty)")
        for path in listing.paths:
            if os.path.isabs(path) or ".." in path.split("/") or "\0" in path:
                raise ValueError(f"{name} (it holds {printable(path)}, which may lie outside of the folder)")
        return listing
    return None


def labels_of_folders(root: str, paths: list[str]) -> tuple[np.ndarray, list[str]]:
    """The first folders of the paths below a folder or address as labels: [n] int64, and the sorted class names.

    Raises:
        ValueError: if an image is in no such folder, or all of these are parts of a set.
    """
    loose = [path for path in paths if "/" not in path]
    if loose:
        first = printable(os.path.join(root, loose[0]))
        raise ValueError(
            f"{len(loose)} of {len(paths)} images lie in no class folder, {first} for one: "
            f"with labels 'folder', put each class in a folder below {printable(root)}; without classes, give labels "
            "'none'"
        )
    names = [path.split("/", 1)[0] for path in paths]
    classes, labels = np.unique(names, return_inverse=True)
    if all(str(name).lower() in SPLIT_NAMES for name in classes):
        parts = " and ".join(f"{name}/" for name in classes)
        raise ValueError(
            f"{printable(root)} holds only {parts}, which is a part of a set and not a class: "
            f"give {printable(os.path.join(root, str(classes[0])))} itself"
        )
    return labels.astype(np.int64), [str(name) for name in classes]
