"""The images of a set without near duplicates, in a form that ``--data`` takes: a list, or a table of the kept rows."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dmjd.data.sources.base import Source
from dmjd.data.sources.folder import FolderSource
from dmjd.data.sources.paths import expanded, split_tables
from dmjd.data.sources.tables import ParquetSource
from dmjd.files import METADATA_KEY, atomic, write_bytes
from dmjd.text import printable

LIST_ENDING, TABLE_ENDING = ".keep.txt", ".keep.parquet"


def check_kept(source: Source, split: str) -> None:
    """Check that images of a part of a source can be listed; ValueError if they are no files, or for a line break."""
    if isinstance(source, FolderSource):
        above = len(str(source.root))  # whose name may not be part of the list
        _check_lines(str(source.stored(i))[above:] for i in range(len(source)))
        return
    if not isinstance(source, ParquetSource):
        raise ValueError(
            f"deduplicate writes a list of images, which {source.name} cannot be given as: it takes a folder, a .txt "
            "list or a .parquet file (duplicates, a column, is for all sets)"
        )
    if split != "train":
        raise ValueError(f"deduplicate takes the training part of tables, not the {split} part of {source.name}")
    if isinstance(source.stored(0), str):
        raise ValueError(
            f"{source.name} holds paths of images, which a table elsewhere would not find: deduplicate takes tables "
            "that hold the images themselves, or the folder of the images"
        )


def write_kept(out: Path, source: Source, index: np.ndarray, settings: dict[str, Any]) -> Path:
    """Write the images to keep, next to the features.

    Args:
        out: the file of the features, ``NAME.parquet``: the images go to ``NAME.keep.txt`` or ``NAME.keep.parquet``.
        source: the set; see :func:`check_kept`.
        index: indices of the images to keep, ascending.
        settings: what the choice depends on, as JSON types; a table that was made with them is left as it is.

    Returns:
        The file.

    Raises:
        ValueError: if the file exists with other content, or a list cannot hold a name.
    """
    if isinstance(source, FolderSource):
        return _write_list(out.with_name(out.stem + LIST_ENDING), source, index)
    return _write_table(out.with_name(out.stem + TABLE_ENDING), source, index, settings)


def _write_list(file: Path, source: FolderSource, index: np.ndarray) -> Path:
    folder = os.path.realpath(file.parent)
    lines = [os.path.relpath(os.path.abspath(source.stored(int(i))), folder) for i in index]
    _check_lines(lines)
    content = os.fsencode("".join(f"{line}\n" for line in lines))
    if file.exists() and file.read_bytes() != content:
        raise _exists(file)
    write_bytes(file, content)
    return file


def _check_lines(names: Iterable[str]) -> None:
    """Check that each name fits in a line of a list."""
    if unfit := next((name for name in names if "\n" in name or name.endswith("\r")), None):
        raise ValueError(f"the name {printable(unfit)} holds a line break, which no list can: rename it")


def _write_table(file: Path, source: Source, index: np.ndarray, settings: dict[str, Any]) -> Path:
    tables = split_tables(expanded(source.name), "train")[1]
    if sum(pq.read_metadata(table).num_rows for table in tables) != len(source):
        raise ValueError(f"{source.name} changed while it was read: repeat the command")
    described = json.dumps({"settings": settings})
    if file.exists():
        if (pq.read_schema(file).metadata or {}).get(METADATA_KEY.encode()) != described.encode():
            raise _exists(file)
        return file
    keep = np.zeros(len(source), dtype=bool)
    keep[index] = True
    schema = pq.read_schema(tables[0])
    schema = schema.with_metadata((schema.metadata or {}) | {METADATA_KEY: described})
    done = 0
    with atomic(file) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for table in tables:
            with pq.ParquetFile(table) as opened:
                for batch in opened.iter_batches(1024):
                    rows = pa.table(batch).filter(pa.array(keep[done : done + len(batch)]))
                    writer.write_table(rows.cast(schema))
                    done += len(batch)
    return file


def _exists(file: Path) -> ValueError:
    return ValueError(f"{file} exists and holds other images: delete it, or give another --out")
