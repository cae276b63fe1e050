"""Features of every image of a set as a table, written in parts so that a killed run resumes.

Shapes: b image of a batch, N patch token, D width.
"""

import contextlib
import fcntl
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from dmjd.config.checks import check_bool, check_out, check_path, check_text
from dmjd.config.evaluation import FrozenConfig
from dmjd.data.eval_loader import EvalLoader
from dmjd.data.sources.base import Source
from dmjd.data.sources.registry import SPLITS
from dmjd.data.unreadable import Report
from dmjd.encoders.base import Encoder, known_preprocess
from dmjd.encoders.weights import load_encoder, weights_hash
from dmjd.engine.console import Console, duration_text
from dmjd.engine.device import keep_freed_memory, pick_device
from dmjd.evaluation.frozen.features import Extractor, pooled
from dmjd.files import METADATA_KEY, atomic, write_text
from dmjd.nn.modes import evaluating, float32_by_default
from dmjd.runs.build import open_images

ENDINGS = (".parquet", ".npy")

ROWS_ENDING = ".rows.parquet"  # of the table that describes the rows of features.npy

PART_SECONDS = 20.0  # between saved parts, so a killed run loses little work

PART_BYTES = 64 << 20  # the most rows held in memory

_SHOWN = 10  # unreadable images named on the terminal; the file's metadata lists all


@float32_by_default()
def embed(
    run: str | Path,
    *,
    out: str | Path,
    data: str | Path | None = None,
    split: str = "train",
    labels: str | None = None,
    tokens: bool = False,
    half: bool = False,
    batch_size: int = 256,
    precision: str = "fp32",
    device: str = "auto",
    num_workers: int | None = None,
) -> Path:
    """Write the features of every image of a set to a file.

    Rows are in the order of the set; unreadable images are left out and reported. Finished parts are kept in
    ``<out>.parts`` until the file is complete: the same call resumes from them.

    Args:
        run: a run folder; or an encoder file or checkpoint, together with ``data``.
        out: ``.parquet`` for columns ``index``, ``path``, ``label`` (int64) and ``class`` of labeled sets, and
            ``features``; ``.npy`` for the features alone, with the other columns in ``<name>.rows.parquet``.
        data: the images; None: the run's own.
        split: "train" or "test", of data that has both.
        labels: "none", "folder" or "column"; None: as the run.
        tokens: write all patch tokens [N, D] in raster order, not the pooled feature [D].
        half: store float16, not float32.
        batch_size: images per batch.
        precision: "fp32" or "bf16" (autocast).
        device: "auto", "cpu" or "cuda".
        num_workers: data loading processes; None: by the number of cores.

    Returns:
        The file. The schema of the parquet file holds settings and unreadable images as JSON, under ``dmjd``.

    Raises:
        ValueError: for a wrong ending, existing files with other settings, unusable data or non-finite features.
    """
    out, run = _checked_out(out), check_path("run", run)
    machine = {"precision": precision, "device": device, "num_workers": num_workers}
    _check(tokens, half, split, data=data, labels=labels, batch_size=batch_size, **machine)
    chosen = pick_device(device)
    keep_freed_memory(chosen)
    encoder = load_encoder(run, chosen)
    source = open_images(run, known_preprocess(encoder), data, split, labels=labels)
    extract = _extractor(encoder, tokens, precision)
    settings = {"encoder": weights_hash(encoder), "data": source.fingerprint(), "labels": source.labels is not None}
    settings |= {"tokens": bool(tokens), "half": bool(half), "precision": precision}
    console = Console()
    if out.exists():
        _check_same(settings, _settings_of(out), out)
        console.say(f"{out} is finished already")
        return out
    shape = (encoder.num_patches, encoder.embed_dim) if tokens else (encoder.embed_dim,)
    with _Parts(out, settings, _schema(source, shape, half)) as parts:
        _fill(parts, encoder, source, extract, console, batch_size, num_workers)
        unreadable = parts.finish(source.name, {"settings": settings, "grid": encoder.grid})
    _name_unreadable(console, unreadable)
    return out


def _check(tokens: bool, half: bool, split: str, *, data: str | Path | None, **settings: Any) -> None:
    """Check the types and values of arguments of :func:`embed`."""
    check_bool("tokens", tokens)
    check_bool("half", half)
    check_text("split", split, SPLITS)
    FrozenConfig(data=None if data is None else str(data), **settings)


def _checked_out(out: str | Path) -> Path:
    """The path of a file that can be written; missing folders are created."""
    out = check_out("out", out)
    if out.suffix not in ENDINGS:
        raise ValueError(f"--out {out}: end it in {' or '.join(ENDINGS)}")
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; give a file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written: {error.strerror}") from None
    return out


def _extractor(encoder: Encoder, tokens: bool, precision: str) -> Extractor:
    """Normalized images [b, C, H, W] -> [b, D], or [b, N, D] of the patch tokens; float32."""
    pool = pooled(encoder, precision)

    def patch_tokens(images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return encoder(images)[:, encoder.num_prefix_tokens :].float()

    return patch_tokens if tokens else pool


def _schema(source: Source, shape: tuple[int, ...], half: bool) -> pa.Schema:
    value: pa.DataType = pa.float16() if half else pa.float32()
    for side in reversed(shape):
        value = pa.list_(value, side)
    fields = [("index", pa.int64()), ("path", pa.string())]
    if source.labels is not None:
        fields += [("label", pa.int64()), ("class", pa.string())]
    return pa.schema([*fields, ("features", value)])


def _rows(source: Source, index: Tensor, features: Tensor, schema: pa.Schema) -> pa.Table:
    """Convert one batch to a table.

    Raises:
        ValueError: if features are not finite in the data type they are stored in.
    """
    half = pa.types.is_float16(_value_type(schema))
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
        columns += [labels, [_text(source.classes[label]) for label in labels]]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=False)] + [values], schema=schema)


def _text(name: str) -> str:
    """A string as valid UTF-8, as parquet requires."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _value_type(schema: pa.Schema) -> pa.DataType:
    """The data type of the feature values."""
    kind = schema.field("features").type
    while pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    return kind


def _fill(
    parts: "_Parts",
    encoder: Encoder,
    source: Source,
    extract: Extractor,
    console: Console,
    batch_size: int,
    num_workers: int | None,
) -> None:
    """Compute the missing features, in the order of the set."""
    first, start = parts.done, time.monotonic()
    preprocess, device = known_preprocess(encoder), next(encoder.parameters()).device
    loader = EvalLoader(source, preprocess, batch_size, num_workers, np.arange(first, len(source)))
    if first:
        console.say(f"resuming from image {first} of {len(source)}")
    with evaluating(encoder), contextlib.closing(console):
        for batch in loader:
            x = extract(preprocess.normalize(batch.raw.to(device)))
            parts.add(_rows(source, batch.index, x, parts.schema), loader.unreadable)
            end = first + ((int(batch.index[0]) - first) // batch_size + 1) * batch_size  # of the batch's range
            stop = min(len(source), end)
            parts.save_if_due(stop)
            rate = (stop - first) / max(1e-9, time.monotonic() - start)
            left = duration_text((len(source) - stop) / rate)
            console.line(f"{stop} of {len(source)} images  {rate:.0f} images/s  left {left}", stop / len(source))
        parts.note_unreadable(loader.unreadable)
        if parts.done < len(source):
            parts.save(len(source))


class _Parts:
    """Finished parts of a file: one parquet file for each range of indices, which is part of its name.

    Args:
        out: the complete file.
        settings: settings that all parts share.
        schema: schema of the rows.

    Attributes:
        done: the first index that no part covers.
    """

    def __init__(self, out: Path, settings: dict[str, Any], schema: pa.Schema) -> None:
        self.out, self.schema, self.folder = out, schema, out.with_name(out.name + ".parts")
        self._settings, self._file = settings, self.folder / "settings.json"
        self._rows: list[pa.Table] = []
        self._unreadable: list[Report] = []
        self._num_noted = 0  # how many of the loader's unreadable images are recorded
        self._saved = time.monotonic()

    def __enter__(self) -> "_Parts":
        """Lock the folder for this process, and check that its parts have the same settings."""
        try:
            self.folder.mkdir(exist_ok=True)
            self._lock = (self.folder / ".lock").open("w")
        except OSError as error:
            raise ValueError(f"{self.folder} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise ValueError(f"another process is writing {self.out}; wait for it or give another --out") from None
        try:
            if self._file.exists():
                _check_same(self._settings, json.loads(self._file.read_text()), self.folder)
            else:
                write_text(self._file, json.dumps(self._settings))
        except ValueError:
            self._lock.close()
            raise
        self.done = max((int(file.stem.rsplit("-", 1)[1]) for file in self.files()), default=0)
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def files(self) -> list[Path]:
        """Finished parts, in the order of the set."""
        return sorted(self.folder.glob("part-*.parquet"))

    @property
    def num_rows(self) -> int:
        """Rows of the finished parts."""
        return sum(pq.read_metadata(file).num_rows for file in self.files())

    def add(self, rows: pa.Table, unreadable: list[Report]) -> None:
        """Add a batch; ``unreadable`` are all unreadable images of the loader so far."""
        self._rows.append(rows)
        self.note_unreadable(unreadable)

    def note_unreadable(self, unreadable: list[Report]) -> None:
        """Record the new ones among the loader's unreadable images."""
        self._unreadable += unreadable[self._num_noted :]
        self._num_noted = len(unreadable)

    def save_if_due(self, stop: int) -> None:
        """Save a part if enough time has passed or enough rows are in memory."""
        num_bytes = sum(rows.nbytes for rows in self._rows)
        if num_bytes >= PART_BYTES or time.monotonic() - self._saved >= PART_SECONDS:
            self.save(stop)

    def save(self, stop: int) -> None:
        """Save a part that ends before index ``stop``."""
        unreadable = {METADATA_KEY: json.dumps(self._unreadable)}
        table = pa.concat_tables([self.schema.empty_table(), *self._rows]).replace_schema_metadata(unreadable)
        with atomic(self.folder / f"part-{self.done:012d}-{stop:012d}.parquet") as temporary:
            pq.write_table(table, temporary)
        self._rows, self._unreadable, self.done, self._saved = [], [], stop, time.monotonic()

    def unreadable(self) -> list[Report]:
        """The unreadable images of all finished parts."""
        lists = (json.loads(pq.read_schema(file).metadata[METADATA_KEY.encode()]) for file in self.files())
        return [(name, reason) for part in lists for name, reason in part]

    def finish(self, name: str, metadata: dict[str, Any]) -> list[Report]:
        """Merge the parts of a whole set into the file; returns the unreadable images.

        Raises:
            ValueError: if no image of the set ``name`` was readable.
        """
        unreadable = self.unreadable()
        if not self.num_rows:
            self.drop()
            raise ValueError(f"none of the {self.done} images of {name} can be read; {': '.join(unreadable[0])}")
        self.merge(metadata | {"unreadable": unreadable})
        return unreadable

    def merge(self, metadata: dict[str, Any]) -> None:
        """Write the complete file, part by part, then remove the parts."""
        schema = self.schema.with_metadata({METADATA_KEY: json.dumps(metadata)})
        if self.out.suffix == ".npy":
            rows = schema.remove(schema.get_field_index("features"))
            _write_parquet(self._tables(rows.names), rows, rows_file(self.out))
            _write_npy(self._tables(["features"]), self.num_rows, self.schema, self.out)
        else:
            _write_parquet(self._tables(schema.names), schema, self.out)
        self.drop()

    def drop(self) -> None:
        """Remove the parts."""
        shutil.rmtree(self.folder)

    def _tables(self, columns: list[str]) -> Iterator[pa.Table]:
        return (pq.read_table(file, columns=columns) for file in self.files())


def rows_file(npy: Path) -> Path:
    """The path of the table that describes the rows of ``features.npy``."""
    return npy.with_name(npy.stem + ROWS_ENDING)


def _write_parquet(tables: Iterator[pa.Table], schema: pa.Schema, path: Path) -> None:
    with atomic(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for table in tables:
            writer.write_table(table.replace_schema_metadata(schema.metadata))


def _write_npy(tables: Iterator[pa.Table], num_rows: int, schema: pa.Schema, path: Path) -> None:
    """The features of all tables as one array."""
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


def _settings_of(out: Path) -> dict[str, Any]:
    """The settings of a finished file; empty for a file that ``embed`` did not write."""
    file = rows_file(out) if out.suffix == ".npy" else out
    try:
        return json.loads(pq.read_schema(file).metadata[METADATA_KEY.encode()])["settings"]
    except (OSError, ValueError, KeyError, TypeError):  # pyarrow's errors are OSErrors or ValueErrors
        return {}


def _check_same(settings: dict[str, Any], old: dict[str, Any], path: Path) -> None:
    """Raise an error if existing features were made with other settings. Version 0.1 stored more settings."""
    if different := [name for name, value in settings.items() if old.get(name) != value]:
        raise ValueError(
            f"{path} was made with other settings ({', '.join(different)}): delete it, or give another --out"
        )


def _name_unreadable(console: Console, unreadable: list[Report]) -> None:
    for name, reason in unreadable[:_SHOWN]:
        console.warn(f"left out {name}: {reason}")
    if len(unreadable) > _SHOWN:
        console.warn(f"left out {len(unreadable) - _SHOWN} more; the file's metadata lists them all")
