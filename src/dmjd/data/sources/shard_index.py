"""The index of a set of shards: which images each shard holds, and where.

It is a file in Arrow's format, which is mapped into memory: an image costs no Python object, and all processes of a
machine share the pages. Each shard is a record batch.
"""

import bisect
import contextlib
import hashlib
import json
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dmjd.checked_json import parse_json
from dmjd.files import METADATA_KEY, atomic
from dmjd.regular import check_regular
from dmjd.text import printable

# ``packed`` bytes at ``offset`` of the shard hold the image; ``size`` is what they unpack to, -1 if they are stored.
# ``crc`` is the CRC-32 of what it unpacks to, -1 if the shard does not tell.
# The label is a member of its own; ``label_kind`` 0: the image has none.
SCHEMA = pa.schema(
    [
        ("name", pa.binary()),
        ("offset", pa.int64()),
        ("packed", pa.int64()),
        ("size", pa.int64()),
        ("crc", pa.int64()),
        ("label_kind", pa.int8()),
        ("label_offset", pa.int64()),
        ("label_packed", pa.int64()),
        ("label_size", pa.int64()),
    ]
)

_FORMER = SCHEMA.remove(SCHEMA.get_field_index("crc"))  # of runs that began before it was checked

MISSING = -1  # the offset of an image that its shard does not hold any more


class Shard(msgspec.Struct, frozen=True):
    """A shard as it was scanned.

    Attributes:
        name: path below the folder of the set, with "/".
        size: its bytes.
        mtime: time of its last change, in ns.
        images: number of its images.
        problem: what is wrong with it, in a few words; None: nothing. What lies before the damage counts.
        refusal: why it cannot be used at all; None: it can.
        left_out: what was left out besides its images, such as "3 masks"; None: nothing.
    """

    name: str
    size: int
    mtime: int
    images: int = 0
    problem: str | None = None
    refusal: str | None = None
    left_out: str | None = None

    @property
    def stamp(self) -> tuple[str, int, int]:
        """What tells whether the file has changed."""
        return self.name, self.size, self.mtime


class _Metadata(msgspec.Struct):
    shards: list[Shard]


class Extent(NamedTuple):
    """Where a member lies: ``packed`` bytes at ``offset``, which unpack to ``size`` bytes; -1: they are stored.

    ``crc`` is the CRC-32 of what they unpack to; -1: it is not known.
    """

    offset: int
    packed: int
    size: int
    crc: int = -1


class ShardIndex:
    """The images of a set of shards, in the order of the shards and of each shard's members.

    Attributes:
        shards: the shards.
        batches: one for each shard, in :data:`SCHEMA`.
        file: the file that they are mapped from; None: they are in memory.
    """

    def __init__(self, shards: list[Shard], batches: list[pa.RecordBatch], file: Path | None = None) -> None:
        self.shards, self.batches, self.file = shards, batches, file
        self._ends = list(accumulate(batch.num_rows for batch in batches))
        self._extents = [tuple(batch.column(i).to_numpy() for i in (1, 2, 3, 4)) for batch in batches]  # without a copy

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __reduce__(self) -> tuple[Any, ...]:
        """Processes that are started afresh map the file again."""
        if self.file is None:
            return ShardIndex, (self.shards, self.batches)
        return _mapped, (self.file, self.shards)

    def locate(self, index: int) -> tuple[int, int]:
        """The shard of an image, and its number in the shard."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect.bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)

    def extent(self, shard: int, row: int) -> Extent:
        """Where an image lies in its shard."""
        return Extent(*(int(column[row]) for column in self._extents[shard]))

    def name(self, shard: int, row: int) -> str:
        """The name of an image in its shard."""
        return str(self.batches[shard].column(0)[row].as_py().decode("utf-8", "surrogateescape"))

    def sizes(self) -> np.ndarray:
        """The bytes of each image, unpacked: [n] int64; -1 for those that are missing."""
        if not len(self):
            return np.empty(0, np.int64)
        return np.concatenate([np.where(size < 0, packed, size) for _, packed, size, _ in self._extents])

    def identity(self) -> str:
        """Hash of the names and sizes of all images, and of the shards' names; folders and times do not matter."""
        digest = hashlib.sha256(self.sizes().tobytes())
        for shard, batch in zip(self.shards, self.batches, strict=True):
            digest.update(f"{shard.name} {shard.images}\0".encode("utf-8", "surrogateescape"))
            for part in _bytes_of(batch.column(0)):
                digest.update(part)
        return digest.hexdigest()

    def write(self, file: Path) -> "ShardIndex":
        """Write the file, atomically, and return the index mapped from it.

        Raises:
            ValueError: if the disk is full or the folder is not writable.
        """
        content = json.dumps({"shards": [msgspec.structs.asdict(shard) for shard in self.shards]})
        schema = SCHEMA.with_metadata({METADATA_KEY: content})
        with atomic(file) as temporary, pa.ipc.new_file(temporary, schema) as writer:
            for batch in self.batches:
                writer.write_batch(batch.replace_schema_metadata({METADATA_KEY: content}))
        return _mapped(file, self.shards)

    @classmethod
    def read(cls, file: Path) -> "ShardIndex":
        """Map a file of :meth:`write`.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is damaged.
        """
        name = f"{printable(file)} is not an index of shards: delete it, and the shards are scanned again"
        try:
            check_regular(file)
            reader = pa.ipc.open_file(pa.memory_map(str(file)))
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            metadata = (reader.schema.metadata or {}).get(METADATA_KEY.encode(), b"")
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ValueError(f"{name} ({error})") from None
        shards = parse_json(metadata, _Metadata, name).shards
        if reader.schema.equals(_FORMER):
            batches = [_with_crc(batch) for batch in batches]
        elif not reader.schema.equals(SCHEMA):
            raise ValueError(f"{name} (its columns are others)")
        if [s.images for s in shards] != [b.num_rows for b in batches]:
            raise ValueError(f"{name} (its content does not fit together)")
        return cls(shards, batches, file)

    def batch_of(self) -> dict[tuple[str, int, int], tuple[Shard, pa.RecordBatch]]:
        """Shard and batch by the shard's stamp."""
        return {shard.stamp: (shard, batch) for shard, batch in zip(self.shards, self.batches, strict=True)}


def _with_crc(batch: pa.RecordBatch) -> pa.RecordBatch:
    """A batch of :data:`_FORMER`, with unknown checksums."""
    columns = list(batch.columns)
    columns.insert(SCHEMA.get_field_index("crc"), pa.array(np.full(batch.num_rows, -1)))
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _mapped(file: Path, shards: list[Shard]) -> ShardIndex:
    """The index in a file, which must be of these shards."""
    index = ShardIndex.read(file)
    if index.shards != shards:
        raise ValueError(f"{printable(file)} has been replaced: another process indexed the shards; start again")
    return index


def read_if_there(file: Path | None) -> ShardIndex | None:
    """The index in a file; None if there is no such file.

    Raises:
        ValueError: if the file is damaged.
    """
    with contextlib.suppress(FileNotFoundError):
        return None if file is None else ShardIndex.read(file)
    return None


def _bytes_of(names: pa.Array) -> tuple[bytes, pa.Buffer | bytes]:
    """The lengths of all names, and their bytes."""
    _, ends_buffer, content = names.buffers()
    if not len(names):
        return b"", b""
    ends = np.frombuffer(ends_buffer, np.int32)[names.offset : names.offset + len(names) + 1]
    return np.diff(ends).tobytes(), content[int(ends[0]) : int(ends[-1])] if ends[-1] > ends[0] else b""


def aligned(listed: ShardIndex, now: ShardIndex) -> ShardIndex:
    """The images that a run began with, where they lie now, by shard and name; those that are gone are missing.

    Args:
        listed: the index that the run began with.
        now: the index of the shards as they are.
    """
    if [shard.stamp for shard in listed.shards] == [shard.stamp for shard in now.shards]:
        return listed
    by_name = {shard.name: (shard, batch) for shard, batch in zip(now.shards, now.batches, strict=True)}
    pairs = zip(listed.shards, listed.batches, strict=True)
    found = [_aligned(shard, batch, *by_name.get(shard.name, (None, None))) for shard, batch in pairs]
    return ShardIndex([shard for shard, _ in found], [batch for _, batch in found])


def _aligned(
    shard: Shard, batch: pa.RecordBatch, now: Shard | None, batch_now: pa.RecordBatch | None
) -> tuple[Shard, pa.RecordBatch]:
    """The rows of a shard that a run began with, as they are now."""
    if now is None or batch_now is None:  # the shard is gone, and all of its images with it
        stamped, batch_now = shard, batch.slice(0, 0)
    else:
        stamped = Shard(shard.name, now.size, now.mtime, shard.images, now.problem, now.refusal, now.left_out)
    names = batch.column(0)
    if names.equals(batch_now.column(0)):
        return stamped, batch_now
    rows = pc.index_in(names, value_set=batch_now.column(0))
    taken = batch_now.take(rows)
    columns = [pc.fill_null(taken.column(name), 0 if name == "label_kind" else MISSING) for name in SCHEMA.names[1:]]
    return stamped, pa.RecordBatch.from_arrays([names, *columns], schema=SCHEMA)
