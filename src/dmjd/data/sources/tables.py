"""Tables of images through the ``datasets`` library: parquet files in the Hugging Face schema, and the hub.

The library keeps the encoded images in a memory-mapped Arrow file, which all worker processes share.
"""

import contextlib
import socket
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dmjd.data.sources.base import Source
from dmjd.images.decoding import UnreadableImage

_HUB_SPLITS = {"train": ("train",), "test": ("test", "validation", "valid", "val")}

_IMAGE_NAMES = ("image", "img", "image", "jpg", "png")

_MASK_NAMES = ("annotation", "mask", "segmentation", "semantic_mask", "label", "labels", "masks", "annotations")

_LABEL_NAMES = ("label", "labels", "fine_label", "class", "target")


class TableSource(Source):
    """The rows of a ``datasets.Dataset`` with a column of encoded images.

    Args:
        table: the dataset. name: what the user called it. files: (file name, number of rows) of each file it was
            made of, in order; one entry for a set from the hub. folder: where relative image paths start.
        with_labels: take the label column. in_chans, value_range: see :func:`~dmjd.images.reading.read_image`.
        masks: the images wanted are the masks, in a second column of encoded images.

    Raises:
        ValueError: no image or mask column, no label column where asked for, or rows without a label.
    """

    def __init__(
        self,
        table: Any,
        name: str,
        files: list[tuple[str, int]],
        folder: Path,
        with_labels: bool = False,
        in_chans: int = 3,
        value_range: tuple[float, float] | None = None,
        masks: bool = False,
    ) -> None:
        self.name, self.in_chans, self.value_range = name, in_chans, value_range
        self._files, self._folder = files, folder
        self._ends = np.cumsum([rows for _, rows in files])
        self.classes: list[str] = []
        if with_labels:
            self.labels, self.classes = _column_labels(table, name)
        self._column = _mask_column(table, name) if masks else _image_column(table, name)
        self._table = table.select_columns([self._column]).with_format("arrow")
        if not len(self):
            raise ValueError(f"{name} has no rows")

    def __len__(self) -> int:
        return len(self._table)

    def stored(self, index: int) -> bytes | Path:
        """The encoded image, or its path where the table has only that."""
        value = self._table[index][self._column][0].as_py()
        if isinstance(value, bytes):
            return value
        if value and value.get("bytes") is not None:
            return value["bytes"]
        if value and value.get("path"):
            return self._folder / value["path"]
        raise UnreadableImage(self.describe(index), "the row holds no image")

    def describe(self, index: int) -> str:
        """Row and file, counting from 0."""
        file = int(np.searchsorted(self._ends, index, side="right"))
        return f"row {index - (self._ends[file - 1] if file else 0)} of {self._files[file][0]}"

    def _identity(self) -> Iterable[str]:
        return (f"{name} {rows}" for name, rows in self._files)


def parquet_source(files: list[Path], name: str, **options: Any) -> TableSource:
    """The rows of parquet files, in the order given.

    Raises:
        ValueError: a file that is no parquet or may not be read; see also :class:`TableSource`.
    """
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for file in files:
        try:
            rows.append((file.name, pq.read_metadata(file).num_rows))
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{file} can't be read as parquet ({_first_line(error)})") from None
    try:
        with _no_progress():
            table = datasets.load_dataset("parquet", data_files=[str(f) for f in files], split="train")
    except Exception as error:  # the library wraps whatever goes wrong in its own many types
        raise ValueError(f"{name} can't be read: {_first_line(error.__cause__ or error)}") from None
    return TableSource(table, name, rows, files[0].parent, **options)


def hub_source(name: str, split: str, **options: Any) -> TableSource:
    """A set of the Hugging Face hub (or its local cache); "test" is its test split, else its validation split.

    Raises:
        ValueError: the hub or the set can't be reached, or has no such split; see also :class:`TableSource`.
    """
    import datasets

    hub_split = next((s for s in _HUB_SPLITS[split] if s in hub_splits(name)), None)
    if hub_split is None:
        raise ValueError(f"{name} has no {split} split, only {', '.join(hub_splits(name))}: pass --test-data")
    with _hub_errors(name):
        table = datasets.load_dataset(name, split=hub_split)
    return TableSource(table, name, [(f"{name} ({hub_split})", len(table))], Path(), **options)


def hub_splits(name: str) -> list[str]:
    """Names of the splits that the hub has for a set.

    Raises:
        ValueError: the hub or the set can't be reached.
    """
    import datasets

    with _hub_errors(name):
        return list(datasets.get_dataset_split_names(name))


def hub_has_split(name: str, split: str) -> bool:
    """Whether a set of the hub has images for "train" or "test"."""
    return any(s in hub_splits(name) for s in _HUB_SPLITS[split])


@contextlib.contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Say in one message what kept a set from coming; without a network, look in the cache and don't wait."""
    import datasets
    import huggingface_hub.constants as hub

    before = hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if not _reachable(hub.ENDPOINT):
        hub.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    except Exception as error:  # dozens of types, from the socket to the set's own files
        raise ValueError(
            f"'{name}' is no file, folder or set known here, and the Hugging Face hub did not give it "
            f"({_first_line(error)}): check the name and the network, or give a folder or a .parquet file"
        ) from None
    finally:
        hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _reachable(endpoint: str) -> bool:
    """Whether the host's name resolves; the client itself would try for half a minute. A proxy may know it anyway."""
    if urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(endpoint.split("://")[-1].split("/")[0].split(":")[0], 443)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _no_progress() -> Iterator[None]:
    """The library draws a bar for every file it opens."""
    import datasets

    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _encoded_columns(table: Any) -> list[str]:
    """The columns that hold encoded images, by their Arrow type."""
    import pyarrow as pa

    def holds_images(column: str) -> bool:
        kind = table.data.schema.field(column).type
        if pa.types.is_struct(kind):
            return any(field.name == "bytes" for field in kind)
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    return [column for column in table.column_names if holds_images(column)]


def _image_column(table: Any, name: str) -> str:
    """The column of encoded images: by its declared type, else by its name, else by its shape."""
    import datasets

    able = _encoded_columns(table)
    declared = [column for column in able if isinstance(table.features[column], datasets.Image)]
    named = [column for column in _IMAGE_NAMES if column in able]
    if not able:
        columns = ", ".join(table.column_names)
        raise ValueError(f"{name} has no column of encoded images (a struct with 'bytes', or binary); it has {columns}")
    return ([c for c in named if c in declared] + declared + named + able)[0]


def _mask_column(table: Any, name: str) -> str:
    """The column of encoded masks: one of a usual name, else the only one beside the images."""
    others = [column for column in _encoded_columns(table) if column != _image_column(table, name)]
    named = [column for column in _MASK_NAMES if column in others]
    if not named and len(others) != 1:
        columns = ", ".join(table.column_names)
        raise ValueError(f"{name} has no column of encoded masks ({', '.join(_MASK_NAMES)}); it has {columns}")
    return (named + others)[0]


def _column_labels(table: Any, name: str) -> tuple[np.ndarray, list[str]]:
    """[n] int64 and class names, from the column of declared class labels or the first of a usual name."""
    import datasets

    declared = [c for c, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)]
    usual = [c for c in _LABEL_NAMES if c in table.column_names]
    found = [c for c in usual if c in declared] + usual + declared
    if not found:
        columns = ", ".join(table.column_names)
        raise ValueError(f"{name} has no label column ({', '.join(_LABEL_NAMES)}); it has {columns}")
    column = table.data.column(found[0])
    values = column.to_numpy()
    if column.null_count or (values.dtype.kind in "iu" and values.min(initial=0) < 0):
        raise ValueError(f"{name}: some rows have no label in column '{found[0]}'")
    if found[0] in declared and values.dtype.kind in "iu":
        return values.astype(np.int64), list(table.features[found[0]].names)
    classes, labels = np.unique(values, return_inverse=True)
    return labels.astype(np.int64), [str(value) for value in classes]
