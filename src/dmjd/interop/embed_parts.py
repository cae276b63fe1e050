"""Parts of a table of features: what a run of :func:`~dmjd.interop.embed.embed` keeps until the table is complete."""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dmjd.checked_json import read_json
from dmjd.data.unreadable import Report
from dmjd.engine.console import Console
from dmjd.files import DIGEST_KEY, METADATA_KEY, atomic, make_folder, remove, remove_leftovers, try_lock, write_text
from dmjd.interop.feature_files import (
    PART_NAME,
    DamagedPart,
    check_same,
    first_line,
    range_of,
    rows_file,
    unreadable_of,
    write_npy,
    write_parquet,
)
from dmjd.regular import check_regular

PART_SECONDS = 20.0  # between saved parts, so that a killed run loses little work

PART_BYTES = 64 << 20  # the most rows held in memory

_SHOWN = 10  # unreadable images named on the terminal; the file's metadata lists all


def parts_folder(out: Path) -> Path:
    """The folder of the parts of a file."""
    return out.with_name(f"{out.name}.parts")


@dataclass
class _OpenPart:
    """What is not saved yet.

    Attributes:
        first: index of its first image.
        num_noted: how many of the loader's unreadable images earlier parts hold.
        batches: rows, number of the loader's unreadable images so far, and the index at which they end.
        reports: the loader's unreadable images.
    """

    first: int
    num_noted: int = 0
    batches: list[tuple[pa.Table, int, int]] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)


class Parts:
    """Finished parts of a file: one parquet file for each range of indices, which is part of its name.

    Args:
        out: the complete file.
        settings: settings that all parts share.
        schema: schema of the rows.

    Attributes:
        dropped: whether the parts are deleted, because the complete file is written.
    """

    def __init__(self, out: Path, settings: dict[str, Any], schema: pa.Schema) -> None:
        self.out, self.schema, self.folder = out, schema, parts_folder(out)
        self._settings, self._file = settings, self.folder / "settings.json"
        self._open = _OpenPart(0)
        self._saved = time.monotonic()
        self.dropped = False

    def __enter__(self) -> "Parts":
        """Lock the folder for this process, and check its parts: they must have the same settings."""
        make_folder(self.folder)
        try:
            lock = try_lock(self.folder / ".lock")
        except OSError as error:
            named = f" ({error.filename})" if error.filename else ""
            raise ValueError(f"{self.folder} cannot be written: {error.strerror}{named}") from None
        if lock is None:
            raise ValueError(f"another process is writing {self.out}; wait for it or give another --out")
        self._lock = lock
        try:
            self._check_settings()
        except ValueError:
            self._lock.close()
            raise
        remove_leftovers(self.folder)
        self._remove_damaged()
        return self

    def __exit__(self, *_: object) -> None:
        """Save the open part, after a signal or an error for example, and unlock the folder."""
        try:
            if not self.dropped:
                self.save()
        except ValueError as error:  # it must not hide what ended the work
            Console().warn(str(error))
        finally:
            self._lock.close()

    def _check_settings(self) -> None:
        if self._file.exists():
            try:
                old = read_json(self._file, dict[str, Any])
            except ValueError as error:
                raise ValueError(f"{error}; delete {self.folder} to start again") from None
            check_same(self._settings, old, self.folder)
        else:
            write_text(self._file, json.dumps(self._settings))

    def _remove_damaged(self) -> None:
        """Delete parts that cannot be used: a damaged footer, other columns, or images that another part covers."""
        end = 0
        for file in self.files():
            first, last = range_of(file)
            try:
                check_regular(file)
                schema, num_rows = pq.read_schema(file), pq.read_metadata(file).num_rows
                unreadable_of(schema)
                if not schema.equals(self.schema) or not (end <= first and num_rows <= last - first):
                    raise ValueError("other rows or columns")
            except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
                Console().warn(f"{file} is damaged ({first_line(error)}); its images are read again")
                self._delete(file)
                continue
            end = last

    def _delete(self, file: Path) -> None:
        if file.is_dir():
            shutil.rmtree(file, ignore_errors=True)
        remove(file)
        if file.exists():
            raise ValueError(f"{file} is damaged and cannot be deleted: delete it")

    def files(self) -> list[Path]:
        """Finished parts, in the order of the set."""
        return sorted(file for file in self.folder.glob("part-*.parquet") if PART_NAME.fullmatch(file.name))

    def gaps(self, total: int) -> list[tuple[int, int]]:
        """Ranges of indices below ``total`` that no part covers: (start, end)."""
        ranges = [*map(range_of, self.files()), (total, total)]
        ends = [0, *(last for _, last in ranges)]
        return [(end, first) for end, (first, _) in zip(ends, ranges, strict=False) if end < first]

    def begin(self, first: int) -> None:
        """Start to fill a gap at an index, with a new loader."""
        self._open = _OpenPart(first)

    @property
    def num_rows(self) -> int:
        """Rows of the finished parts."""
        return sum(pq.read_metadata(file).num_rows for file in self.files())

    def add(self, rows: pa.Table, unreadable: list[Report], stop: int) -> None:
        """Add the rows of the images up to index ``stop``; ``unreadable`` are all such images of the loader so far."""
        self._open.batches.append((rows, len(unreadable), stop))
        self._open.reports = unreadable

    def save_if_due(self) -> None:
        """Save a part if enough time has passed or enough rows are in memory."""
        num_bytes = sum(rows.nbytes for rows, _, _ in self._open.batches)
        if num_bytes >= PART_BYTES or time.monotonic() - self._saved >= PART_SECONDS:
            self.save()

    def save(self) -> None:
        """Save what was added as a part. A signal at any moment does no harm: repeated, it writes the same file."""
        part = self._open
        if not part.batches:
            return
        tables, counts, stops = zip(*part.batches, strict=True)
        if stops[-1] > part.first:
            unreadable = {METADATA_KEY: json.dumps(part.reports[part.num_noted : counts[-1]])}
            table = pa.concat_tables([self.schema.empty_table(), *tables]).replace_schema_metadata(unreadable)
            with atomic(self.folder / f"part-{part.first:012d}-{stops[-1]:012d}.parquet") as temporary:
                pq.write_table(table, temporary, write_page_checksum=True)
        self._open = _OpenPart(stops[-1], counts[-1])
        self._saved = time.monotonic()

    def unreadable(self) -> list[Report]:
        """The unreadable images of all finished parts."""
        return [report for file in self.files() for report in unreadable_of(pq.read_schema(file))]

    def finish(self, name: str, metadata: dict[str, Any], console: Console) -> None:
        """Merge the parts of a whole set into the file, and name the unreadable images.

        A damaged part is deleted with a warning. Then there is a gap again, and no file.

        Raises:
            ValueError: if no image of the set ``name`` was readable.
        """
        unreadable = self.unreadable()
        if not self.num_rows:
            self.drop()
            raise ValueError(f"none of the {self._open.first} images of {name} can be read; {': '.join(unreadable[0])}")
        try:
            self.merge(metadata | {"unreadable": unreadable})
            _name_unreadable(console, unreadable)
        except DamagedPart as error:
            console.warn(f"{error}; its images are read again")

    def merge(self, metadata: dict[str, Any]) -> None:
        """Write the complete file, part by part, then remove the parts."""
        if self.out.suffix == ".npy":
            rows = self.schema.remove(self.schema.get_field_index("features"))

            def describe(digest: str) -> None:
                described = rows.with_metadata({METADATA_KEY: json.dumps(metadata | {DIGEST_KEY: digest})})
                write_parquet(self._tables(rows.names), described, rows_file(self.out))

            write_npy(self._tables(["features"]), self.num_rows, self.schema, self.out, describe)
        else:
            schema = self.schema.with_metadata({METADATA_KEY: json.dumps(metadata)})
            write_parquet(self._tables(schema.names), schema, self.out)
        self.drop()

    def drop(self) -> None:
        """Remove the parts."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.dropped = True

    def _tables(self, columns: list[str]) -> Iterator[pa.Table]:
        """The columns of each part; checksums are verified."""
        for file in self.files():
            try:
                table = pq.read_table(file, columns=columns, page_checksum_verification=True)
            except (OSError, ValueError, KeyError, pa.ArrowException) as error:
                self._delete(file)
                raise DamagedPart(f"{file} is damaged ({first_line(error)})") from None
            yield table


def _name_unreadable(console: Console, unreadable: list[Report]) -> None:
    for name, reason in unreadable[:_SHOWN]:
        console.warn(f"left out {name}: {reason}")
    if len(unreadable) > _SHOWN:
        console.warn(f"left out {len(unreadable) - _SHOWN} more; the file's metadata lists them all")
