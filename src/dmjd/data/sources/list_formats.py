"""The formats of lists of images: text with a path a line, CSV, TSV, JSON lines, and parquet with a column of paths."""

import codecs
import contextlib
import csv
import json
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv as arrow_csv
from pyarrow import json as arrow_json

from dmjd.data.sources.list_files import ListFile
from dmjd.data.sources.paths import permission_checked
from dmjd.data.sources.table_columns import PATH_NAMES, is_text
from dmjd.text import printable, shortened

_BLOCK = 1 << 24  # bytes that pyarrow parses at once; no row may be larger

_PEEKED = 1000  # JSON lines whose keys are the columns

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class _TextFile(ListFile):
    """A file of lines in UTF-8."""

    def where(self, row: int) -> str:
        """See :meth:`ListFile.where`; the file is read up to the row."""
        for number, (line, _) in enumerate(self._rows()):
            if number == row:
                return f"line {line}"
        return f"row {row}"

    @abstractmethod
    def _rows(self) -> Iterator[tuple[int, Any]]:
        """(line from 1, content) of each row, slowly, for messages."""

    def _check_encoding(self) -> None:
        """Raise an error for the first line that is not UTF-8."""
        with self.file.open("rb") as file:
            if file.read(2) in _UTF16:
                raise ValueError(f"{self.shown} is UTF-16 text: save it as UTF-8")
            file.seek(0)
            for number, line in enumerate(file, 1):
                try:
                    line.decode()
                except UnicodeDecodeError:
                    shown = shortened(line.decode("utf-8", "replace").strip(), 60)
                    raise ValueError(
                        f"line {number} of {self.shown} is not UTF-8 text ({shown}): save the list as UTF-8"
                    ) from None


class PlainList(_TextFile):
    """One path a line, in any encoding, relative to the folder of the list or absolute. Empty lines are skipped."""

    @cached_property
    def columns(self) -> list[str]:
        """The only column."""
        return [PATH_NAMES[0]]

    def table(self, columns: Sequence[str]) -> pa.Table:
        """See :meth:`ListFile.table`."""
        lines = pa.array([line for _, line in self._rows()], pa.large_binary())
        return pa.table({PATH_NAMES[0]: lines})

    def _rows(self) -> Iterator[tuple[int, bytes]]:
        with permission_checked(self.file):
            content = self.file.read_bytes().removeprefix(codecs.BOM_UTF8)
        for number, line in enumerate(content.split(b"\n"), 1):
            if line.strip():
                yield number, line.removesuffix(b"\r")


class DelimitedList(_TextFile):
    """CSV or TSV, with the names of the columns in the first line. Without a comma there, semicolons separate them."""

    @cached_property
    def columns(self) -> list[str]:
        """The names in the first line."""
        self._check_start()
        with self._opened("surrogateescape") as file:
            names = next((row for row in csv.reader(file, delimiter=self._delimiter) if row), [])
        if any("\udc80" <= c <= "\udcff" for name in names for c in name):
            self._check_encoding()
        return names

    def table(self, columns: Sequence[str]) -> pa.Table:
        """See :meth:`ListFile.table`; every value is a text, "" where there is none."""
        if not self.columns:
            return pa.table({name: pa.array([], pa.large_string()) for name in columns})
        with permission_checked(self.file):
            try:
                return arrow_csv.read_csv(
                    self.file,
                    read_options=arrow_csv.ReadOptions(block_size=_BLOCK),
                    parse_options=arrow_csv.ParseOptions(delimiter=self._delimiter, newlines_in_values=True),
                    convert_options=arrow_csv.ConvertOptions(
                        include_columns=list(columns), column_types=dict.fromkeys(columns, pa.large_string())
                    ),
                )
            except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
                reason = str(error)
        self._check_encoding()
        self._check_rows()
        raise ValueError(f"{self.shown} can't be read as {self.file.suffix[1:].upper()} ({shortened(reason, 200)})")

    def _check_start(self) -> None:
        with permission_checked(self.file), self.file.open("rb") as file:
            start = file.read(4096)
        if start[:2] in _UTF16:
            self._check_encoding()
        if b"\0" in start:
            raise ValueError(f"{self.shown} is no list of images: it holds null characters")

    def _check_rows(self) -> None:
        """Raise an error for the first row with another number of columns than the first line."""
        with self._opened("replace") as file:
            rows, count, line = csv.reader(file, delimiter=self._delimiter), len(self.columns), 1
            while True:
                try:
                    row = next(rows, None)
                except csv.Error as error:
                    raise ValueError(f"line {line} of {self.shown} is damaged ({error})") from None
                if row is None:
                    return
                if row and len(row) != count:
                    raise ValueError(
                        f"line {line} of {self.shown} has {len(row)} columns, the first line {count}: put "
                        "values that hold a separator or a line break in double quotes"
                    )
                line = rows.line_num + 1

    def _rows(self) -> Iterator[tuple[int, Any]]:
        with self._opened("replace") as file:
            rows, line = csv.reader(file, delimiter=self._delimiter), 0
            for number, row in enumerate(row for row in rows if row):
                if number:
                    yield line, row
                line = rows.line_num + 1

    def _opened(self, errors: str) -> Any:
        return self.file.open(encoding="utf-8-sig", errors=errors, newline="")

    @cached_property
    def _delimiter(self) -> str:
        if self.file.suffix.lower() == ".tsv":
            return "\t"
        with self._opened("replace") as file:
            first = next((line for line in file if line.strip()), "")
        return next((sign for sign in ",;\t" if sign in first), ",")


class JsonLines(_TextFile):
    """One JSON object a line; its keys are the columns."""

    @cached_property
    def columns(self) -> list[str]:
        """The keys of the first lines, in order."""
        return list(dict.fromkeys(key for row in self._peeked for key in row))

    def table(self, columns: Sequence[str]) -> pa.Table:
        """See :meth:`ListFile.table`; labels have the type of the first one."""
        if not self._peeked:
            return pa.table({name: pa.array([], pa.large_string()) for name in columns})
        kinds = {name: self._kind(name) for name in columns}
        with permission_checked(self.file), self.file.open("rb") as file:
            try:
                table = arrow_json.read_json(
                    file,
                    read_options=arrow_json.ReadOptions(block_size=_BLOCK),
                    parse_options=arrow_json.ParseOptions(
                        explicit_schema=pa.schema(list(kinds.items())), unexpected_field_behavior="ignore"
                    ),
                )
                table.validate(full=True)  # that texts are UTF-8
                return table
            except pa.ArrowInvalid as error:
                reason = str(error)
        self._check_encoding()
        self._check_types(kinds)
        raise ValueError(f"{self.shown} can't be read as JSON lines ({shortened(reason, 200)})")

    @cached_property
    def _peeked(self) -> list[dict[str, Any]]:
        self._check_encoding_of_start()
        return [self._parsed(line, text) for (line, text), _ in zip(self._rows(), range(_PEEKED), strict=False)]

    def _check_encoding_of_start(self) -> None:
        with permission_checked(self.file), self.file.open("rb") as file:
            if file.read(2) in _UTF16:
                self._check_encoding()

    def _kind(self, column: str) -> pa.DataType:
        """The type of a column, by the first value; paths and splits are texts."""
        first = next((row[column] for row in self._peeked if row.get(column) is not None), "")
        if column in (self.path_column, self.split_column) or isinstance(first, str):
            return pa.large_string()
        return {bool: pa.bool_(), int: pa.int64(), float: pa.float64()}.get(type(first)) or self._refuse(column)

    def _refuse(self, column: str) -> pa.DataType:
        raise ValueError(
            f"{self.shown}: column '{printable(column)}' holds lists or objects: a label is a whole number, "
            "a text or a truth value"
        )

    def _parsed(self, line: int, text: bytes) -> dict[str, Any]:
        """A row as an object."""
        try:
            row = json.loads(text.decode())
        except UnicodeDecodeError:
            self._check_encoding()
            raise
        except ValueError as error:
            raise ValueError(f"line {line} of {self.shown} is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {line} of {self.shown} is not a JSON object, such as {{'path': 'a.jpg'}}")
        return row

    def _check_types(self, kinds: dict[str, pa.DataType]) -> None:
        """Raise an error for the first line that is not an object with values of these types."""
        for line, text in self._rows():
            row = self._parsed(line, text)
            for name, kind in kinds.items():
                try:
                    pa.array([row.get(name)], kind)
                except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError):
                    shown, words = shortened(json.dumps(row[name]), 40), str(kind).removeprefix("large_")
                    raise ValueError(
                        f"line {line} of {self.shown}: '{printable(name)}' is {shown}, not of type {words}"
                    ) from None

    def _rows(self) -> Iterator[tuple[int, bytes]]:
        with permission_checked(self.file), self.file.open("rb") as file:
            for number, line in enumerate(file, 1):
                text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if text.strip():
                    yield number, text


class ParquetList(ListFile):
    """A parquet file that holds paths instead of images."""

    @cached_property
    def columns(self) -> list[str]:
        """The names in its schema."""
        with self._readable():
            return list(pq.read_schema(self.file).names)

    def table(self, columns: Sequence[str]) -> pa.Table:
        """See :meth:`ListFile.table`."""
        with self._readable(), pq.ParquetFile(self.file, memory_map=True) as opened:
            table = opened.read(list(columns))
            table.validate(full=True)  # that texts are UTF-8
        for number, name in enumerate(table.column_names):
            if name in (self.path_column, self.split_column):
                column = _decoded(table[name])
                if not is_text(column.type):
                    raise ValueError(f"{self.shown}: column '{printable(name)}' holds {column.type}, not texts")
                table = table.set_column(number, name, column.cast(pa.large_string()))
        return table

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            reason = shortened(str(error).split("\n")[0], 200)
            raise ValueError(f"{self.shown} can't be read as parquet ({reason})") from None

    def where(self, row: int) -> str:
        """Rows are counted from 0, as those of other tables."""
        return f"row {row}"


_KINDS: dict[str, type[ListFile]] = {
    ".txt": PlainList,
    ".csv": DelimitedList,
    ".tsv": DelimitedList,
    ".jsonl": JsonLines,
    ".parquet": ParquetList,
}

ENDINGS = tuple(_KINDS)


def open_list(file: Path, path_column: str | None = None, name: str | None = None) -> ListFile:
    """Open a list by the ending of its name; see :class:`ListFile`."""
    return _KINDS[file.suffix.lower()](file, path_column, name)


def _decoded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
