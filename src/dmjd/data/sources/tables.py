"""Tables of images, read by the ``datasets`` library: parquet files in the schema of Hugging Face.

The library keeps the encoded images in a memory-mapped Arrow file, which all worker processes share.
"""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dmjd.data.sources.base import Source, SourceOptions
from dmjd.data.sources.paths import existing_path, expanded, split_tables, warn_of_loose_images
from dmjd.images.stored import UnreadableImage

_IMAGE_NAMES = ("image", "img", "picture", "jpg", "png")

_MASK_NAMES = ("annotation", "mask", "segmentation", "semantic_mask", "label", "labels", "masks", "annotations")

_LABEL_NAMES = ("label", "labels", "fine_label", "class", "target")


class TableSource(Source):
    """The rows of a ``datasets.Dataset`` with a column of encoded images.

    Args:
        table: the dataset.
        name: the name or path given by the user.
        files: (file name, number of rows) of each file it was
            read from, in order; one entry for a set from the hub.
        folder: folder that image paths are relative to.
        options: how to open the table. With ``masks``, the masks are read, a second column of encoded images.

    Raises:
        ValueError: if a required image, mask or label column is missing, or a row has no label.
    """

    can_hold_masks = True

    def __init__(
        self, table: Any, name: str, files: list[tuple[str, int]], folder: Path, options: SourceOptions
    ) -> None:
        self.name, self.in_chans, self.value_range = name, options.in_chans, options.value_range
        self._files, self._folder = files, folder
        self._ends = np.cumsum([rows for _, rows in files])
        self.classes: list[str] = []
        if options.with_labels:
            self.labels, self.classes = _column_labels(table, name)
        self._column = _mask_column(table, name) if options.masks else _image_column(table, name)
        self._table = table.select_columns([self._column]).with_format("arrow")
        if not len(self):
            raise ValueError(f"{name} has no rows")

    def __len__(self) -> int:
        return len(self._table)

    def stored(self, index: int) -> bytes | Path:
        """The encoded image, or its path if the table has only that."""
        value = self._table[index][self._column][0].as_py()
        if isinstance(value, bytes):
            return value
        if value and value.get("bytes") is not None:
            return value["bytes"]
        if value and value.get("path"):
            return self._folder / value["path"]
        raise UnreadableImage(self.describe(index), "the row holds no image")

    def describe(self, index: int) -> str:
        """Row, counted from 0, and file."""
        file = int(np.searchsorted(self._ends, index, side="right"))
        return f"row {index - (self._ends[file - 1] if file else 0)} of {self._files[file][0]}"

    def _identity(self) -> Iterable[str]:
        return (f"{name} {rows}" for name, rows in self._files)


class ParquetSource(TableSource):
    """The rows of parquet files."""

    kind = "a table"
    label_option = "column"

    @classmethod
    def matches(cls, data: str, split: str) -> bool:
        """Whether ``data`` is a parquet file, or a folder of some, and has the split."""
        path = existing_path(data)
        return path is not None and bool(split_tables(path, split))

    @classmethod
    def from_data(cls, data: str, options: SourceOptions) -> "ParquetSource":
        """Open the rows of a split, file by file.

        Raises:
            ValueError: if a file is not parquet or cannot be read; see also :class:`TableSource`.
        """
        import datasets  # slow to import
        import pyarrow as pa
        import pyarrow.parquet as pq

        root = expanded(data)
        files = split_tables(root, options.split)
        if root.is_dir():
            warn_of_loose_images(root)
        rows = []
        for file in files:
            try:
                rows.append((file.name, pq.read_metadata(file).num_rows))
            except (pa.ArrowInvalid, OSError) as error:
                raise ValueError(f"{file} can't be read as parquet ({first_line(error)})") from None
        try:
            with _no_progress_bar():
                table = datasets.load_dataset("parquet", data_files=[str(f) for f in files], split="train")
        except Exception as error:  # the library wraps errors in many types of its own
            raise ValueError(f"{data} can't be read: {first_line(error.__cause__ or error)}") from None
        return cls(table, data, rows, files[0].parent, options)


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


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _encoded_columns(table: Any) -> list[str]:
    """The columns of encoded images, by their Arrow type."""
    import pyarrow as pa

    def holds_images(column: str) -> bool:
        kind = table.data.schema.field(column).type
        if pa.types.is_struct(kind):
            return any(field.name == "bytes" for field in kind)
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    return [column for column in table.column_names if holds_images(column)]


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


def _column_labels(table: Any, name: str) -> tuple[np.ndarray, list[str]]:
    """[n] int64 labels and class names, from the declared label column or the first with a usual name."""
    import datasets

    declared = [c for c, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)]
    usual = [c for c in _LABEL_NAMES if c in table.column_names]
    candidates = [c for c in usual if c in declared] + usual + declared
    if not candidates:
        columns = ", ".join(table.column_names)
        raise ValueError(f"{name} has no label column ({', '.join(_LABEL_NAMES)}); it has {columns}")
    chosen = candidates[0]
    column = table.data.column(chosen)
    values = column.to_numpy()
    if column.null_count or (values.dtype.kind in "iu" and values.min(initial=0) < 0):
        raise ValueError(f"{name}: some rows have no label in column '{chosen}'")
    if chosen in declared and values.dtype.kind in "iu":
        return values.astype(np.int64), list(table.features[chosen].names)
    classes, labels = np.unique(values, return_inverse=True)
    return labels.astype(np.int64), [str(value) for value in classes]
