"""A list of images: a text file with one path a line. It is read once; a run keeps the list it began with."""

import codecs
import os
from pathlib import Path

from dmjd.data.sources.base import SourceOptions
from dmjd.data.sources.folder import FolderSource, read_listing
from dmjd.data.sources.paths import existing_path, expanded, permission_checked
from dmjd.text import printable

ENDING = ".txt"

_NAMED = 3  # missing files in a message


class ListSource(FolderSource):
    """The images of a list, in its order.

    Args:
        file: the list; see :func:`read_list`.
        with_labels: use the first folder below the folder that holds all images as the class.
        in_chans, value_range: see :func:`~dmjd.images.reading.read_image`.
        listing: file that may hold the images a run began with (see :meth:`save_listing`). If it exists, the list is
            read only to find the folder, if at all, so that a resumed run sees the images it started with.

    Raises:
        ValueError: if the list is empty or cannot be read, names files that do not exist, or names a file twice.
    """

    kind = "a list of images"

    def __init__(
        self,
        file: Path,
        with_labels: bool = False,
        in_chans: int = 3,
        value_range: tuple[float, float] | None = None,
        listing: Path | None = None,
    ) -> None:
        self.name, self._list_folder = str(file), os.path.realpath(file.parent)
        self.in_chans, self.value_range = in_chans, value_range
        listed = read_listing(listing) if listing is not None else None
        if listed is not None and listed.root is not None:
            root, relative = os.path.normpath(os.path.join(self._list_folder, listed.root)), listed.paths
        else:  # without a root, the run began with the folder itself
            paths = read_list(file)
            root = os.path.commonpath([os.path.dirname(path) for path in paths])
            relative = [os.path.relpath(path, root) for path in paths] if listed is None else listed.paths
        self._take(Path(root), relative, with_labels, listed)
        self.listing = listing if listed is not None else None

    @classmethod
    def matches(cls, data: str, split: str) -> bool:
        """Whether ``data`` is a list; its images are training images."""
        path = existing_path(data)
        return path is not None and path.is_file() and path.suffix.lower() == ENDING and split == "train"

    @classmethod
    def from_data(cls, data: str, options: SourceOptions) -> "ListSource":
        """Open the list ``data``."""
        return cls(expanded(data), options.with_labels, options.in_chans, options.value_range, options.listing)

    def _place(self) -> dict[str, str]:
        """See :class:`FolderSource`."""
        return {"root": os.path.relpath(self.root, self._list_folder)}


def read_list(file: Path) -> list[str]:
    """Absolute paths of the images in a list: one path a line, relative to the folder of the list, or absolute.

    Empty lines are skipped. Names may hold anything but line breaks, in any encoding.

    Raises:
        ValueError: if the list is empty, cannot be read, names files that do not exist, or names a file twice.
    """
    with permission_checked(file):
        content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    if b"\0" in content:
        raise ValueError(f"{printable(file)} is no list of images: it holds null characters")
    lines = [line.removesuffix("\r") for line in os.fsdecode(content).split("\n")]
    folder, first = os.path.realpath(file.parent), dict[str, int]()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        path = os.path.normpath(os.path.join(folder, line))
        if path in first:
            raise ValueError(
                f"line {number} of {printable(file)} names the image of line {first[path]} again: {printable(line)}"
            )
        first[path] = number
    if not first:
        raise ValueError(f"{printable(file)} lists no images: put the path of an image on each line")
    if missing := [path for path in first if not os.path.isfile(path)]:
        named = ", ".join(printable(lines[first[path] - 1]) for path in missing[:_NAMED])
        more = ", ..." if len(missing) > _NAMED else ""
        raise ValueError(
            f"{len(missing)} of {len(first)} files in {printable(file)} do not exist: {named}{more}; paths are "
            "relative to the folder of the list"
        )
    return list(first)
