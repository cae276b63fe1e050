"""The second pass of embed: near duplicates, distances, and the images to keep."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from image_sets import altered_copies, save, smooth_images, write_table
from support import TINY, mistake, tiny_encoder

from dmjd.cli.main import main
from dmjd.data.sources.registry import open_source
from dmjd.encoders.stored import encoder_bytes
from dmjd.interop.embed import embed
from dmjd.interop.feature_files import rows_file
from dmjd.similarity import near_duplicates, nearest_neighbors


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    path.write_bytes(encoder_bytes(tiny_encoder()))
    return path


@pytest.fixture
def images(tmp_path):
    """12 images, one with three altered copies, and one that cannot be read."""
    paths = smooth_images(tmp_path / "my images", 12)
    altered_copies(paths[4])
    (tmp_path / "my images" / "zzz.png").write_bytes(b"no image")
    return tmp_path / "my images"


def features(path) -> torch.Tensor:
    return torch.tensor(pq.read_table(path)["features"].to_pylist())


@pytest.mark.parametrize("ending", [".parquet", ".npy"])
def test_columns_are_those_of_the_features_and_the_rest_stays(file, images, tmp_path, ending):
    plain = embed(file, data=images, out=tmp_path / "plain.parquet")
    out = embed(file, data=images, out=tmp_path / f"f{ending}", duplicates=0.97, distances=True)
    table = pq.read_table(rows_file(out) if ending == ".npy" else out)
    x, names = features(plain), pq.read_table(plain)["path"].to_pylist()
    first = near_duplicates(x, 0.97).tolist()
    assert table["duplicate_of"].to_pylist() == ["" if row < 0 else names[row] for row in first]
    assert any(name.endswith("004.png") for name in table["duplicate_of"].to_pylist())
    cosines = nearest_neighbors(x)[0][:, 0]
    np.testing.assert_allclose(table["distance"].to_numpy(), 1 - cosines, atol=1e-6)
    assert table.select(["index", "path"]).equals(pq.read_table(plain, columns=["index", "path"]))
    if ending == ".parquet":
        assert table["features"].equals(pq.read_table(plain)["features"])
        assert json.loads(table.schema.metadata[b"dmjd"])["unreadable"]
    before = out.read_bytes()
    assert embed(file, data=images, out=out, duplicates=0.97, distances=True).read_bytes() == before


def test_columns_are_added_to_a_finished_file_without_reading_images(file, images, tmp_path, monkeypatch):
    out = embed(file, data=images, out=tmp_path / "f.parquet", half=True)
    monkeypatch.setattr("dmjd.interop.embed.EvalLoader", None)
    embed(file, data=images, out=out, half=True, distances=True)
    embed(file, data=images, out=out, half=True, duplicates=0.9999)
    assert pq.read_schema(out).names == ["index", "path", "features", "distance", "duplicate_of"]
    none = pq.read_table(out)["duplicate_of"].to_pylist()
    embed(file, data=images, out=out, half=True, duplicates=0.9)  # another threshold replaces the column
    assert pq.read_schema(out).names == ["index", "path", "features", "distance", "duplicate_of"]
    assert sum(map(bool, pq.read_table(out)["duplicate_of"].to_pylist())) > sum(map(bool, none))


def test_the_list_is_what_data_takes(file, images, tmp_path, capsys):
    """Without the altered copies and the unreadable image; a run trains on it."""
    folder = tmp_path / "else where"
    command = ["embed", str(file), "--data", str(images), "--out", str(folder / "f.parquet"), "--deduplicate", "0.985"]
    assert main(command) == 0
    listed = (folder / "f.keep.txt").read_text().splitlines()
    x, names = features(folder / "f.parquet"), pq.read_table(folder / "f.parquet")["path"].to_pylist()
    kept = (near_duplicates(x, 0.985) < 0).tolist()
    source = open_source(folder / "f.keep.txt")
    assert [source.describe(i) for i in range(len(source))] == [n for n, k in zip(names, kept, strict=True) if k]
    assert sum("_" in line for line in listed) == 0  # no altered copy
    assert all(line.startswith("../my images/") for line in listed)
    assert f"{len(listed)} of 16 images are kept" in capsys.readouterr().err
    run = tmp_path / "run"
    flags = ["--steps", "1", "--batch-size", "2"]
    assert main(["pretrain", "--data", str(folder / "f.keep.txt"), "--out", str(run), *TINY, *flags]) == 0
    assert main(command) == 0  # again: nothing to do
    error = mistake_after(capsys, *command[:-1], "0.5")
    assert "f.keep.txt exists and holds other images: delete it" in error


def test_tables_are_deduplicated_as_tables(file, tmp_path):
    values = [0, 40, 90, 40, 200, 0, 0]
    write_table(tmp_path / "t" / "train-0.parquet", values[:4], label=[0, 1, 2, 3])
    write_table(tmp_path / "t" / "train-1.parquet", values[4:], label=[4, 5, 6])
    out = embed(file, data=tmp_path / "t", labels="none", out=tmp_path / "f.parquet", deduplicate=0.9999)
    kept = pq.read_table(tmp_path / "f.keep.parquet")
    first = near_duplicates(features(out), 0.9999)
    assert kept["label"].to_pylist() == (first < 0).nonzero().flatten().tolist()
    assert len(kept) <= 4
    assert len(open_source(tmp_path / "f.keep.parquet", labels="column")) == len(kept)
    again = embed(file, data=tmp_path / "t", labels="none", out=tmp_path / "f.parquet", deduplicate=0.9999)
    assert again == out


def test_two_equal_images_leave_one(file, tmp_path):
    for name in ("a.png", "b.png"):
        save(tmp_path / "two" / name, 90)
    embed(file, data=tmp_path / "two", out=tmp_path / "f.parquet", deduplicate=0.95)
    assert (tmp_path / "f.keep.txt").read_text() == "two/a.png\n"


def test_mistakes_are_one_line_before_the_work(file, images, tmp_path, capsys):
    out = tmp_path / "f.parquet"
    command = ["embed", file, "--out", out, "--data"]
    error = mistake(capsys, *command, images, "--deduplicate", "1.5")
    assert "deduplicate must be greater than 0 and at most 1, got 1.5" in error
    assert "duplicates must" in mistake(capsys, *command, images, "--duplicates", "0")
    assert "compare pooled features: leave tokens out" in mistake(capsys, *command, images, "--tokens", "--distances")
    assert "deduplicate writes a list of images" in mistake(capsys, *command, "digits", "--deduplicate")
    one = tmp_path / "one"
    one.mkdir()
    shutil.copy(images / "000.png", one)
    assert "has one image" in mistake(capsys, *command, one, "--duplicates")
    table = pa.table({"image": pa.array([{"bytes": None, "path": "000.png"}] * 2)})
    table = table.cast(pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()})}))
    pq.write_table(table, images / "paths.parquet")
    assert "holds paths of images" in mistake(capsys, *command, images / "paths.parquet", "--deduplicate")
    (images / "paths.parquet").unlink()
    shutil.copy(images / "000.png", images / "two\nlines.png")
    assert r"two\nlines.png holds a line break" in mistake(capsys, *command, images, "--deduplicate")
    assert not out.exists()
    assert not (tmp_path / "f.parquet.parts").exists()


def test_only_one_readable_image_is_said(file, tmp_path, capsys):
    save(tmp_path / "d" / "a.png", 9)
    (tmp_path / "d" / "b.png").write_bytes(b"no")
    command = ["embed", file, "--data", tmp_path / "d", "--out", tmp_path / "f.parquet"]
    assert main([*map(str, command)]) == 0
    assert "only one image of" in mistake_after(capsys, *command, "--distances")


def mistake_after(capsys, *arguments) -> str:
    """The error of a command that says something before."""
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 2
    return capsys.readouterr().err
