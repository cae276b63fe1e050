"""Remote shards that move to another address, to a folder and back, or are replaced."""

import os
import shutil
import signal

import fsspec
import pytest
from eight_shards import IMAGES, NUM_SHARDS, SHARDS, in_gb, shard
from flaky_server import flaky_server
from support import TINY, TINY_FIELDS, assert_same_bits, mistake

import dmjd
from dmjd.cli.main import main
from dmjd.config import recipes
from dmjd.data.sources import transfer
from dmjd.data.sources.base import RemoteOptions
from dmjd.data.sources.registry import open_source
from dmjd.data.sources.transfer import ChangedFile

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


@pytest.mark.parametrize("cache_gb", [in_gb(4.5), None])
def test_a_run_goes_on_from_a_mirror_from_copies_on_the_disk_and_back(server, url, tmp_path, cache_gb):
    """The window of two shards stays, which the first cache asked for; an unreadable image counts once."""
    server.files["/set/3.tar"] = SHARDS["/set/3.tar"].replace(b"\x89PNG", b"\x89GNP", 1)
    copies = tmp_path / "copies"
    copies.mkdir()
    for path in SHARDS:
        (copies / path[5:]).write_bytes(server.files[path])
    server.files |= {f"/other/place/{path[5:]}": content for path, content in server.files.items()}
    mirror = url.replace("127.0.0.1", "localhost").replace("/set/", "/other/place/")
    settings = {"steps": 15, "batch_size": 4, "held_out": 3, "num_workers": 0, "cache_dir": tmp_path / "cache"}

    def train(data: object, out: str, stop_after: int | None = None) -> None:
        def stop(report) -> None:
            if report.state.step == stop_after:
                os.kill(os.getpid(), signal.SIGTERM)

        size = cache_gb if "://" in str(data) else None
        config = recipes.folder(str(data), str(tmp_path / out), **TINY_FIELDS, **settings, cache_gb=size)
        dmjd.pretrain(config, hooks=[stop])

    train(url, "straight")
    for stop_after, data in ((3, url), (6, mirror), (9, copies), (12, copies / "*.tar"), (None, mirror)):
        train(data, "run", stop_after)
    assert_same_bits(tmp_path / "straight", tmp_path / "run")
    name = f"{mirror.partition('{')[0]}3.tar/012.png"
    assert [line.partition("\t")[0] for line in (tmp_path / "run" / "unreadable.txt").read_text().splitlines()] == [
        name
    ]


def test_other_shards_of_the_same_names_are_refused(server, url, tmp_path, capsys):
    out, cache = tmp_path / "run", tmp_path / "cache"
    settings = [*TINY, "--batch-size", 4, "--held-out", 3, "--cache-gb", in_gb(4.5), "--cache-dir", cache, "--out", out]
    command = [str(a) for a in ("pretrain", *settings, "--data")]
    assert main([*command, url, "--steps", "1"]) == 0
    server.files |= {f"/other/{number}.tar": shard(number, seed=1) for number in range(NUM_SHARDS)}
    capsys.readouterr()
    words = mistake(capsys, *command, url.replace("/set/", "/other/"), "--steps", 2)
    assert "differ from those this run began with" in words


@pytest.mark.parametrize("sign", ["tags", "times", "size"])
def test_images_of_a_shard_that_is_replaced_are_not_read_one_by_one(server, url, tmp_path, sign):
    signs = {"tags": server.tags, "times": server.times}.get(sign, {})
    signs |= dict.fromkeys(SHARDS, '"1"')
    source = open_source(url, remote=RemoteOptions(str(tmp_path), in_gb(2.5)))
    shutil.rmtree(tmp_path)
    assert int(source.read(0)[0, 0, 0]) == 0
    signs |= dict.fromkeys(SHARDS, '"2"')
    more = 10240 if sign == "size" else 0
    server.files = {path: content[:-4] + b"abcd" + bytes(more) for path, content in SHARDS.items()}
    with pytest.raises(ChangedFile, match=r"0\.tar can't be fetched \(it has changed on the server; the same command"):
        source.read(1)


def test_another_protocol_than_that_of_the_web_has_the_same_images(server, url, tmp_path):
    """Any file system of fsspec will do; here one in memory."""
    other = fsspec.filesystem("memory")
    for path, content in SHARDS.items():
        with other.open(path, "wb") as file:
            file.write(content)
    with other.open("/set/list.csv", "wb") as file:
        file.write(b"path,label\n" + b"".join(b"%d.tar,a\n" % i for i in range(3)))
    try:
        options = RemoteOptions(cache_dir=str(tmp_path))
        first, second = (open_source(address, remote=options) for address in (url, "memory://set/*.tar"))
        assert len(first) == len(second) == NUM_SHARDS * IMAGES
        assert first.fingerprint() == second.fingerprint()
        assert len(open_source("memory://set/list.csv", remote=options)) == 3
    finally:
        other.rm("/set", recursive=True)
