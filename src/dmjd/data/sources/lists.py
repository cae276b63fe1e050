"""A list of images: a file with a path in each row. It is read once; a run keeps the list it began with."""

import functools
import os
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dmjd.config.fields import SPLITS
from dmjd.data.sources.address_lists import AddressListSource
from dmjd.data.sources.addresses import ends_with, is_url
from dmjd.data.sources.base import SourceOptions
from dmjd.data.sources.dicom_files import check_dicom
from dmjd.data.sources.folder import FolderSource, Listing, Strings, read_listing, without_frame
from dmjd.data.sources.list_files import ListFile
from dmjd.data.sources.list_formats import ENDINGS, PlainList, open_list
from dmjd.data.sources.list_paths import (
    absolute_paths,
    common_folder,
    first_repeated,
    missing_rows,
    relative_paths,
    without_first_frame,
)
from dmjd.data.sources.paths import existing_path, expanded
from dmjd.data.sources.remote import fetch
from dmjd.data.sources.table_columns import is_list_table
from dmjd.data.sources.table_labels import optional_labels
from dmjd.data.unreadable import tolerated
from dmjd.text import printable
from dmjd.warning import DMJDWarning

_NAMED = 5  # missing files in a message

_REMOTE = tuple(ending for ending in ENDINGS if ending != ".parquet")  # without network access, a table of images


class ListSource(FolderSource):
    """The images of a list, in its order.

    Args:
        file: the list; see :func:`~dmjd.data.sources.list_formats.open_list`.
        rows: its content; None: it is opened. name: what it is called in messages; None: as the file.
        options: how to open it. Paths are relative to ``root``, by default the folder of the list. Labels are a column,
            or the first folder below the folder that holds all images of the split. If ``listing`` exists, it holds the
            images, and the list is read only to find the folder and the labels, if at all, so that a resumed run sees
            the images it started with.

    Raises:
        ValueError: if the list is empty or cannot be read, names a file twice, or names more files that do not exist
            than ``max_unreadable`` (by default none; a number below 1 is a share).
    """

    kind = "a list of images"
    label_option = None

    def __init__(
        self, file: Path, options: SourceOptions | None = None, rows: ListFile | None = None, name: str | None = None
    ) -> None:
        options = SourceOptions() if options is None else options
        self.name = str(file) if name is None else name
        self.in_chans, self.value_range = options.in_chans, options.value_range
        self._file, self._options = file, options
        rows = open_list(file, options.path_column) if rows is None else rows
        self._base = os.path.realpath(file.parent if options.root is None else expanded(options.root))
        if options.root is not None and not os.path.isdir(self._base):
            raise ValueError(f"there is no folder {printable(options.root)} (--root), which the paths are relative to")
        if options.labels == "column" and isinstance(rows, PlainList):
            raise ValueError(
                f"labels 'column' does not fit {printable(file)}, which is a list without columns: pass --labels "
                "folder, or give a .csv"
            )
        listed = read_listing(options.listing) if options.listing is not None else None
        self._open(rows, options, listed)
        self.listing = options.listing if listed is not None else None

    def _open(self, rows: ListFile, options: SourceOptions, listed: Listing | None) -> None:
        """Take the images of a split, or those that a run began with."""
        by_folder, by_column = options.labels == "folder", options.labels == "column"
        self._titled = rows.split_column is not None
        if listed is not None and listed.root is not None and not by_column:
            self.split, folder = options.split, os.path.normpath(os.path.join(self._base, listed.root))
            self._take(Path(folder), listed.paths, by_folder, listed)
            return
        written = rows.paths
        paths = absolute_paths(written, self._base)
        if listed is None and pc.any(pc.ends_with(paths, b".dcm")).as_py():
            check_dicom(self.name)
        self.split, chosen = rows.split_rows(options.split)
        if not self.split:
            raise ValueError(f"no row of {printable(self.name)} belongs to the {options.split} part")
        own = paths if chosen is None else paths.filter(chosen)
        root = common_folder(own)
        if listed is None:
            _check_repeated(rows, written, paths)
            _check_missing(rows, own, written if chosen is None else written.filter(chosen), options)
            self._take(Path(root), Strings.of_arrow(relative_paths(own, root)), by_folder, None)
        else:  # without a root, the run began with the folder itself
            root = root if listed.root is None else os.path.normpath(os.path.join(self._base, listed.root))
            self._take(Path(root), listed.paths, by_folder, listed)
        if by_column:
            column = rows.label_column(options.label_column)
            values = rows.labels(column)
            if listed is not None:
                kept = pa.array([os.fsencode(os.path.join(root, path)) for path in listed.paths], pa.large_binary())
                values = values.take(pc.index_in(kept, value_set=paths))  # null: it is no longer in the list
            elif chosen is not None:
                values = values.filter(chosen)
            where = f"{printable(self.name)}: column '{printable(column)}'"
            self.labels, self.classes = optional_labels(values, where)

    @property
    def title(self) -> str:
        """The list, and the split if it has several."""
        return f"{self.name} ({self.split})" if self._titled else self.name

    @classmethod
    def matches(cls, data: str, split: str) -> bool:
        """Whether ``data`` is a list with rows of this split. Without a column of splits, all rows are for training.

        A remote list is fetched to look for other parts than that for training.
        """
        if is_url(data):
            return ends_with(data, _REMOTE) and (split == "train" or split in _remote_parts(data))
        path = existing_path(data)
        if path is None or not path.is_file() or path.suffix.lower() not in ENDINGS:
            return False
        if path.suffix.lower() == ".parquet" and not is_list_table(path):
            return False
        return bool(open_list(path).split_rows(split)[0])

    @classmethod
    def from_data(cls, data: str, options: SourceOptions) -> "ListSource | AddressListSource":  # type: ignore[override]
        """Open the list ``data``, which is fetched if it is remote; its images too, unless there is a ``root``."""
        file, base = expanded(data), None
        if is_url(data):
            file = _fetched(data, options.remote.cache_dir)
            base = data.partition("?")[0].rpartition("/")[0] if options.root is None else None
        rows = open_list(file, options.path_column, data)
        if base is not None or rows.holds_addresses:
            return AddressListSource(data, rows, base, options)
        return cls(file, options, rows, data)

    def present(self) -> tuple[str, list[str]]:
        """See :class:`FolderSource`. The list is read again; rows whose files do not exist yet are left out."""
        rows = open_list(self._file, self._options.path_column)
        paths = absolute_paths(rows.paths, self._base)
        taken, chosen = rows.split_rows(self.split)
        if taken != self.split:
            raise ValueError(f"no row of {printable(self.name)} belongs to the {self.split} part any more")
        own = paths if chosen is None else paths.filter(chosen)
        there = np.ones(len(own), dtype=bool)
        there[missing_rows(own)] = False
        own = own.filter(pa.array(there))
        if not len(own):
            return ".", []
        root = common_folder(own)
        return os.path.relpath(root, self._folder), [
            os.fsdecode(path) for path in relative_paths(own, root).to_pylist()
        ]

    def identity(self, folder: str, path: str) -> str:
        """See :class:`FolderSource`. Rows name frames one by one; without a number, the first."""
        file, frame = without_frame(folder, path)
        return f"{file}#{frame}"

    def _place(self) -> dict[str, str]:
        """See :class:`FolderSource`."""
        return {"root": os.path.relpath(self.root, self._base)}


def _fetched(url: str, cache_dir: str | None) -> Path:
    """A copy of the only list at an address."""
    files = [*fetch(url, cache_dir).files.values()]
    if len(files) > 1:
        raise ValueError(f"{printable(url)} stands for {len(files)} lists: give each of them (--data A B)")
    return files[0]


@functools.lru_cache(maxsize=16)
def _remote_parts(url: str) -> tuple[str, ...]:
    """The splits of a remote list that another one may serve as; it is kept nowhere, since its cache is not known."""
    with tempfile.TemporaryDirectory() as folder:
        rows = open_list(_fetched(url, folder), name=url)
        return tuple(split for split in SPLITS if rows.split_rows(split)[0])


def _check_repeated(rows: ListFile, written: pa.LargeBinaryArray, paths: pa.LargeBinaryArray) -> None:
    """Raise an error for a path, made absolute, that repeats another one; it is shown as it is written."""
    if (found := first_repeated(without_first_frame(paths))) is not None:
        row, first = found
        shown = printable(os.fsdecode(written[row].as_py()))
        raise ValueError(f"{rows.where(row)} of {rows.shown} names the image of {rows.where(first)} again: {shown}")


def _check_missing(
    rows: ListFile, paths: pa.LargeBinaryArray, written: pa.LargeBinaryArray, options: SourceOptions
) -> None:
    """Raise an error if more files are missing than tolerated; warn if fewer are."""
    missing = missing_rows(paths)
    if not len(missing):
        return
    named = ", ".join(printable(os.fsdecode(path)) for path in written.take(missing[:_NAMED]).to_pylist())
    more = ", ..." if len(missing) > _NAMED else ""
    text = f"{len(missing)} of {len(paths)} files in {rows.shown} do not exist: {named}{more}"
    if len(missing) == len(paths) or len(missing) > tolerated(options.max_unreadable or 0, len(paths)):
        folder = "the folder of the list" if options.root is None else f"--root {printable(options.root)}"
        raise ValueError(
            f"{text}; paths are relative to {folder}: give --root FOLDER, correct the list, or tolerate them with "
            f"--max-unreadable {len(missing)}"
        )
    warnings.warn(f"{text}; other images replace them", DMJDWarning, stacklevel=6)
