"""Remote shards in a cache that does not hold all of them."""

import contextlib
import itertools
import multiprocessing
import re
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from eight_shards import IMAGES, NUM_SHARDS, SHARDS, SIZE, in_gb, shard
from flaky_server import flaky_server
from image_sets import first_values, smooth_images
from support import TINY, assert_same_bits, mistake

from dmjd.cli.main import main
from dmjd.config.pretrain import PretrainConfig
from dmjd.data.sources import transfer
from dmjd.data.sources.base import RemoteOptions
from dmjd.data.sources.bounded_cache import BoundedCache
from dmjd.data.sources.registry import open_source
from dmjd.data.train_loader import TrainLoader

pytest.importorskip("aiohttp")


@pytest.fixture
def server(monkeypatch):
    """A server of eight shards; waits between attempts are short."""
    monkeypatch.setattr(transfer, "_FIRST_WAIT", 0.01)
    with flaky_server() as server:
        server.files = dict(SHARDS)
        yield server


@pytest.fixture
def url(server) -> str:
    return f"{server.url}/set/{{0..{NUM_SHARDS - 1}}}.tar"


def bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # made room for another one meanwhile
            total += path.stat().st_size if path.suffix in (".tar", ".tmp") else 0
    return total


def loaded(source, workers: int = 0, start_step: int = 0, steps: int = 20):
    loader = TrainLoader(source, img_size=(16, 16), batch_size=4, num_workers=workers, seed=3)
    batches = loader.batches(start_step)
    found = [next(batches).images.clone() for _ in range(steps)]
    batches.close()
    return found


def test_a_loader_reads_all_shards_through_a_small_cache(server, url, tmp_path):
    source = open_source(url, remote=RemoteOptions(str(tmp_path), in_gb(4.5), fetch_ahead=True))
    assert source.windows.size == 2
    assert set(server.requests.values()) == {1}
    whole = loaded(source)
    assert 0 < bytes_below(tmp_path) <= 4.5 * SIZE
    assert sum(server.ranges.values()) == 0
    for workers, start in ((0, 7), (2, 0), (2, 11)):
        again = open_source(url, remote=RemoteOptions(str(tmp_path), in_gb(4.5), fetch_ahead=True))
        assert all(a.equal(b) for a, b in zip(loaded(again, workers, start, 20 - start), whole[start:], strict=True))
        assert bytes_below(tmp_path) <= 4.5 * SIZE


@contextlib.contextmanager
def watched(folder: Path):
    """Watches how many bytes shards take: yields a list, whose only item is the maximum."""
    most, done = [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            most[0] = max(most[0], bytes_below(folder))
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def pretrain_command(url: str, out: Path, cache: Path, *more: object) -> list[str]:
    settings = ["--batch-size", 4, "--cache-dir", cache, "--out", out, "--held-out", 3, *more]
    return [str(a) for a in ("pretrain", "--data", url, *TINY, *settings)]


def test_a_killed_run_goes_on_with_the_same_bits_and_the_cache_stays_small(server, url, tmp_path):
    sizes = ("--cache-gb", in_gb(4.5), "--steps", 9, "--checkpoint-every", 2)
    with watched(tmp_path / "straight_cache") as most:
        assert main(pretrain_command(url, tmp_path / "straight", tmp_path / "straight_cache", *sizes)) == 0
    assert 2 * SIZE < most[0] <= 4.5 * SIZE
    server.faults = {path: ["slow", "slow"] for path in SHARDS} | {"/set/2.tar": ["truncate", "503"]}
    cache, run = tmp_path / "cache", tmp_path / "run"
    command = pretrain_command(url, run, cache, *sizes, "--num-workers", 1)
    with watched(cache) as most:
        process = multiprocessing.get_context("fork").Process(target=main, args=(command,))
        process.start()
        while not any((run / "checkpoints").glob("*.safetensors")) and process.is_alive():
            time.sleep(0.02)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (run / "checkpoints" / "final.safetensors").exists()
        # A larger cache keeps the window that the run began with.
        assert main(pretrain_command(url, run, cache, *sizes, "--cache-gb", in_gb(6.5))) == 0
    assert most[0] <= 6.5 * SIZE
    assert_same_bits(tmp_path / "straight", run)
    assert PretrainConfig.from_json((run / "config.json").read_text()).shard_window == 2


def test_a_cache_that_is_too_small_is_refused(server, url, tmp_path, capsys):
    out, cache = tmp_path / "run", tmp_path / "cache"
    words = mistake(capsys, *pretrain_command(url, out, cache, "--cache-gb", in_gb(1.5), "--steps", 1))
    assert re.search(r"needs (\S+) GB to fetch a shard while another one is read: give --cache-gb \1 or more", words)
    words = mistake(
        capsys, *pretrain_command(url, out, cache, "--cache-gb", in_gb(4.5), "--shard-window", 3, "--steps", 1)
    )
    needed = float(re.search(r"for the two windows of 3 shards .* give --cache-gb (\S+) or more", words)[1])
    assert 5.9 * SIZE < needed * 1e9 < 6.1 * SIZE
    words = mistake(capsys, *pretrain_command(f"{server.url}/set/0.tar", out, cache, "--cache-gb", in_gb(0.5)))
    assert "GB to hold it: give --cache-gb" in words
    assert not server.requests
    assert main(pretrain_command(url, out, cache, "--cache-gb", in_gb(8.5), "--steps", 1)) == 0
    capsys.readouterr()
    words = mistake(capsys, *pretrain_command(url, out, cache, "--cache-gb", in_gb(4.5), "--steps", 2))
    assert "to shuffle all images together, as the run began" in words
    needed = float(re.search(r"give --cache-gb (\S+) or more", words)[1])
    assert main(pretrain_command(url, out, cache, "--cache-gb", needed, "--steps", 2)) == 0


def test_windows_are_for_shards_only(tmp_path, capsys):
    smooth_images(tmp_path / "set", 4)
    command = pretrain_command(str(tmp_path / "set"), tmp_path / "run", tmp_path / "cache", "--shard-window", 2)
    assert "which needs shards; " in mistake(capsys, *command, "--steps", 1)


def test_a_set_that_fits_has_the_order_of_a_set_on_the_disk(server, url, tmp_path):
    source = open_source(url, remote=RemoteOptions(str(tmp_path), in_gb(8.5), fetch_ahead=True))
    assert source.windows is None
    whole = open_source(url, remote=RemoteOptions(str(tmp_path)))
    assert whole.fingerprint() == source.fingerprint()
    assert all(a.equal(b) for a, b in zip(loaded(source), loaded(whole), strict=True))
    assert sum(server.ranges.values()) == 0


def _steps_of(rank, url, cache, barrier, out):
    source = open_source(url, remote=RemoteOptions(cache, in_gb(4.5), fetch_ahead=True))
    loader = TrainLoader(source, img_size=(16, 16), batch_size=4, num_workers=0, rank=rank, world_size=2)
    batches = loader.batches()
    barrier.wait()
    for _ in range(6):  # three of four windows, while the fourth one is fetched
        out.put((rank, next(batches).keys.tolist()))
        barrier.wait()
    while bytes_below(Path(cache)) < 4 * min(map(len, SHARDS.values())):
        time.sleep(0.01)
    batches.close()


def test_processes_share_a_cache_and_fetch_each_shard_once(server, url, tmp_path):
    open_source(url, remote=RemoteOptions(str(tmp_path), in_gb(4.5)))  # indexed
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    server.requests.clear()
    context = multiprocessing.get_context("fork")
    barrier, out = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_steps_of, args=(rank, url, tmp_path, barrier, out)) for rank in range(2)]
    with watched(tmp_path) as most:
        for process in processes:
            process.start()
        keys = [out.get(timeout=60) for _ in range(12)]
        for process in processes:
            process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len({key for _, part in keys for key in part}) == 24
    assert set(server.requests.values()) == {1}
    assert len(server.requests) == NUM_SHARDS
    assert most[0] <= 4.5 * SIZE


def test_a_replaced_shard_is_fetched_again(server, url, tmp_path):
    server.tags = dict.fromkeys(SHARDS, '"1"')
    for remote in (RemoteOptions(str(tmp_path)), RemoteOptions(str(tmp_path), in_gb(8.5), fetch_ahead=True)):
        server.files["/set/3.tar"] = SHARDS["/set/3.tar"]
        server.tags["/set/3.tar"] = '"1"'
        server.requests.clear()
        assert first_values(open_source(url, remote=remote)) == list(range(NUM_SHARDS * IMAGES))
        server.files["/set/3.tar"] = shard(9)[:SIZE].ljust(len(SHARDS["/set/3.tar"]), b"\0")
        server.tags["/set/3.tar"] = '"2"'
        changed = first_values(open_source(url, remote=remote))
        assert changed[12:16] == [36, 37, 38, 39]
        assert server.requests["/set/3.tar"] == 2
        assert server.requests["/set/4.tar"] == 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_processes_whose_step_holds_several_windows_do_not_wait_for_each_other(
    server, url, tmp_path, monkeypatch, accumulate
):
    monkeypatch.setenv("DMJD_TIMEOUT", "0.1")
    barrier, drawn = threading.Barrier(2, timeout=60), [[], []]

    def train(rank: int) -> None:
        source = open_source(url, remote=RemoteOptions(str(tmp_path), in_gb(2.5), fetch_ahead=True))
        assert source.windows.size == 1
        settings = {"batch_size": 16, "num_workers": 0, "rank": rank, "world_size": 2, "accumulate": accumulate}
        batches = TrainLoader(source, img_size=(16, 16), **settings).batches()
        for _ in range(6):
            drawn[rank] += [next(batches).keys for _ in range(accumulate)]
            barrier.wait()
        batches.close()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train, range(2)))
    assert len(torch.cat(drawn[0] + drawn[1]).unique()) == 6 * 16


def test_a_cache_that_is_deleted_is_made_again(server, url, tmp_path):
    server.faults = {path: ["", "slow"] for path in SHARDS}
    cache = tmp_path / "cache"
    source = open_source(url, remote=RemoteOptions(str(cache), in_gb(2.5), fetch_ahead=True))
    batches = TrainLoader(source, img_size=(16, 16), batch_size=4, num_workers=0).batches()
    next(batches)
    cache.rename(tmp_path / "deleted")  # while the next shard arrives
    for _ in range(2 * NUM_SHARDS):
        next(batches)
    assert bytes_below(cache) > 0
    assert len(list(cache.rglob("*.json"))) == 1  # what this process needs
    batches.close()


def test_a_cache_that_fails_ends_training_with_one_line_and_does_not_disturb_its_end(server, url, tmp_path):
    cache = tmp_path / "cache"
    for is_read_on in (True, False):
        source = open_source(url, remote=RemoteOptions(str(cache), in_gb(2.5), fetch_ahead=True))
        batches = TrainLoader(source, img_size=(16, 16), batch_size=4, num_workers=0).batches()
        next(batches)
        cache.rename(tmp_path / f"moved {is_read_on}")
        cache.write_text("a file")
        if is_read_on:
            with pytest.raises(ValueError, match=r"could not write .*: Not a directory"):
                list(itertools.islice(batches, 3 * NUM_SHARDS))
        batches.close()
        cache.unlink()


def test_an_image_whose_copy_cannot_be_read_is_fetched(server, url, tmp_path):
    cache = tmp_path / "cache"
    source = open_source(url, remote=RemoteOptions(str(cache), in_gb(NUM_SHARDS), fetch_ahead=False))
    expected = [np.asarray(source.read(row)) for row in range(3)]
    (moved := tmp_path / "moved").mkdir()
    cache.rename(moved / "cache")
    for _ in ("no such folder", "not a folder"):
        assert [np.array_equal(source.read(row), image) for row, image in enumerate(expected)] == [True] * 3
        cache.write_text("a file")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_ends_a_lease_with_one_line(tmp_path):
    cache = BoundedCache(tmp_path, 9)
    cache.need(())
    with open("/dev/full", "w", encoding="utf-8") as full:
        cache._file, whole = full, cache._file
        with pytest.raises(ValueError, match="could not write /dev/full: "):
            cache.need(())
        cache._file = whole


@pytest.mark.parametrize("size", [0, 10240])
def test_a_shard_that_is_replaced_while_it_is_read_ends_training(server, url, tmp_path, size):
    server.tags = dict.fromkeys(SHARDS, '"1"')
    source = open_source(url, remote=RemoteOptions(str(tmp_path), in_gb(2.5), fetch_ahead=True))
    batches = TrainLoader(source, img_size=(16, 16), batch_size=4, num_workers=0).batches()
    next(batches)
    server.files = {path: content[:-4] + b"abcd" + bytes(size) for path, content in SHARDS.items()}
    server.tags = dict.fromkeys(SHARDS, '"2"')
    with pytest.raises(ValueError, match=r"\d\.tar can't be fetched \(it has changed on the server; the same command"):
        list(itertools.islice(batches, 3 * NUM_SHARDS))


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_images_outside_the_cache_are_read_one_by_one(server, url, tmp_path, knows_ranges):
    server.knows_ranges = knows_ranges
    source = open_source(url, remote=RemoteOptions(str(tmp_path), in_gb(2.5)), labels="column")
    assert source.windows is None
    assert source.labels.tolist() == [0, 1] * (NUM_SHARDS * IMAGES // 2)
    server.faults = {path: ["503", "drop"] for path in SHARDS}
    assert first_values(source) == list(range(NUM_SHARDS * IMAGES))
    assert bool(server.ranges) == knows_ranges
    assert bytes_below(tmp_path) <= 2.5 * SIZE
    server.files.clear()
    with pytest.raises(ConnectionError, match=r"0\.tar can't be fetched \(no such file\)"):
        source.read(0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_server_that_goes_away_ends_training_with_one_line(server, url, tmp_path, workers):
    source = open_source(url, remote=RemoteOptions(str(tmp_path), in_gb(4.5), fetch_ahead=True))
    batches = TrainLoader(source, img_size=(16, 16), batch_size=4, num_workers=workers).batches()
    next(batches)
    server.faults = {path: ["503"] * 99 for path in SHARDS}
    with pytest.raises((ValueError, ConnectionError), match=r"\d\.tar can't be fetched \(the server replied 503, 6 "):
        list(itertools.islice(batches, 20))


def test_several_sets_do_not_share_a_cache_that_is_too_small(server, tmp_path):
    urls = [f"{server.url}/set/{{0..3}}.tar", f"{server.url}/set/{{4..7}}.tar"]
    with pytest.raises(ValueError, match=r"a cache that does not hold all of .*0\.\.3.* work for a single set"):
        open_source(urls, remote=RemoteOptions(str(tmp_path), in_gb(2.5), fetch_ahead=True))
    source = open_source(urls, remote=RemoteOptions(str(tmp_path), in_gb(8.5), fetch_ahead=True))
    assert len(source) == NUM_SHARDS * IMAGES


def test_an_index_that_was_interrupted_goes_on(server, url, tmp_path):
    server.faults["/set/7.tar"] = ["404"]
    with pytest.raises(ValueError, match=r"7\.tar can't be fetched"):
        open_source(url, remote=RemoteOptions(str(tmp_path), in_gb(2.5)))
    server.requests.clear()
    assert len(open_source(url, remote=RemoteOptions(str(tmp_path), in_gb(2.5)))) == NUM_SHARDS * IMAGES
    assert 1 <= sum(server.requests.values()) <= 3
