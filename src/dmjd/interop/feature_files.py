"""The files of features: parts and whole tables as parquet, whole arrays as npy, and whether they are intact."""

import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from dmjd.checked_json import parse_json
from dmjd.data.sources.base import Source
from dmjd.data.unreadable import Report
from dmjd.files import DIGEST_KEY, METADATA_KEY, atomic
from dmjd.regular import check_regular

ROWS_ENDING = ".rows.parquet"  # of the table that describes the rows of features.npy

PART_NAME = re.compile(r"part-(\d{12})-(\d{12})\.parquet")  # start and end of its range of indices


class DamagedPart(Exception):  # noqa: N818, it is handled: the part is made again
    """A part that cannot be read, or whose content does not match its checksums. It is deleted."""


def value_type(schema: pa.Schema) -> pa.DataType:
    """The data type of the feature values."""
    kind = schema.field("features").type
    while pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    return kind


def feature_schema(source: Source, shape: tuple[int, ...], half: bool) -> pa.Schema:
    """Columns of the features of a source, each of a shape ([D] or [N, D]), in float16 or float32."""
    value: pa.DataType = pa.float16() if half else pa.float32()
    for side in reversed(shape):
        value = pa.list_(value, side)
    fields = [("index", pa.int64()), ("path", pa.string())]
    if source.labels is not None:
        fields += [("label", pa.int64()), ("class", pa.string())]
    return pa.schema([*fields, ("features", value)])


def feature_rows(source: Source, index: Tensor, features: Tensor, schema: pa.Schema) -> pa.Table:
    """Convert the features of a batch, [b, ...], with the images' indices [b] in a source, to a table of a schema.

    Raises:
        ValueError: if features are not finite in the data type they are stored in.
    """
    half = pa.types.is_float16(value_type(schema))
    x = features.to(torch.float16 if half else torch.float32).cpu().numpy()
    if not np.isfinite(x).all():
        cure = "they may be too large for float16: leave --half out" if half else "its weights may have diverged"
        raise ValueError(f"features of {source.describe(int(index[0]))} or the images after it are not finite; {cure}")
    values: pa.Array = pa.array(x.reshape(-1))
    for side in x.shape[:0:-1]:
        values = pa.FixedSizeListArray.from_arrays(values, side)
    rows = index.tolist()
    columns: list[Any] = [rows, [_text(source.describe(i)) for i in rows]]
    if source.labels is not None:
        labels = source.labels[rows]
        columns += [labels, [_text(source.class_of(i)) for i in rows]]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=False)] + [values], schema=schema)


def _text(name: str) -> str:
    """A string as valid UTF-8, as parquet requires."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def rows_file(npy: Path) -> Path:
    """The path of the table that describes the rows of ``features.npy``."""
    return npy.with_name(npy.stem + ROWS_ENDING)


def write_parquet(tables: Iterator[pa.Table], schema: pa.Schema, path: Path) -> None:
    """Write tables of a schema, and its metadata, as one file with checksums."""
    with atomic(path) as temporary, pq.ParquetWriter(temporary, schema, write_page_checksum=True) as writer:
        for table in tables:
            writer.write_table(table.replace_schema_metadata(schema.metadata))


def write_npy(
    tables: Iterator[pa.Table], num_rows: int, schema: pa.Schema, path: Path, describe: Callable[[str], None]
) -> None:
    """Write the features of all tables as one array.

    Args:
        tables: with the column ``features``.
        num_rows: of all tables.
        schema: schema of the features.
        path: the file.
        describe: gets the digest of the file, and writes what belongs to it, before the file appears.
    """
    kind, shape = schema.field("features").type, []
    while pa.types.is_fixed_size_list(kind):
        shape.append(kind.list_size)
        kind = kind.value_type
    dtype = np.dtype(kind.to_pandas_dtype())
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (num_rows, *shape)}
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for table in tables:
            values = table["features"].combine_chunks()
            for _ in shape:
                values = values.flatten()
            file.write(values.to_numpy(zero_copy_only=False).tobytes())
        file.flush()
        describe(_digest(temporary))


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def range_of(part: Path) -> tuple[int, int]:
    """The indices that a part covers: (start, end)."""
    match = PART_NAME.fullmatch(part.name)
    assert match is not None
    return int(match[1]), int(match[2])


def unreadable_of(schema: pa.Schema) -> list[Report]:
    """The unreadable images in the metadata of a part; KeyError, TypeError or ValueError if it is damaged."""
    return parse_json(schema.metadata[METADATA_KEY.encode()], list[tuple[str, str]], "metadata")


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def check_finished(settings: dict[str, Any], out: Path) -> None:
    """Check that existing files are complete and have the settings; reads them, to check their checksums.

    Raises:
        ValueError: if they were made with other settings or by another program, or are damaged.
    """
    file = rows_file(out) if out.suffix == ".npy" else out
    try:
        check_regular(file)
        check_regular(out)
        text = pq.read_schema(file).metadata[METADATA_KEY.encode()]
        metadata = parse_json(text, dict[str, Any], "metadata")
        if not isinstance(old := metadata.get("settings"), dict):
            raise ValueError("it has no settings")
        with pq.ParquetFile(file, page_checksum_verification=True) as rows:
            num_rows = sum(len(batch) for batch in rows.iter_batches())
        if out.suffix == ".npy" and (
            len(np.load(out, mmap_mode="r")) != num_rows or _digest(out) != metadata.get(DIGEST_KEY, _digest(out))
        ):
            raise ValueError("its features do not match its rows or its digest")
    except (OSError, ValueError, KeyError, TypeError, EOFError, pa.ArrowException) as error:
        raise ValueError(
            f"{out} is damaged or was made with other settings, or by another program ({first_line(error)}): "
            "delete it, or give another --out"
        ) from None
    check_same(settings, old, out)


def check_same(settings: dict[str, Any], old: dict[str, Any], path: Path) -> None:
    """Raise an error if existing features were made with other settings. Version 0.1 stored no hash of the content."""
    if different := [name for name, value in settings.items() if old.get(name, value) != value]:
        raise ValueError(
            f"{path} was made with other settings ({', '.join(different)}): delete it, or give another --out"
        )
