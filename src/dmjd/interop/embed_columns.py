"""What needs the features of a whole set: columns of near duplicates and distances, and a list without duplicates.

They are made from the finished file of :func:`~dmjd.interop.embed.embed`, in a second pass. Features are held in main
memory, and once more on the device: 1.5 GB for a million images and a width of 384.

Shapes: n images, D width of a feature.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from dmjd.checked_json import parse_json
from dmjd.config.checks import check_bool
from dmjd.data.sources.base import Source
from dmjd.engine.console import Console
from dmjd.files import METADATA_KEY
from dmjd.interop.feature_files import rows_file, write_parquet
from dmjd.interop.kept import check_kept, write_kept
from dmjd.similarity import check_threshold, near_duplicates, nearest_neighbors

DUPLICATE, DISTANCE = "duplicate_of", "distance"  # columns

_COLUMNS = "columns"  # in the metadata of the file: column -> its setting


class SecondPass:
    """What is wanted of the whole set.

    Args:
        duplicates: smallest centered cosine of near duplicates for the column ``duplicate_of``; None: no such column.
        distances: whether there is a column ``distance``.
        deduplicate: the same for the list of images to keep; None: no list.

    Raises:
        ValueError: for a threshold that is no cosine from 0 to 1.
    """

    def __init__(self, duplicates: float | None, distances: bool, deduplicate: float | None) -> None:
        self.columns: dict[str, Any] = {}
        if duplicates is not None:
            self.columns[DUPLICATE] = check_threshold("duplicates", duplicates)
        if check_bool("distances", distances):
            self.columns[DISTANCE] = True
        self.deduplicate = None if deduplicate is None else check_threshold("deduplicate", deduplicate)
        self._found: dict[float, Tensor] = {}

    def check(self, source: Source, split: str, tokens: bool) -> None:
        """Check before the work that it can be done; ValueError if not."""
        if not self.columns and self.deduplicate is None:
            return
        if tokens:
            raise ValueError("duplicates, distances and deduplicate compare pooled features: leave tokens out")
        if len(source) < 2:
            raise ValueError(f"{source.name} has one image: there is nothing to compare it with")
        if self.deduplicate is not None:
            check_kept(source, split)

    def run(self, out: Path, source: Source, device: torch.device, console: Console) -> None:
        """Add the columns to the finished file, unless it has them, and write the list.

        Raises:
            ValueError: if fewer than two images are readable, or the list cannot be written.
        """
        rows = rows_file(out) if out.suffix == ".npy" else out
        schema = pq.read_schema(rows)
        metadata = parse_json(schema.metadata[METADATA_KEY.encode()], dict[str, Any], str(rows))
        present = metadata.get(_COLUMNS, {})
        missing = {name: value for name, value in self.columns.items() if present.get(name) != value}
        if not missing and self.deduplicate is None:
            return
        features = _read_features(out, rows)
        if len(features) < 2:
            raise ValueError(f"only one image of {source.name} is readable: there is nothing to compare it with")
        if missing:
            added = {name: self._column(name, rows, features, device) for name in missing}
            described = metadata | {_COLUMNS: present | missing}
            _rewrite(rows, added, described)
        if self.deduplicate is not None:
            kept = self._first(self.deduplicate, features, device) < 0
            index = pq.read_table(rows, columns=["index"])["index"].to_numpy()
            settings = metadata["settings"] | {"deduplicate": self.deduplicate}
            file = write_kept(out, source, index[kept.numpy()], settings)
            console.say(f"{int(kept.sum()):,} of {len(source):,} images are kept: {file}")

    def _first(self, threshold: float, features: Tensor, device: torch.device) -> Tensor:
        """:func:`near_duplicates`, computed once for each threshold."""
        if threshold not in self._found:
            self._found[threshold] = near_duplicates(features, threshold, device)
        return self._found[threshold]

    def _column(self, name: str, rows: Path, features: Tensor, device: torch.device) -> pa.Array:
        if name == DISTANCE:
            cosines, _ = nearest_neighbors(features, 1, device)
            return pa.array((1 - cosines[:, 0]).numpy(), pa.float32())
        first = self._first(self.columns[DUPLICATE], features, device)
        paths = pq.read_table(rows, columns=["path"])["path"].combine_chunks()
        named = paths.take(pa.array(first.clamp(min=0).numpy()))
        return pa.compute.if_else(pa.array((first >= 0).numpy()), named, "")


def _read_features(out: Path, rows: Path) -> Tensor:
    """The features of a finished file: [n, D] float32."""
    if out.suffix == ".npy":
        return torch.from_numpy(np.load(out).astype(np.float32, copy=False))
    with pq.ParquetFile(rows) as file:
        width = file.schema_arrow.field("features").type.list_size
        features, done = torch.empty(file.metadata.num_rows, width), 0
        for batch in file.iter_batches(columns=["features"]):
            values = batch["features"].flatten().to_numpy(zero_copy_only=False)
            part = torch.from_numpy(values.astype(np.float32)).view(-1, width)
            features[done : done + len(part)] = part
            done += len(part)
    return features


def _rewrite(rows: Path, added: dict[str, pa.Array], metadata: dict[str, Any]) -> None:
    """Write a file again with columns at the end, which replace those of the same names."""
    with pq.ParquetFile(rows) as file:
        old = [field for field in file.schema_arrow if field.name not in added]
        fields = [*old, *(pa.field(name, values.type) for name, values in added.items())]
        schema = pa.schema(fields, metadata={METADATA_KEY: json.dumps(metadata)})

        def tables() -> Iterator[pa.Table]:
            done = 0
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=[field.name for field in old])
                for name, values in added.items():
                    table = table.append_column(name, values.slice(done, len(table)))
                done += len(table)
                yield table

        write_parquet(tables(), schema, rows)
