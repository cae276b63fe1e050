"""Remote shards, from a server that fails in every way that servers do."""

import base64
import hashlib
import multiprocessing
import os
import resource
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from flaky_server import flaky_server
from image_sets import first_values, write_table
from support import TINY, final, mistake

from dmjd.cli.main import main
from dmjd.data.sources import remote, transfer
from dmjd.data.sources.base import RemoteOptions
from dmjd.data.sources.registry import absolute, has_split, open_source
from dmjd.warning import DMJDWarning

pytest.importorskip("aiohttp")


@pytest.fixture
def server(shards, monkeypatch):
    """A server of three shards; waits between attempts are short."""
    monkeypatch.setattr(transfer, "_FIRST_WAIT", 0.01)
    with flaky_server() as server:
        server.files = {f"/set/{i}{path.suffix}": path.read_bytes() for i, path in enumerate(sorted(shards.iterdir()))}
        server.files["/set/x-09.zip"], server.files["/set/x-10.zip"] = (
            server.files["/set/1.zip"],
            server.files["/set/2.zip"],
        )
        yield server


def test_shards_are_fetched_once(server):
    url = f"{server.url}/set/x-{{09..10}}.zip"
    source = open_source(url)
    assert first_values(source) == [4, 5, 6, 7, 8, 9, 10, 11]
    assert source.describe(0) == f"{server.url}/set/x-09.zip/4.png"
    assert first_values(open_source(url)) == first_values(source)
    assert set(server.requests.values()) == {1}
    assert absolute(url) == url
    assert not has_split(url, "test")


@pytest.mark.parametrize(
    "faults", [["503", "429"], ["drop"], ["truncate", "truncate"], ["slow"], ["truncate", "500", "drop"]]
)
def test_faults_that_pass(server, faults):
    server.faults = {"/set/0.tar": list(faults)}
    assert first_values(open_source(f"{server.url}/set/0.tar")) == [0, 1, 2, 3]
    assert server.requests["/set/0.tar"] == len(faults) + (faults != ["slow"])


@pytest.mark.parametrize(
    ("name", "fault", "message", "requests"),
    [
        ("0.tar", "503", r"0\.tar can't be fetched \(the server replied 503, 6 attempts\)", 6),
        ("0.tar", "truncate", r"0\.tar can't be fetched \(.*, 6 attempts\)", 6),
        ("0.tar", "403", r"0\.tar can't be fetched \(the server replied 403\)", 1),
        ("none.tar", "404", r"none\.tar can't be fetched \(the server replied 404\)", 1),
    ],
)
def test_faults_that_stay_are_one_line(server, name, fault, message, requests, capsys, tmp_path):
    server.faults = {f"/set/{name}": [fault] * 100}
    with pytest.raises(ValueError, match=message):
        open_source(f"{server.url}/set/{name}")
    assert server.requests[f"/set/{name}"] == requests
    mistake(capsys, "pretrain", "--data", f"{server.url}/set/{name}", "--out", tmp_path / "run", *TINY)
    cache = Path(os.environ["XDG_CACHE_HOME"]) / "dmjd" / "remote"
    assert not [path for path in cache.rglob("*") if path.is_file() and not path.name.endswith(".lock")]


def test_a_server_that_is_gone(server):
    server.shutdown()
    server.server_close()
    with pytest.raises(ValueError, match=r"0\.tar can't be fetched \(.*6 attempts\)"):
        open_source(f"{server.url}/set/0.tar")


def test_a_disk_that_is_too_full(server, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda folder: usage(1 << 28))
    with pytest.raises(ValueError, match=r"the remote files take 0\.0 GB more, .* room for 0\.0 GB: give --cache-dir"):
        open_source(f"{server.url}/set/0.tar")
    assert not server.requests


def test_compressed_and_unknown_addresses(server):
    with pytest.raises(ValueError, match=r"a\.tar\.gz is compressed as a whole"):
        open_source(f"{server.url}/set/a.tar.gz")
    with pytest.raises(ValueError, match="can't be fetched"):
        open_source("nonsense://host/a.tar")
    assert not server.requests


def test_processes_of_a_machine_fetch_a_shard_once(server):
    server.faults = {"/set/0.tar": ["slow"]}
    with multiprocessing.get_context("fork").Pool(3) as pool:
        sources = pool.map(open_source, [f"{server.url}/set/0.tar"] * 3, chunksize=1)
    assert len({source.fingerprint() for source in sources}) == 1
    assert server.requests["/set/0.tar"] == 1


def test_a_run_resumes_exactly_after_its_cache_is_gone(server, tmp_path):
    command = ["pretrain", "--data", f"{server.url}/set/x-{{09..10}}.zip", *TINY, "--batch-size", "4", "--out"]
    assert main([*command, str(tmp_path / "straight"), "--steps", "4"]) == 0
    assert main([*command, str(tmp_path / "run"), "--steps", "4", "--checkpoint-every", "2"]) == 0
    (tmp_path / "run" / "checkpoints" / "final.safetensors").unlink()
    shutil.rmtree(Path(os.environ["XDG_CACHE_HOME"]) / "dmjd")
    assert main([*command, str(tmp_path / "run"), "--steps", "4", "--checkpoint-every", "2"]) == 0
    straight, resumed = final(tmp_path / "straight"), final(tmp_path / "run")
    assert all(resumed[name].equal(value) for name, value in straight.items())


def test_addresses_that_look_alike_have_copies_of_their_own():
    names = [
        transfer.RemoteFile(f"http://h/set/{path}", None, 0).local_name
        for path in ("my%20set/a.tar", "my_set/a.tar", "my%3Aset/a.tar", f"{'x' * 300}/a.tar", f"{'x' * 301}/a.tar")
    ]
    assert len(set(names)) == len(names)
    assert "secret" not in transfer.RemoteFile("http://user:secret@h/a.tar", None, 0).local_name


@pytest.mark.parametrize("numbers", ["{9..0}", "{0..9999999999}"])
def test_ranges_that_name_nothing_or_too_much(numbers):
    with pytest.raises(ValueError, match="a range such as"):
        open_source(f"https://h/a-{numbers}.tar")


def test_copies_serve_while_the_server_is_gone(server):
    url = f"{server.url}/set/x-09.zip"
    first = first_values(open_source(url))
    server.shutdown()
    server.server_close()
    with pytest.warns(DMJDWarning, match="the copies in the cache are used"):
        assert first_values(open_source(url)) == first


def test_a_table_is_fetched(server, tmp_path):
    write_table(tmp_path / "a.parquet", [3, 4])
    server.files["/set/a.parquet"] = (tmp_path / "a.parquet").read_bytes()
    source = open_source(f"{server.url}/set/a.parquet")
    assert first_values(source) == [3, 4]
    assert source.describe(0) == "row 0 of a.parquet"
    assert source.fingerprint() == open_source(tmp_path / "a.parquet").fingerprint()
    with pytest.raises(ValueError, match=r"images/ is the address of no images: give that of \.tar"):
        open_source(f"{server.url}/images/")


def test_the_address_of_a_file_is_its_path(shards):
    url = f"FILE://{shards}/a.tar"
    assert first_values(open_source(url)) == [0, 1, 2, 3]
    assert absolute(url) == str(shards / "a.tar")
    assert not (Path(os.environ["XDG_CACHE_HOME"]) / "dmjd" / "remote").exists()


@pytest.mark.parametrize("remote", [RemoteOptions(), RemoteOptions(cache_gb=1.0)])
def test_a_disk_that_fills_up(server, remote):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        with pytest.raises(ValueError, match=r"\(the disk of the cache: file too large\): free \S+ GB for it, or give"):
            open_source(f"{server.url}/set/0.tar", remote=remote)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert first_values(open_source(f"{server.url}/set/0.tar", remote=remote)) == [0, 1, 2, 3]


def test_what_arrives_must_match_the_checksum(server):
    content = server.files["/set/0.tar"]
    server.digests = {"/set/0.tar": base64.b64encode(hashlib.md5(content).digest()).decode()}
    server.faults = {"/set/0.tar": ["damage", "damage"]}
    assert first_values(open_source(f"{server.url}/set/0.tar")) == [0, 1, 2, 3]
    assert server.requests["/set/0.tar"] == 3
