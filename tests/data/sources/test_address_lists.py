"""Lists of images at addresses, from a server that fails in every way that servers do."""

import json
import os
import resource
import shutil
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flaky_server import flaky_server
from image_sets import first_values, png
from support import TINY, assert_same_bits, mistake

from dmjd.cli.main import main
from dmjd.data.sources import transfer
from dmjd.data.sources.base import RemoteOptions
from dmjd.data.sources.registry import has_split, open_source
from dmjd.data.train_loader import TrainLoader
from dmjd.images.stored import UnreadableImage

pytest.importorskip("aiohttp")

COUNT = 12


@pytest.fixture
def server(monkeypatch):
    """A server of twelve images and a list of them; waits between attempts are short."""
    monkeypatch.setattr(transfer, "_FIRST_WAIT", 0.01)
    with flaky_server() as server:
        server.files = {f"/set/images/{i:02}.png": png(i) for i in range(COUNT)}
        server.files["/set/list.txt"] = "".join(f"images/{i:02}.png\n" for i in range(COUNT)).encode()
        yield server


def image_cache() -> Path:
    return Path(os.environ["XDG_CACHE_HOME"]) / "dmjd" / "images"


def test_images_of_a_remote_list_are_fetched_once(server):
    url = f"{server.url}/set/list.txt"
    source = open_source(url)
    assert first_values(source) == list(range(COUNT))
    assert source.describe(3) == f"{server.url}/set/images/03.png"
    assert first_values(open_source(url)) == list(range(COUNT))
    assert set(server.requests.values()) == {1}
    next(path for path in image_cache().glob("*/*") if path.is_file()).write_bytes(b"cut short")
    assert first_values(open_source(url)) == list(range(COUNT))
    assert sum(server.requests.values()) == COUNT + 2
    assert not has_split(url, "test")


def test_rows_are_relative_to_the_list_or_addresses(server, tmp_path):
    server.files["/other/a b%#1.png"] = server.files["/other/a%20b%25%231.png"] = png(50)
    rows = ["path,label,split"]
    rows += [f"./images/{i:02}.png,{'ab'[i % 2]},{'train' if i < 8 else 'test'}" for i in range(10)]
    rows += ["../other/a b%#1.png,b,train", "/set/images/10.png,a,train", f"{server.url}/set/images/11.png,a,train"]
    server.files["/set/list.csv"] = "\n".join(rows).encode()
    url = f"{server.url}/set/list.csv"
    source = open_source(url, labels="column")
    assert first_values(source) == [*range(8), 50, 10, 11]
    assert [source.class_of(i) for i in range(11)] == [*"abababab", *"baa"]
    assert has_split(url, "test")
    assert not has_split(url, "val")
    test = open_source(url, split="test", labels="column")
    assert (first_values(test), test.labels.tolist()) == ([8, 9], [0, 1])
    folders = open_source(url, labels="folder")
    assert sorted(folders.classes) == ["other", "set"]
    (tmp_path / "addresses.txt").write_text(f"{server.url}/set/images/04.png\n{server.url}/set/images/02.png\n")
    assert first_values(open_source(tmp_path / "addresses.txt")) == [4, 2]
    (tmp_path / "mixed.txt").write_text(f"{server.url}/set/images/04.png\nlocal.png\n")
    with pytest.raises(ValueError, match=r"line 2 of .*mixed\.txt is a path \(local\.png\) where others are addresses"):
        open_source(tmp_path / "mixed.txt")
    server.files["/set/twice.txt"] = b"images/01.png\nimages/./01.png\n"
    with pytest.raises(ValueError, match=r"line 2 of .* names the image of line 1 again"):
        open_source(f"{server.url}/set/twice.txt")


def test_a_remote_list_of_files_of_this_machine(server, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(COUNT):
        (tmp_path / "images" / f"{i:02}.png").write_bytes(png(100 + i))
    pq.write_table(pa.table({"path": ["images/03.png", "images/01.png"]}), tmp_path / "list.parquet")
    server.files["/set/list.parquet"] = (tmp_path / "list.parquet").read_bytes()
    assert first_values(open_source(f"{server.url}/set/list.txt", root=tmp_path)) == [100 + i for i in range(COUNT)]
    assert first_values(open_source(f"{server.url}/set/list.parquet", root=tmp_path)) == [103, 101]
    assert first_values(open_source(f"{server.url}/set/list.parquet")) == [3, 1]


def test_faults_that_pass_and_images_that_are_missing(server):
    source = open_source(f"{server.url}/set/list.txt")
    server.faults = {"/set/images/00.png": ["503", "drop"], "/set/images/01.png": ["truncate"]}
    del server.files["/set/images/02.png"]
    source.prepare(range(COUNT))
    assert [int(source.read(i)[0, 0, 0]) for i in (0, 1)] == [0, 1]
    with pytest.raises(UnreadableImage, match="no such file") as error:
        source.read(2)
    assert error.value.name == f"{server.url}/set/images/02.png"
    server.faults = {"/set/images/03.png": ["503"] * 99}
    shutil.rmtree(image_cache())
    with pytest.raises(ConnectionError, match=r"03\.png can't be fetched \(the server replied 503, 6 attempts\)"):
        source.read(3)


def test_a_cache_of_bounded_size(server, tmp_path):
    bound = 4 * (len(png(0)) + 20)
    source = open_source(f"{server.url}/set/list.txt", remote=RemoteOptions(str(tmp_path), bound / 1e9))
    for _ in range(2):
        for i in range(COUNT):
            assert int(source.read(i)[0, 0, 0]) == i
            kept = [path.stat().st_size for path in (tmp_path / "images").glob("*/*")]
            assert 0 < sum(kept) <= bound
    assert sum(server.requests.values()) == 2 * COUNT + 1


def test_requests_of_a_batch_wait_together(server):
    source = open_source(f"{server.url}/set/list.txt")
    server.delay = 0.2
    loader = TrainLoader(source, img_size=(4, 4), batch_size=COUNT, num_workers=1)
    batches, start = loader.batches(), time.perf_counter()
    next(batches)
    assert time.perf_counter() - start < COUNT * server.delay
    batches.close()


def test_a_run_resumes_exactly_from_a_mirror_and_counts_missing_images(server, tmp_path, capsys):
    del server.files["/set/images/05.png"]
    server.files |= {path.replace("/set/", "/mirror/of/"): content for path, content in server.files.items()}

    def command(place: str, out: str, *more: object) -> list[str]:
        settings = ["--batch-size", 4, "--checkpoint-every", 2, "--out", tmp_path / out, "--num-workers", 0]
        return [str(a) for a in ("pretrain", "--data", f"{server.url}/{place}/list.txt", *TINY, *settings, *more)]

    assert main(command("set", "run", "--steps", 6)) == 0
    shutil.copytree(tmp_path / "run", tmp_path / "straight")
    (tmp_path / "run" / "checkpoints" / "final.safetensors").unlink()
    assert json.loads((tmp_path / "run" / "files.txt").read_text())["root"] == "images"
    assert main(command("mirror/of", "run", "--steps", 6)) == 0
    assert_same_bits(tmp_path / "straight", tmp_path / "run")
    reports = (tmp_path / "run" / "unreadable.txt").read_text()
    assert reports == f"{server.url}/mirror/of/images/05.png\tno such file\n"
    for path in [path for path in server.files if path.endswith(".png")]:
        server.files[path.replace("/set/", "/third/")] = png(99)
    server.files["/third/list.txt"] = server.files["/set/list.txt"]
    capsys.readouterr()
    assert "this run began with" in mistake(capsys, *command("third", "run", "--steps", 10))
    assert "is remote: leave it out" in mistake(capsys, *command("set", "grown", "--steps", 1, "--data-may-grow"))


def test_a_full_disk_names_the_cure(server, tmp_path):
    source = open_source(f"{server.url}/set/list.txt", remote=RemoteOptions(str(tmp_path)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
    try:
        with pytest.raises(ValueError, match=r"can't take an image of \d+ bytes \(file too large\): free "):
            source.read(0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert int(source.read(0)[0, 0, 0]) == 0


def test_a_signed_list_is_resumed_with_other_signatures_and_keeps_none(server, tmp_path, capsys):
    """Of neither the list nor its rows; those of the rows are taken from the list, which is fetched again."""

    def sign(signature: str) -> str:
        rows = [f"{server.url}/set/images/{i:02}.png?{signature}&n={i}" for i in range(COUNT)]
        signed = {f"/set/images/{i:02}.png?{signature}&n={i}": png(i) for i in range(COUNT)}
        server.files = signed | {f"/set/list.csv?{signature}": "\n".join(["path", *rows]).encode()}
        return f"{server.url}/set/list.csv?{signature}"

    def command(data: str, steps: int) -> list[str]:
        settings = ["--batch-size", 4, "--steps", steps, "--out", tmp_path / "run", "--num-workers", 0]
        return [str(a) for a in ("pretrain", "--data", data, *TINY, *settings)]

    assert main(command(sign("sig=SECRET1"), 1)) == 0
    shutil.rmtree(image_cache())
    assert main(command(sign("sig=SECRET2"), 3)) == 0
    assert "SECRET" not in "".join(capsys.readouterr())
    words = mistake(capsys, "embed", str(tmp_path / "run"), "--out", str(tmp_path / "a.parquet"))
    assert f"the whole address of {server.url}/set/list.csv is not known" in words
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and b"SECRET" in file.read_bytes()]
    assert main(["embed", str(tmp_path / "run"), "--out", str(tmp_path / "a.parquet"), "--data", sign("sig=3")]) == 0


def test_a_password_is_kept_nowhere_and_taken_from_the_next_command(server, tmp_path, capsys):
    def command(user: str, steps: int) -> list[str]:
        data = f"{server.url}/set/list.txt".replace("://", f"://{user}@")
        settings = ["--batch-size", 4, "--steps", steps, "--out", tmp_path / "run", "--num-workers", 0]
        return [str(a) for a in ("pretrain", "--data", data, *TINY, *settings)]

    assert main(command("bob:SECRET1", 1)) == 0
    shutil.rmtree(image_cache())
    server.password = "bob:SECRET2"
    assert "SECRET" not in "".join(capsys.readouterr())
    assert main(command("bob:SECRET1", 3)) == 2
    assert "the server replied 401" in capsys.readouterr().err
    assert main(command("bob:SECRET2", 3)) == 0
    assert "SECRET" not in "".join(capsys.readouterr())
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and b"SECRET" in file.read_bytes()]


def test_messages_name_the_address_of_a_list_and_not_its_copy(server, capsys):
    server.files["/set/empty.csv"] = b"photo\n1.png\n"
    words = mistake(capsys, "inspect", f"{server.url}/set/empty.csv")
    assert f"error: {server.url}/set/empty.csv has no column of paths" in words
    assert "http://[::1/list.csv is no address" in mistake(capsys, "inspect", "http://[::1/list.csv")
