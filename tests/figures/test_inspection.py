"""``dmjd inspect``: facts that are known of a set, on the command line and from Python."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import dmjd
from dmjd.cli.main import main
from dmjd.figures.inspection import inspection_table


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve images in train, of two classes, and two of one class in test: formats, sizes and faults of all kinds."""
    root, random = tmp_path_factory.mktemp("set"), np.random.default_rng(0)

    def save(name: str, shape: tuple[int, ...], **options) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(root / name, **options)

    for i in range(6):
        save(f"train/cat/{i}.jpg", (40, 60, 3))
    save("train/dog/gray.png", (30, 30))
    save("train/dog/alpha.png", (100, 20, 4))
    Image.fromarray(random.integers(0, 1 << 16, (50, 50), dtype=np.uint16)).save(root / "train/dog/deep.tif")
    shutil.copy(root / "train/cat/0.jpg", root / "train/dog/copy.jpg")
    (root / "train/dog/broken.jpg").write_bytes((root / "train/cat/1.jpg").read_bytes()[:300])
    (root / "train/dog/[b].jpg").write_bytes(b"no image")
    for i in range(2):
        save(f"test/cat/{i}.jpg", (40, 60, 3))
    return root


def test_the_facts_of_a_set(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # so that no name is wrapped
    figure, file = tmp_path / "figure.png", tmp_path / "facts.json"
    flags = ["--labels", "folder", "--img-size", "32", "--num-workers", "0", "--out", str(figure), "--json", str(file)]
    assert main(["inspect", str(folder), *flags]) == 0
    found = json.loads(file.read_text())
    assert (found["num_images"], found["looked_at"]) == (12, 12)
    assert found["formats"] == {"JPEG": 7, "PNG": 2, "TIFF": 1}
    assert found["channels"] == {"3 x uint8": 7, "1 x uint8": 1, "3 + alpha x uint8": 1, "1 x uint16": 1}
    assert found["sizes"] == {"smallest": [30, 30], "median": [40, 60], "largest": [50, 50], "different": 4}
    assert found["unreadable"]["count"] == 2
    assert {name.rpartition("/")[2] for name, _ in found["unreadable"]["first"]} == {"broken.jpg", "[b].jpg"}
    assert found["equal"]["count"] == 1
    assert [name[-8:] for name in found["equal"]["first"][0]] == ["at/0.jpg", "copy.jpg"]
    assert found["splits"] == {"train": 12, "test": 2}
    assert found["classes"]["counts"] == {"cat": {"train": 6, "test": 2}, "dog": {"train": 6, "test": 0}}
    assert found["classes"]["missing"] == {"test": ["dog"]}
    rate, minutes = (found["reading"][key] for key in ("images_per_s", "epoch_minutes"))
    assert minutes == pytest.approx(12 / rate / 60)
    with Image.open(figure, formats=["PNG"]) as image:
        assert image.width > 1000
    text = capsys.readouterr().out
    assert "lacks dog" in text
    assert "[b].jpg" in text


def test_the_sample_and_a_set_in_memory():
    """From Python; a sample is evenly spaced, and a set with labels of its own needs none."""
    found = dmjd.inspect("digits", sample=5, img_size=16)
    assert (found["num_images"], found["looked_at"]) == (12000, 5)
    assert found["formats"] == {"array": 5}
    assert found["reading"]["in_memory"]
    assert sum(own["train"] for own in found["classes"]["counts"].values()) == 12000
    assert "5 train, evenly spaced" in str(inspection_table(found).columns[1]._cells)


@pytest.mark.parametrize("channels", [1, 5])
def test_other_channels(tmp_path, channels):
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", np.full((8 + i, 9, channels), 10 * i, np.uint8))
    found = dmjd.inspect(str(tmp_path), in_chans=channels, img_size=8, out=tmp_path / "out" / "figure.png")
    assert found["formats"] == {"npy": 3}
    assert found["channels"] == {f"{channels} x uint8": 3}
    assert (tmp_path / "out" / "figure.png").exists()


def test_a_list_with_columns(folder, tmp_path):
    rows = ["file,kind,split"]
    rows += [f"train/cat/{i}.jpg,{'ab'[i % 2]},{('train', 'valid')[i > 3]}" for i in range(6)]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    found = dmjd.inspect(str(tmp_path / "list.csv"), root=str(folder), label_column="kind", img_size=8, num_workers=0)
    assert found["splits"] == {"train": 4, "val": 2}
    assert found["classes"]["counts"]["a"] == {"train": 2, "val": 1}


def test_several_sets_are_one(folder, tmp_path, capsys):
    Image.new("RGB", (7, 5)).save(tmp_path / "one.png")
    parts = [str(folder / "train" / "cat"), str(tmp_path)]
    assert main(["inspect", *parts, "--img-size", "8", "--num-workers", "0"]) == 0
    assert "7 train" in capsys.readouterr().out
    assert dmjd.inspect([parts[0], f"{parts[1]}:0.5"], img_size=8, num_workers=0)["formats"] == {"JPEG": 6, "PNG": 1}


def test_reasons_that_differ_in_numbers_are_one(tmp_path):
    for i in range(3):
        np.save(tmp_path / f"float{i}.npy", np.full((8, 9, 1), 10.5 * (i + 1), np.float32))
        (tmp_path / f"text{i}.png").write_bytes(b"no image")
        Image.new("L", (7, 5)).save(tmp_path / f"{i}.png")
    found = dmjd.inspect(str(tmp_path), in_chans=1, img_size=8, num_workers=0)
    first, second = found["unreadable"]["reasons"].items()
    assert (first[1], second[1]) == (3, 3)
    general = "float32 values from ... to ..., outside 0..1: give --value-range LO HI (value_range in Python)"
    assert general in (first[0], second[0])


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1234, "1.23 kB"),
        (999_700, "1 MB"),
        (5.6e9, "5.6 GB"),
        (7.8e12, "7.8 TB"),
        (9e15, "9 PB"),
    ],
)
def test_sizes_have_units_that_suit_them(number, text):
    facts = {"median": 1234, "mean": number}
    found = {
        "name": "set",
        "num_images": 1,
        "looked_at": 1,
        "formats": {},
        "channels": {},
        "invalid": {"images": 0, "share": 0.0},
        "bytes": facts,
        "sizes": {"smallest": [1, 1], "median": [1, 1], "largest": [1, 1], "different": 1},
        "unreadable": {"count": 0, "reasons": {}, "first": []},
        "equal": {"count": 0, "first": []},
        "splits": {"train": 1},
        "classes": None,
        "reading": {"images_per_s": 1.0, "epoch_minutes": 1.0, "in_memory": True, "workers": 0},
    }
    assert f"1.23 kB an image (median); {text} in all" in inspection_table(found).columns[1]._cells


def test_one_image(tmp_path):
    Image.new("RGB", (7, 5)).save(tmp_path / "one.png")
    assert dmjd.inspect(str(tmp_path), img_size=8)["sizes"]["largest"] == [5, 7]


def test_what_cannot_be_inspected(tmp_path):
    (tmp_path / "one.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"none of 1 images .* can be read"):
        dmjd.inspect(str(tmp_path))
    with pytest.raises(ValueError, match="say what to inspect"):
        dmjd.inspect()
    with pytest.raises(ValueError, match=r"end it in \.png"):
        dmjd.inspect("digits", out=tmp_path / "figure.exe")
