"""Features as a table: the encoder's values, in the order of the set, complete after a kill."""

import errno
import json
import shutil
import signal
import time

import forked
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from image_sets import save
from PIL import Image

from dmjd.cli.main import main
from dmjd.data.sources.registry import open_source
from dmjd.encoders.registry import create_encoder
from dmjd.encoders.stored import encoder_bytes
from dmjd.encoders.weights import load_encoder
from dmjd.evaluation.frozen.features import extract
from dmjd.images.preprocess import Preprocess
from dmjd.interop.embed import embed
from dmjd.interop.embed_parts import Parts
from dmjd.interop.feature_files import feature_schema, rows_file
from dmjd.warning import DMJDWarning

SIZE = (16, 24)


def encoder_file(folder, name="vit_tiny_patch8", chans=3, **options):
    """A small encoder with its preprocessing as a file."""
    torch.manual_seed(0)
    sizes = (
        {"embed_dims": (8, 8, 16), "depths": (1, 1, 1)} if name.startswith("conv") else {"embed_dim": 16, "depth": 2}
    )
    encoder = create_encoder(name, SIZE, chans, num_heads=2, **sizes, **options)
    encoder.preprocess = Preprocess(SIZE, chans, (0.5,) * chans, (0.25,) * chans)
    file = folder / f"{name}.safetensors"
    file.write_bytes(encoder_bytes(encoder))
    return file


@pytest.fixture
def file(tmp_path):
    return encoder_file(tmp_path)


def features_of(path) -> np.ndarray:
    return np.stack([np.array(value) for value in pq.read_table(path)["features"].to_pylist()])


def test_rows_are_the_encoders_pooled_features_with_path_and_label(file, image_folder, tmp_path):
    out = embed(file, data=image_folder, labels="folder", out=tmp_path / "new" / "f.parquet", batch_size=7)
    table = pq.read_table(out)
    source = open_source(image_folder, labels="folder")
    assert table.column_names == ["index", "path", "label", "class", "features"]
    assert table["index"].to_pylist() == list(range(24))
    assert table["path"].to_pylist() == [str(source.stored(i)) for i in range(24)]
    assert table["label"].to_pylist() == source.labels.tolist()
    assert table["class"].to_pylist() == [source.classes[label] for label in source.labels]
    expected = extract(load_encoder(file), source).x.numpy()
    np.testing.assert_allclose(features_of(out), expected, atol=1e-5)
    assert [p.name for p in out.parent.iterdir()] == ["f.parquet"]


def test_dark_images_are_warned_about(file, tmp_path):
    for value in (0, 9):
        save(tmp_path / "dark" / f"{value}.png", value)
    with pytest.warns(DMJDWarning, match=r"between 0 and 9, 3\.5% of the range"):
        embed(file, data=tmp_path / "dark", out=tmp_path / "a.npy", num_workers=0)


@pytest.mark.parametrize(
    ("name", "options"), [("vit_tiny_patch8", {"class_token": True}), ("conv_vit_tiny_patch8", {})]
)
def test_tokens_in_half_precision_pool_to_the_same_features(name, options, image_folder, tmp_path):
    file = encoder_file(tmp_path, name, **options)
    pooled = features_of(embed(file, data=image_folder, out=tmp_path / "pooled.parquet"))
    out = embed(file, data=image_folder, out=tmp_path / "tokens.npy", tokens=True, half=True)
    tokens = np.load(out)
    assert tokens.dtype == np.float16
    assert tokens.shape == (24, 6, 16)
    again = F.layer_norm(torch.from_numpy(tokens).float().mean(1), (16,), eps=1e-6)
    np.testing.assert_allclose(again.numpy(), pooled, atol=1e-2)
    rows = pq.read_table(rows_file(out))
    assert rows.column_names == ["index", "path"]
    assert len(rows) == 24
    parquet = embed(file, data=image_folder, out=tmp_path / "tokens.parquet", tokens=True, half=True)
    np.testing.assert_array_equal(features_of(parquet).astype(np.float16), tokens)


@pytest.mark.parametrize("chans", [1, 5])
def test_other_numbers_of_channels(chans, tmp_path):
    (tmp_path / "data").mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        np.save(tmp_path / "data" / f"{i}.npy", rng.integers(0, 256, (20, 30, chans), dtype=np.uint8))
    out = embed(encoder_file(tmp_path, chans=chans), data=tmp_path / "data", out=tmp_path / "f.npy")
    assert np.load(out).shape == (3, 16)


SLOWLY = """
import sys
from dmjd.interop import embed as embedding, embed_parts
embed_parts.PART_SECONDS = 0
embedding.embed(sys.argv[1], data=sys.argv[2], out=sys.argv[3], batch_size=2, device="cpu", num_workers=0)
"""


def test_a_killed_run_resumes_from_its_finished_parts(file, tmp_path, capfd):
    data = tmp_path / "data"
    data.mkdir()
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (200, *SIZE, 3), dtype=np.uint8)):
        np.save(data / f"{i:03d}.npy", image)
    out = {ending: tmp_path / f"f.{ending}" for ending in ("npy", "parquet")}
    parts = {ending: path.with_name(f"{path.name}.parts") for ending, path in out.items()}
    process = forked.start(forked.execute, SLOWLY, file, data, out["npy"], log=tmp_path / "log")
    while len(list(parts["npy"].glob("part-*.parquet"))) < 3:
        assert process.is_alive()
        time.sleep(0.002)
    process.kill()
    process.join()
    assert not out["npy"].exists()
    shutil.copytree(parts["npy"], parts["parquet"])  # the parts do not depend on the ending
    options = {"data": data, "batch_size": 2, "num_workers": 0}
    for ending in out:
        finished = {part: part.stat().st_mtime_ns for part in parts[ending].glob("part-*.parquet")}
        assert 3 <= len(finished) < 100
        with pytest.raises(ValueError, match=r"made with other settings \(half\)"):
            embed(file, out=out[ending], half=True, **options)
        assert {part: part.stat().st_mtime_ns for part in finished} == finished
        embed(file, out=out[ending], **options)
        assert f"resuming from image {2 * len(finished)} of 200" in capfd.readouterr().err
        assert not parts[ending].exists()
    whole = {ending: embed(file, out=tmp_path / f"whole.{ending}", **options) for ending in out}
    assert pq.read_table(out["parquet"]).equals(pq.read_table(whole["parquet"]))
    assert out["npy"].read_bytes() == whole["npy"].read_bytes()


@pytest.mark.parametrize("event", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, OSError(errno.EIO, "a broken disk")])
def test_what_was_computed_is_saved_before_a_signal_or_error_ends_the_command(
    event, file, image_folder, tmp_path, monkeypatch, capfd
):
    """Also the unreadable images so far; parts are usually saved every 20 seconds only."""
    data, out = tmp_path / "data", tmp_path / "f.parquet"
    shutil.copytree(image_folder, data)
    (data / "cats" / "00a.png").write_text("no image")
    command = ["embed", str(file), "--data", str(data), "--out", str(out), "--device", "cpu", "--batch-size", "4"]
    normalize, batches = Preprocess.normalize, []

    def end_in_the_fourth_batch(self, raw):
        batches.append(raw)
        if len(batches) == 4:
            if isinstance(event, OSError):
                raise event
            signal.raise_signal(event)
        return normalize(self, raw)

    with monkeypatch.context() as patched:
        patched.setattr(Preprocess, "normalize", end_in_the_fourth_batch)
        assert main(command) == (2 if isinstance(event, OSError) else 128 + event)
    assert [part.name for part in tmp_path.glob("f.parquet.parts/part-*")] == ["part-000000000000-000000000012.parquet"]
    capfd.readouterr()
    assert main(command) == 0
    assert "resuming from image 12 of 25" in capfd.readouterr().err
    whole = pq.read_table(embed(file, data=data, out=tmp_path / "whole.parquet", device="cpu", batch_size=4))
    assert pq.read_table(out).equals(whole)
    assert pq.read_table(out).schema.metadata == whole.schema.metadata
    assert len(json.loads(whole.schema.metadata[b"dmjd"])["unreadable"]) == 1


def test_unreadable_images_are_left_out_and_named(file, image_folder, tmp_path, capfd):
    data = tmp_path / "data"
    shutil.copytree(image_folder, data)
    for name in ("cats/00a.png", "dogs/99.png", "dogs/999.png"):  # the last two fill the last batch
        (data / name).write_text("no image")
    out = embed(file, data=data, out=tmp_path / "f.parquet", batch_size=5)
    table = pq.read_table(out)
    assert len(table) == 24
    assert not [path for path in table["path"].to_pylist() if path.endswith(("00a.png", "99.png"))]
    unreadable = json.loads(table.schema.metadata[b"dmjd"])["unreadable"]
    assert [name for name, _ in unreadable] == [
        str(data / name) for name in ("cats/00a.png", "dogs/99.png", "dogs/999.png")
    ]
    messages = capfd.readouterr().err
    assert all(name in messages for name, _ in unreadable)
    assert table["index"].to_pylist() == list(range(1, 25))
    whole = embed(file, data=image_folder, out=tmp_path / "whole.parquet")
    np.testing.assert_allclose(features_of(out), features_of(whole), atol=1e-5)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.png").write_text("no image")
    with pytest.raises(ValueError, match="none of the 1 images"):
        embed(file, data=tmp_path / "none", out=tmp_path / "none.parquet")
    assert not list(tmp_path.glob("none.*"))


def test_a_finished_file_is_kept_and_never_overwritten(file, image_folder, tmp_path):
    for ending in ("parquet", "npy"):
        out = embed(file, data=image_folder, out=tmp_path / f"f.{ending}")
        before = out.stat().st_mtime_ns
        assert embed(file, data=image_folder, out=out) == out
        assert out.stat().st_mtime_ns == before
        with pytest.raises(ValueError, match=r"made with other settings \(tokens\): delete it, or give another --out"):
            embed(file, data=image_folder, out=out, tokens=True)
        out.write_bytes(b"another file")
        if ending == "parquet":
            with pytest.raises(ValueError, match="made with other settings"):
                embed(file, data=image_folder, out=out)
            assert out.read_bytes() == b"another file"


def test_files_and_parts_of_version_0_1_are_recognized(file, image_folder, tmp_path, capfd):
    whole = embed(file, data=image_folder, out=tmp_path / "whole.parquet")
    table = pq.read_table(whole)
    metadata = json.loads(table.schema.metadata[b"dmjd"])
    metadata["settings"]["num_pictures"] = 24  # version 0.1 stored it too
    metadata["bad"] = metadata.pop("unreadable")
    out = tmp_path / "old.parquet"
    pq.write_table(table.replace_schema_metadata({"dmjd": json.dumps(metadata)}), out)
    before = out.read_bytes()
    assert embed(file, data=image_folder, out=out) == out
    assert out.read_bytes() == before
    with pytest.raises(ValueError, match=r"made with other settings \(half\)"):
        embed(file, data=image_folder, out=out, half=True)

    parts = tmp_path / "parts.parquet.parts"
    parts.mkdir()
    (parts / "settings.json").write_text(json.dumps(metadata["settings"]))
    first = table.slice(0, 10).replace_schema_metadata({"dmjd": "[]"})
    pq.write_table(first, parts / f"part-{0:012d}-{10:012d}.parquet")
    resumed = embed(file, data=image_folder, out=tmp_path / "parts.parquet")
    assert "resuming from image 10 of 24" in capfd.readouterr().err
    np.testing.assert_allclose(features_of(resumed), features_of(whole), atol=1e-5)


def test_one_process_writes_a_file(file, image_folder, tmp_path):
    out, schema = tmp_path / "f.parquet", feature_schema(open_source(image_folder), (16,), half=False)
    with (
        Parts(out, {}, schema),
        pytest.raises(ValueError, match="another process is writing"),
    ):
        embed(file, data=image_folder, out=out)


def test_features_that_do_not_fit_half_precision(tmp_path, image_folder):
    file = encoder_file(tmp_path)
    encoder = load_encoder(file)
    with torch.no_grad():
        encoder.pos_embed.fill_(1e6)
    file.write_bytes(encoder_bytes(encoder))
    with pytest.raises(ValueError, match="leave --half out"):
        embed(file, data=image_folder, out=tmp_path / "f.npy", tokens=True, half=True)
    assert np.load(embed(file, data=image_folder, out=tmp_path / "g.npy", tokens=True)).max() > 1e5


def test_errors_are_explained(file, image_folder, tmp_path, capsys):
    (tmp_path / "folder.npy").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "one.png")
    for arguments, message in [
        (["--out", tmp_path / "f.csv"], "end it in .parquet or .npy"),
        (["--out", tmp_path / "folder.npy"], "is a folder"),
        (["--out", tmp_path / "f.npy", "--batch-size", 0], "--batch-size must be at least 1"),
        (["--out", tmp_path / "f.npy", "--precision", "fp8"], "precision must be"),
        (["--out", tmp_path / "f.npy", "--split", "test"], "has no test part"),
        (["--out", tmp_path / "f.npy", "--labels", "column"], "pass --labels folder"),
        (["--out", file / "f.npy"], "cannot be written"),
        (["--out", tmp_path / "f.npy", "--tokenz"], "did you mean --tokens?"),
    ]:
        assert main(["embed", str(file), "--data", str(image_folder), *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) <= 2
    assert main(["embed", str(file), "--out", str(tmp_path / "f.npy")]) == 2
    assert "pass --data" in capsys.readouterr().err
    assert not list(tmp_path.glob("f.*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": ""}, "out must not be empty"),
        ({"run": ""}, "run must not be empty"),
        ({"data": ""}, "data must not be empty"),
        ({"out": "caf\udce9.npy"}, "is not UTF-8 text"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 10**12}, "batch_size must be at most"),
        ({"batch_size": True}, "batch_size must be int, got True"),
        ({"batch_size": float("nan")}, "batch_size must be int, got nan"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
        ({"num_workers": 10**5}, "num_workers must be at most 512"),
        ({"tokens": "yes"}, "tokens must be bool, got 'yes'"),
        ({"half": 1}, "half must be bool, got 1"),
        ({"split": "all"}, "split must be one of train, val, test"),
        ({"labels": ""}, "labels must not be empty"),
        ({"labels": "file"}, "labels must be one of none, folder, column"),
        ({"precision": "fp64"}, "precision must be one of fp32, bf16"),
        ({"device": "gpu"}, "device must be one of auto, cpu, cuda"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_opened(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        embed(**{"run": "no-run", "out": "features.npy"} | changes)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def half_done(file, image_folder, tmp_path):
    """A table of features, and the same in three parts with checksums, not merged yet: (whole, out, parts)."""
    whole = embed(file, data=image_folder, out=tmp_path / "whole.parquet", batch_size=4)
    table = pq.read_table(whole)
    out = tmp_path / "f.parquet"
    folder = tmp_path / "f.parquet.parts"
    folder.mkdir()
    (folder / "settings.json").write_text(json.dumps(json.loads(table.schema.metadata[b"dmjd"])["settings"]))
    parts = []
    for first, last in ((0, 4), (4, 12), (12, 20)):
        parts.append(folder / f"part-{first:012d}-{last:012d}.parquet")
        rows = table.slice(first, last - first).replace_schema_metadata({"dmjd": "[]"})
        pq.write_table(rows, parts[-1], write_page_checksum=True)
    return whole, out, parts


@pytest.mark.parametrize("damage", ["missing", "flipped", "cut", "folder", "text", "other metadata", "other columns"])
def test_a_missing_or_damaged_part_is_made_again(half_done, file, image_folder, capfd, damage):
    whole, out, parts = half_done
    part = parts[1]
    content = bytearray(part.read_bytes())
    table = pq.read_table(part)
    part.unlink()
    if damage == "flipped":
        position = content.index(table["features"].combine_chunks().values.to_numpy().tobytes()[:16])
        content[position + 3] ^= 1
        part.write_bytes(content)
    elif damage == "cut":
        part.write_bytes(content[: len(content) // 2])
    elif damage == "folder":
        part.mkdir()
    elif damage == "text":
        part.write_text("no table")
    elif damage == "other metadata":
        pq.write_table(table.replace_schema_metadata({"dmjd": "[[3]]"}), part)
    elif damage == "other columns":
        pq.write_table(table.drop_columns(["path"]), part)
    embed(file, data=image_folder, out=out, batch_size=4)
    assert pq.read_table(out).equals(pq.read_table(whole))
    printed = capfd.readouterr().err
    assert ("is damaged" in printed) == (damage != "missing")
    assert not parts[0].parent.exists()


def test_parts_that_a_kill_left_of_a_finished_file_are_deleted(half_done, file, image_folder):
    whole, out, parts = half_done
    shutil.copy(whole, out)
    embed(file, data=image_folder, out=out, batch_size=4)
    assert not parts[0].parent.exists()


def test_a_damaged_finished_file_is_named(file, image_folder, tmp_path):
    for ending in ("parquet", "npy"):
        out = embed(file, data=image_folder, out=tmp_path / f"g.{ending}")
        content = bytearray(out.read_bytes())
        content[len(content) // 4] ^= 1
        out.write_bytes(content)
        with pytest.raises(ValueError, match=rf"g\.{ending} is damaged or was made with other settings.*delete it"):
            embed(file, data=image_folder, out=out)
        out.write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=rf"g\.{ending} is damaged"):
            embed(file, data=image_folder, out=out)


def test_damaged_settings_of_parts_are_named(half_done, file, image_folder):
    _, out, parts = half_done
    settings = parts[0].with_name("settings.json")
    for content in (b"", b"[]", b"{" * 100_000, b"\xff"):
        settings.write_bytes(content)
        with pytest.raises(ValueError, match=r"settings\.json: .*; delete .*f\.parquet\.parts to start again"):
            embed(file, data=image_folder, out=out)
