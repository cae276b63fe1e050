"""Make the index of a set of shards, once: in parallel, and resumable, since each scanned shard is kept in a cache."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa

from dmjd.data.sources.base import short_hash
from dmjd.data.sources.paths import cache_folder, cache_path
from dmjd.data.sources.progress import counted, locked_aloud
from dmjd.data.sources.remote_shards import RemoteShards
from dmjd.data.sources.shard_index import Shard, ShardIndex, read_if_there
from dmjd.data.sources.shard_scan import scan_shard
from dmjd.data.workers import auto_workers, read_batches
from dmjd.files import make_folder
from dmjd.text import printable

_FEW_BYTES = 1 << 28  # shards that are scanned faster than processes start

_Scanned = tuple[Shard, pa.RecordBatch]

_Task = tuple[Path, str, Path]  # shard, its name, and the file for its index


def index_shards(
    files: Mapping[str, Path], key: str, listed: ShardIndex | None = None, remote: RemoteShards | None = None
) -> ShardIndex:
    """The index of shards, from the cache if they have not changed; only those that have are scanned.

    One process scans and the others of a machine wait for it.

    Args:
        files: name in the index -> file, in the order of the set.
        key: name of the set in the cache, in characters of file names.
        listed: an index that a run keeps, which is used as far as the shards are the same.
        remote: where the files come from, one by one, as far as they are not here.

    Raises:
        ValueError: if a shard cannot be used, with the cure, or the cache cannot be written.
    """
    stamps = [_stamp(name, path) if remote is None else (name, *remote.stamp(path)) for name, path in files.items()]
    if listed is not None and [shard.stamp for shard in listed.shards] == stamps:
        return listed
    written = _cached(cache_path("shards") / f"{key}.arrow")  # without a lock, which a cache that is read-only refuses
    if written is not None and [shard.stamp for shard in written.shards] == stamps:
        return written
    cache = cache_folder("shards", "the index of shards is kept")
    with locked_aloud(cache / f"{key}.lock", f"indexing {len(files)} shards"):
        file, parts = cache / f"{key}.arrow", cache / f"{key}.parts"
        cached = _cached(file)
        if cached is None or [shard.stamp for shard in cached.shards] != stamps:
            known = {} if listed is None else listed.batch_of()
            known |= {} if cached is None else cached.batch_of()
            found = dict(zip(files, _scanned(files, stamps, known, parts, remote), strict=True))
            _check_usable(files, [shard for shard, _ in found.values()])
            cached = ShardIndex([shard for shard, _ in found.values()], [batch for _, batch in found.values()])
            cached = cached.write(file)
            shutil.rmtree(parts, ignore_errors=True)
    return cached


def _scanned(
    files: Mapping[str, Path],
    stamps: Sequence[tuple[str, int, int]],
    known: dict[tuple[str, int, int], _Scanned],
    parts: Path,
    remote: RemoteShards | None,
) -> Iterator[_Scanned]:
    """Each shard with its images: as known, or scanned."""
    tasks: dict[tuple[str, int, int], _Task] = {}
    for stamp, path in zip(stamps, files.values(), strict=True):
        part = parts / f"{short_hash(map(str, stamp))}.arrow"
        done = _cached(part)
        if done is not None and done.shards[0].stamp == stamp:
            known[stamp] = done.shards[0], done.batches[0]
        elif stamp not in known:
            tasks[stamp] = path, stamp[0], part
    if tasks:
        make_folder(parts)
        if remote is None:
            _scan(list(tasks.values()), sum(size for _, size, _ in tasks))
        else:
            _scan_remote(list(tasks.values()), remote)
    for stamp in stamps:
        if stamp in tasks:
            part_index = ShardIndex.read(tasks[stamp][2])
            yield part_index.shards[0], part_index.batches[0]
        else:
            yield known[stamp]


def _scan(tasks: Sequence[_Task], num_bytes: int) -> None:
    """Scan shards, in several processes if they are large, with lines of progress on stderr."""
    workers = 0 if num_bytes < _FEW_BYTES or len(tasks) == 1 else min(auto_workers(), len(tasks))
    for _ in counted(read_batches(_scan_to_file, tasks, workers), "indexing shards, once", len(tasks)):
        pass


def _scan_remote(tasks: Sequence[_Task], remote: RemoteShards) -> None:
    """Fetch and scan shards, a few at a time; scanned ones make room for others."""

    def scan(task: _Task) -> None:
        with remote.needing(task[0]):
            _scan_to_file(task)

    with ThreadPoolExecutor(remote.fetched_at_once) as pool:
        try:
            for _ in counted(pool.map(scan, tasks), "fetching and indexing shards, once", len(tasks)):
                pass
        finally:
            pool.shutdown(cancel_futures=True)


def _scan_to_file(task: _Task) -> None:
    """Scan a shard and write its index."""
    path, name, part = task
    shard, batch = scan_shard(path, name)
    ShardIndex([shard], [batch]).write(part)


def _check_usable(files: Mapping[str, Path], shards: Sequence[Shard]) -> None:
    refused = [shard for shard in shards if shard.refusal is not None]
    if refused:
        others = f" ({len(refused)} of {len(shards)} shards are refused)" if len(refused) > 1 else ""
        raise ValueError(f"{printable(files[refused[0].name])}: {refused[0].refusal}{others}")


def _stamp(name: str, path: Path) -> tuple[str, int, int]:
    """Name, bytes and time of change of a shard."""
    try:
        status = os.stat(path)
    except OSError:
        return name, 0, -1
    return name, status.st_size, status.st_mtime_ns


def _cached(file: Path) -> ShardIndex | None:
    """An index in the cache; None if there is none, or it is damaged."""
    try:
        return read_if_there(file)
    except ValueError:
        return None
