"""The interface of a list of images: a file with a path in each row, and perhaps labels and splits.

Rows stay in Arrow's buffers: a list may name a million images.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dmjd.config.fields import SPLITS
from dmjd.data.sources.paths import permission_checked, split_of_name, taken_split
from dmjd.data.sources.table_columns import LABEL_NAMES, PATH_NAMES
from dmjd.regular import check_regular
from dmjd.text import printable, shortened

_SPLIT_NAME = "split"

ADDRESS = "^[A-Za-z][A-Za-z0-9+.-]+://"  # how a row begins that is no path


class ListFile(ABC):
    """A list of images in a file.

    Args:
        file: the file.
        path_column: the column of paths; None: the first with a usual name (:data:`PATH_NAMES`).
        name: what the list is called in messages, such as its address; None: as the file.
    """

    def __init__(self, file: Path, path_column: str | None = None, name: str | None = None) -> None:
        self.file, self._path_column = file, path_column
        self.shown = printable(file if name is None else name)
        with permission_checked(file):
            check_regular(file)

    @cached_property
    @abstractmethod
    def columns(self) -> list[str]:
        """Names of the columns."""

    @abstractmethod
    def table(self, columns: Sequence[str]) -> pa.Table:
        """Some columns of all rows; texts are large_string, or large_binary.

        Raises:
            ValueError: if the file is damaged; it names the line.
        """

    @abstractmethod
    def where(self, row: int) -> str:
        """A row in messages: "line 5"."""

    @cached_property
    def path_column(self) -> str:
        """The column of paths.

        Raises:
            ValueError: if there is none.
        """
        found = self._column(self._path_column, PATH_NAMES)
        if found is None:
            wanted = ", ".join(PATH_NAMES) if self._path_column is None else repr(self._path_column)
            raise ValueError(
                f"{self.shown} has no column of paths ({printable(wanted)}); it has {self._listed()}: "
                "name the columns in the first line, or pass --path-column NAME"
            )
        return found

    @cached_property
    def split_column(self) -> str | None:
        """The column ``split``, if there is one."""
        return self._column(None, (_SPLIT_NAME,))

    def label_column(self, name: str | None) -> str:
        """The column of labels: the given one, else the first with a usual name (:data:`LABEL_NAMES`).

        Raises:
            ValueError: if there is none.
        """
        found = self._column(name, tuple(n for n in LABEL_NAMES if n != self.path_column))
        if found is None:
            wanted = ", ".join(LABEL_NAMES) if name is None else repr(name)
            raise ValueError(
                f"{self.shown} has no label column ({printable(wanted)}); it has {self._listed()}: "
                "pass --label-column NAME"
            )
        return found

    def split_rows(self, split: str) -> tuple[str, pa.Array | None]:
        """Which split serves as this one ("val" as "test" if there is no "test"), and its rows as a mask [n] bool.

        None: all rows, of a list without splits, which is a training set. The split "" is missing.

        Raises:
            ValueError: for a row with an unknown split.
        """
        if self.split_column is None:
            return ("train" if split == "train" else ""), None
        encoded = _one_array(self.table([self.split_column])[self.split_column]).dictionary_encode()
        names = [split_of_name(_text(value)) for value in encoded.dictionary.to_pylist()]
        if None in names or encoded.null_count:
            unknown = pa.array([name is None for name in names])
            self._raise_unknown_split(pc.fill_null(unknown.take(encoded.indices), True))
        taken = taken_split({name for name in names if name}, split)
        if taken is None:
            return "", None
        return taken, pa.array([name == taken for name in names]).take(encoded.indices)

    def _raise_unknown_split(self, wrong: pa.Array) -> None:
        rows = _true_rows(wrong)
        column = self.table([str(self.split_column)])[str(self.split_column)]
        value = _text(column[rows[0]].as_py())
        shown = f"the split '{shortened(value, 40)}'" if value.strip() else "no split"
        others = f" (the first of {len(rows)})" if len(rows) > 1 else ""
        raise ValueError(
            f"{self.where(rows[0])} of {self.shown} has {shown}{others}: column '{self.split_column}' takes "
            f"{', '.join(SPLITS[:-1])} and {SPLITS[-1]}"
        )

    @property
    def holds_addresses(self) -> bool:
        """Whether the first row is an address."""
        return bool(pc.match_substring_regex(self.paths[:1], ADDRESS)[0].as_py())

    @cached_property
    def paths(self) -> pa.Array:
        """The paths of all rows as they are written: [n] large_binary.

        Raises:
            ValueError: if there are none, or a row has no path.
        """
        paths = _one_array(self.table([self.path_column])[self.path_column])
        if not len(paths):
            raise ValueError(f"{self.shown} lists no images: put the path of an image on each line")
        paths = paths.cast(pa.large_binary())
        without = _true_rows(pc.fill_null(pc.match_substring_regex(paths, r"^\s*$"), True))
        if len(without):
            more = f" (the first of {len(without)})" if len(without) > 1 else ""
            raise ValueError(f"{self.where(without[0])} of {self.shown} has no path{more}: remove it")
        if pc.any(pc.match_substring(paths, "\0")).as_py():
            raise ValueError(f"{self.shown} is no list of images: it holds null characters")
        return paths

    def labels(self, column: str) -> pa.Array:
        """The values of a column in all rows, [n] of any type."""
        return _one_array(self.table([column])[column])

    def _column(self, given: str | None, names: Sequence[str]) -> str | None:
        """The given column, or the first with one of the names, in small or capital letters; None without one.

        Raises:
            ValueError: if two columns have its name.
        """
        if given is not None:
            found = given if given in self.columns else None
        else:
            of_name = {column.strip().lower(): column for column in reversed(self.columns)}
            found = next((of_name[name] for name in names if name in of_name), None)
        if found is not None and self.columns.count(found) > 1:
            raise ValueError(f"{self.shown} has two columns named '{printable(found)}': rename one of them")
        return found

    def _listed(self) -> str:
        shown = ", ".join(shortened(column, 40) for column in self.columns[:10])
        return shown + ", ..." * (len(self.columns) > 10) or "no columns"


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    combined = column.combine_chunks()
    return pa.concat_arrays(combined.chunks) if isinstance(combined, pa.ChunkedArray) else combined


def _true_rows(mask: pa.Array) -> np.ndarray:
    return np.flatnonzero(mask.to_numpy(zero_copy_only=False))


def _text(value: str | bytes | None) -> str:
    return "" if value is None else value.decode("utf-8", "replace") if isinstance(value, bytes) else value
