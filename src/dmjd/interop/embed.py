"""Features of every image of a set as a table, written in parts so that a killed run resumes.

Shapes: b image of a batch, N patch token, D width.
"""

import contextlib
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

from dmjd.checked_json import read_json
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
from dmjd.files import (
    DIGEST_KEY,
    METADATA_KEY,
    atomic,
    check_writable,
    make_folder,
    remove,
    remove_leftovers,
    try_lock,
    write_text,
)
from dmjd.interop.feature_files import (
    PART_NAME,
    DamagedPart,
    check_finished,
    check_same,
    feature_rows,
    feature_schema,
    first_line,
    range_of,
    rows_file,
    unreadable_of,
    write_npy,
    write_parquet,
)
from dmjd.nn.modes import evaluating, own_defaults
from dmjd.regular import check_regular
from dmjd.runs.build import open_images

ENDINGS = (".parquet", ".npy")

PART_SECONDS = 20.0  # between saved parts, so a killed run loses little work

PART_BYTES = 64 << 20  # the most rows held in memory

_SHOWN = 10  # unreadable images named on the terminal; the file's metadata lists all


@own_defaults()
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
    keep_freed_memory(chosen := pick_device(device))
    encoder = load_encoder(run, chosen)
    source = open_images(run, known_preprocess(encoder), data, split, labels=labels)
    extract = _extractor(encoder, tokens, precision)
    settings = {"encoder": weights_hash(encoder), "data": source.fingerprint(), "labels": source.labels is not None}
    settings |= {"content": source.content_hash(), "tokens": bool(tokens), "half": bool(half), "precision": precision}
    console = Console()
    if _is_finished(settings, out, console):
        return out
    shape = (encoder.num_patches, encoder.embed_dim) if tokens else (encoder.embed_dim,)
    with _Parts(out, settings, feature_schema(source, shape, half)) as parts:
        if out.exists():  # by another process, just now
            check_finished(settings, out)
            parts.drop()
        while not parts.dropped:
            _fill(parts, encoder, source, extract, console, batch_size, num_workers)
            parts.finish(source.name, {"settings": settings, "grid": encoder.grid}, console)
    return out


def _check(tokens: bool, half: bool, split: str, *, data: str | Path | None, **settings: Any) -> None:
    """Check the types and values of arguments of :func:`embed`."""
    check_bool("tokens", tokens)
    check_bool("half", half)
    check_text("split", split, SPLITS)
    FrozenConfig(data=None if data is None else str(data), **settings)


def _checked_out(out: str | Path) -> Path:
    """The path of a file that can be written."""
    out = check_out("out", out)
    if out.suffix not in ENDINGS:
        raise ValueError(f"--out {out}: end it in {' or '.join(ENDINGS)}")
    if not out.is_file():
        check_writable(out)
        make_folder(out.parent)
    return out


def _is_finished(settings: dict[str, Any], out: Path, console: Console) -> bool:
    """Whether the file exists with these settings; ValueError for others. Parts that a kill left are deleted."""
    if not out.exists():
        return False
    check_finished(settings, out)
    console.say(f"{out} is finished already")
    folder = _parts_folder(out)
    if folder.is_dir():
        with contextlib.suppress(OSError):
            lock = try_lock(folder / ".lock")
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                lock.close()
    return True


def _parts_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.parts")


def _extractor(encoder: Encoder, tokens: bool, precision: str) -> Extractor:
    """Normalized images [b, C, H, W] -> [b, D], or [b, N, D] of the patch tokens; float32."""
    pool = pooled(encoder, precision)

    def patch_tokens(images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return encoder(images)[:, encoder.num_prefix_tokens :].float()

    return patch_tokens if tokens else pool


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
    gaps, started, computed = parts.gaps(len(source)), time.monotonic(), 0
    if gaps and parts.files():
        console.say(f"resuming from image {gaps[0][0]} of {len(source)}")
    left = sum(last - first for first, last in gaps)
    preprocess, device = known_preprocess(encoder), next(encoder.parameters()).device
    for first, last in gaps:
        loader = EvalLoader(source, preprocess, batch_size, num_workers, np.arange(first, last))
        parts.begin(first)
        with evaluating(encoder), contextlib.closing(console):
            for batch in loader:
                x = extract(preprocess.normalize(batch.raw.to(device)))
                parts.add(feature_rows(source, batch.index, x, parts.schema), loader.unreadable)
                end = first + ((int(batch.index[0]) - first) // batch_size + 1) * batch_size  # of the batch's range
                stop = min(last, end)
                parts.save_if_due(stop)
                done = computed + stop - first
                rate = done / max(1e-9, time.monotonic() - started)
                console.line(
                    f"{stop} of {len(source)} images  {rate:.0f} images/s  left {duration_text((left - done) / rate)}",
                    (len(source) - left + done) / len(source),
                )
            parts.note_unreadable(loader.unreadable)
            if parts.done < last:
                parts.save(last)
        computed += last - first


class _Parts:
    """Finished parts of a file: one parquet file for each range of indices, which is part of its name.

    Args:
        out: the complete file.
        settings: settings that all parts share.
        schema: schema of the rows.

    Attributes:
        done: the end of the last saved part, or the start of the gap that is being filled.
        dropped: whether the parts are deleted, because the complete file is written.
    """

    def __init__(self, out: Path, settings: dict[str, Any], schema: pa.Schema) -> None:
        self.out, self.schema, self.folder = out, schema, _parts_folder(out)
        self._settings, self._file = settings, self.folder / "settings.json"
        self._rows: list[pa.Table] = []
        self._unreadable: list[Report] = []
        self._num_noted = 0  # how many of the loader's unreadable images are recorded
        self._saved = time.monotonic()
        self.done, self.dropped = 0, False

    def __enter__(self) -> "_Parts":
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
        self.done, self._num_noted = first, 0

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
            pq.write_table(table, temporary, write_page_checksum=True)
        self._rows, self._unreadable, self.done, self._saved = [], [], stop, time.monotonic()

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
            raise ValueError(f"none of the {self.done} images of {name} can be read; {': '.join(unreadable[0])}")
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
