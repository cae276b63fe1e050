"""Tables of images, read by the ``datasets`` library: parquet files in the schema of Hugging Face.

The library keeps the encoded images in a memory-mapped Arrow file, which all worker processes share.
"""

import contextlib
import glob
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmjd.data.sources.addresses import ends_with, is_url
from dmjd.data.sources.base import Source, SourceOptions
from dmjd.data.sources.paths import existing_path, expanded, path_inside, split_tables, warn_of_loose_images
from dmjd.data.sources.remote import fetch
from dmjd.data.sources.table_columns import is_encoded_image, is_list_table
from dmjd.data.sources.table_labels import column_labels
from dmjd.images.stored import UnreadableImage
from dmjd.text import printable

_IMAGE_NAMES = ("image", "img", "picture", "jpg", "png")

_MASK_NAMES = ("annotation", "mask", "segmentation", "semantic_mask", "label", "labels", "masks", "annotations")


class TableSource(Source):
    """The rows of a ``datasets.Dataset`` with a column of encoded images.

    Args:
        table: the dataset.
        name: the name or path given by the user.
        files: (file name, number of rows) of each file it was
            read from, in order; one entry for a set from the hub.
        folder: folder that image paths are relative to.
        options: how to open the table. With ``masks``, the masks are read, a second column of encoded images.
        roots: folders that no image path may lead out of; none: ``folder``.

    Raises:
        ValueError: if a required image, mask or label column is missing, or a row has no label.
    """

    can_hold_masks = True

    def __init__(
        self,
        table: Any,
        name: str,
        files: list[tuple[str, int]],
        folder: Path,
        options: SourceOptions,
        roots: Sequence[Path] = (),
    ) -> None:
        self.name, self.in_chans, self.value_range = name, options.in_chans, options.value_range
        self._files, self._folder, self._roots = files, folder, tuple(roots) or (folder,)
        self._ends = np.cumsum([rows for _, rows in files])
        self.classes: list[str] = []
        if not len(table):
            raise ValueError(f"{name} has no rows")
        self._column = _mask_column(table, name) if options.masks else _image_column(table, name)
        if options.with_labels:
            self.labels, self.classes = column_labels(table, name, self._column, options.label_column)
        self._table = table.select_columns([self._column]).with_format("arrow")

    def __len__(self) -> int:
        return len(self._table)

    def stored(self, index: int) -> bytes | str:
        """The encoded image, or its path if the table has only that.

        Raises:
            UnreadableImage: if the row holds neither, or the path leads out of the folder of the table.
        """
        value = self._table[index][self._column][0].as_py()
        if isinstance(value, dict):
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
            if isinstance(value, str) and value:
                inside = (path_inside(root, self._folder, value) for root in self._roots)
                if path := next((path for path in inside if path), None):
                    return path
                path = printable(value)[:80]
                raise UnreadableImage(
                    self.describe(index),
                    f"its path {path} leads out of {self._roots[0]}: store the images in the table, or below that",
                )
        if not isinstance(value, bytes):
            raise UnreadableImage(self.describe(index), "the row holds no image")
        return value

    def describe(self, index: int) -> str:
        """Row, counted from 0, and file."""
        folder = os.path.join(self._folder, "") if self.full_names and self._folder.parts else ""
        file = int(np.searchsorted(self._ends, index, side="right"))
        return f"row {index - (self._ends[file - 1] if file else 0)} of {printable(folder + self._files[file][0])}"

    def _identity(self) -> Iterable[str]:
        return (f"{name} {rows}" for name, rows in self._files)


class ParquetSource(TableSource):
    """The rows of parquet files."""

    kind = "a table"
    label_option = "column"

    @classmethod
    def matches(cls, data: str, split: str) -> bool:
        """Whether ``data`` is a parquet file, a folder of some or their address, and has the split."""
        if is_url(data):
            return split == "train" and ends_with(data, (".parquet",))
        path = existing_path(data)
        if path is None or (path.is_file() and path.suffix.lower() == ".parquet" and is_list_table(path)):
            return False
        return bool(split_tables(path, split)[1])

    @classmethod
    def from_data(cls, data: str, options: SourceOptions) -> "ParquetSource":
        """Open the rows of a split, file by file.

        Raises:
            ValueError: if a file is not parquet or cannot be read; see also :class:`TableSource`.
        """
        import datasets  # slow to import
        import pyarrow as pa
        import pyarrow.parquet as pq

        root, taken, named = _found(data, options)
        rows, files = [], [file for _, file in named]
        for name, file in named:
            try:
                rows.append((name, pq.read_metadata(file).num_rows))
            except (pa.ArrowInvalid, OSError) as error:
                raise ValueError(f"{printable(file)} can't be read as parquet ({first_line(error)})") from None
        if not sum(count for _, count in rows):
            raise ValueError(f"{data} has no rows")
        check_cache()
        try:
            with _no_progress_bar():
                table = datasets.load_dataset("parquet", data_files=[_escaped(f) for f in files], split="train")
        except Exception as error:  # the library wraps errors in many types of its own
            raise ValueError(f"{data} can't be read: {first_line(error.__cause__ or error)}") from None
        source = cls(table, data, rows, files[0].parent, options, [root if root.is_dir() else root.parent])
        source.split = taken
        return source


def _found(data: str, options: SourceOptions) -> tuple[Path, str, list[tuple[str, Path]]]:
    """A file or folder, the split that serves as the wanted one, and its parquet files with their names.

    Remote ones are fetched. Their names are those on the server, which the cache may not keep.
    """
    if is_url(data):
        copies = fetch(data, options.remote.cache_dir).files
        return next(iter(copies.values())), "train", [(name.split("/")[-1], file) for name, file in copies.items()]
    root = expanded(data)
    taken, files = split_tables(root, options.split)
    if root.is_dir():
        warn_of_loose_images(root)
    return root, taken, [(file.name, file) for file in files]


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Suppress the progress bar that the library draws for every file."""
    import datasets

    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def check_cache() -> None:
    """Check that the ``datasets`` library can write its cache, which its own messages do not name.

    Raises:
        ValueError: naming the folder.
    """
    import datasets

    cache = Path(datasets.config.HF_DATASETS_CACHE)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
    except OSError as error:
        raise ValueError(
            f"tables are cached in {cache}, which can't be written ({(error.strerror or str(error)).lower()}): "
            "set HF_HOME to a folder that can be"
        ) from None


def _escaped(file: Path) -> str:
    """A path without special characters for the library, which takes it for a pattern."""
    return glob.escape(str(file))


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _encoded_columns(table: Any) -> list[str]:
    """The columns of encoded images, by their Arrow type."""
    return [column for column in table.column_names if is_encoded_image(table.data.schema.field(column).type)]


def _image_column(table: Any, name: str) -> str:
    """The column of encoded images: by its declared type, else by its name, else the first of a fitting type."""
    import datasets

    encoded = _encoded_columns(table)
    declared = [column for column in encoded if isinstance(table.features[column], datasets.Image)]
    named = [column for column in _IMAGE_NAMES if column in encoded]
    if not encoded:
        columns = ", ".join(table.column_names)
        raise ValueError(f"{name} has no column of encoded images (a struct with 'bytes', or binary); it has {columns}")
    return ([c for c in named if c in declared] + declared + named + encoded)[0]


def _mask_column(table: Any, name: str) -> str:
    """The column of encoded masks: by its name, else the only one besides the images."""
    others = [column for column in _encoded_columns(table) if column != _image_column(table, name)]
    named = [column for column in _MASK_NAMES if column in others]
    if not named and len(others) != 1:
        columns = ", ".join(table.column_names)
        raise ValueError(f"{name} has no column of encoded masks ({', '.join(_MASK_NAMES)}); it has {columns}")
    return (named + others)[0]
