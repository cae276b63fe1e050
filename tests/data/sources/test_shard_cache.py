"""The index of shards is made once, in parallel, and goes on after a kill."""

import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from archives import cut, zipped
from image_sets import first_values, png

from dmjd.data.sources import progress, shard_cache
from dmjd.data.sources.registry import open_source
from dmjd.data.sources.shard_index import ShardIndex


def test_the_index_is_kept_and_only_changed_shards_are_scanned_again(shards, monkeypatch):
    scanned = []
    monkeypatch.setattr(
        shard_cache,
        "scan_shard",
        lambda path, name, scan=shard_cache.scan_shard: (scanned.append(name), scan(path, name))[1],
    )
    fingerprint = open_source(shards).fingerprint()
    assert (open_source(shards).fingerprint(), scanned) == (fingerprint, ["a.tar", "b.zip", "c.zip"])
    os.utime(shards / "b.zip", ns=(5, 5))
    assert (open_source(shards).fingerprint(), scanned[3:]) == (fingerprint, ["b.zip"])  # times do not count
    zipped(shards / "b.zip", {"0.png": png(0)})
    assert open_source(shards).fingerprint() != fingerprint
    shutil.copytree(shards, shards.parent / "elsewhere")
    assert open_source(shards.parent / "elsewhere").fingerprint() == open_source(shards).fingerprint()


def test_a_scan_that_was_killed_goes_on(shards, monkeypatch):
    scanned, scan = [], shard_cache.scan_shard

    def killed(path, name):
        scanned.append(name)
        if len(scanned) == 2:
            raise KeyboardInterrupt
        return scan(path, name)

    monkeypatch.setattr(shard_cache, "scan_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        open_source(shards)
    assert len(open_source(shards)) == 12
    assert scanned == ["a.tar", "b.zip", "b.zip", "c.zip"]
    cache = Path(os.environ["XDG_CACHE_HOME"]) / "dmjd" / "shards"
    assert not list(cache.glob("*.parts"))
    for file in cache.glob("*.arrow"):  # a damaged cache is made again
        cut(file, 100)
    assert len(open_source(shards)) == 12


def test_several_processes_scan_with_progress(shards, monkeypatch, capsys):
    monkeypatch.setattr(shard_cache, "_FEW_BYTES", 0)
    monkeypatch.setattr(progress, "_FIRST_SECONDS", 0.0)
    monkeypatch.setattr(shard_cache, "auto_workers", lambda: 2)
    assert first_values(open_source(shards)) == list(range(12))
    assert "indexing shards, once: 1 of 3" in capsys.readouterr().err


def test_processes_that_start_together_scan_once(shards, monkeypatch, tmp_path):
    def slow(path, name, scan=shard_cache.scan_shard):
        with open(tmp_path / "scanned.txt", "a") as file:
            file.write(f"{name}\n")
        time.sleep(0.1)
        return scan(path, name)

    monkeypatch.setattr(shard_cache, "scan_shard", slow)
    with multiprocessing.get_context("fork").Pool(3) as pool:
        sources = pool.map(open_source, [shards] * 3, chunksize=1)
    assert len({source.fingerprint() for source in sources}) == 1
    assert (tmp_path / "scanned.txt").read_text().split() == ["a.tar", "b.zip", "c.zip"]


def test_a_command_that_was_killed_while_it_scans_goes_on(shards, tmp_path):
    """By a signal that cannot be caught: what was scanned stays, and no lock remains."""
    code = """
import sys, time
from dmjd.data.sources import progress, shard_cache
from dmjd.data.sources.registry import open_source
scan = shard_cache.scan_shard
def slow(path, name):
    if name == "b.zip":
        print("here", flush=True)
        time.sleep(60)
    return scan(path, name)
shard_cache.scan_shard = slow
open_source(sys.argv[1])
"""
    with subprocess.Popen([sys.executable, "-c", code, str(shards)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"here\n"
        process.kill()
    cache = Path(os.environ["XDG_CACHE_HOME"]) / "dmjd" / "shards"
    assert len(list(cache.glob("*.parts/*.arrow"))) == 1
    assert first_values(open_source(shards)) == list(range(12))


def test_a_cache_that_cannot_be_written_is_named(shards, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="set XDG_CACHE_HOME to a folder that can be"):
        open_source(shards)


def test_another_process_maps_the_index_instead_of_copying_it(shards):
    source = open_source(shards)
    assert len(pickle.dumps(source)) < 3000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(first_values, (source,)) == list(range(12))
    memory = ShardIndex(source._index.shards, source._index.batches)
    assert pickle.loads(pickle.dumps(memory)).identity() == source._index.identity()


def test_a_valid_index_in_a_cache_that_cannot_be_written_is_used(shards, monkeypatch):
    fingerprint = open_source(str(shards)).fingerprint()
    monkeypatch.setattr(shard_cache, "cache_folder", lambda *_: pytest.fail("the cache is not to be written"))
    assert open_source(str(shards)).fingerprint() == fingerprint


def test_a_wait_for_another_process_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "_PATIENCE", 0.05)
    with progress.locked_aloud(tmp_path / "a.lock", "indexing 3 shards"):
        waiting = threading.Thread(
            target=lambda: progress.locked_aloud(tmp_path / "a.lock", "indexing 3 shards").__enter__()
        )
        waiting.start()
        while not (told := capsys.readouterr().err):
            time.sleep(0.01)
    waiting.join()
    assert told == "waiting for another process: indexing 3 shards\n"
