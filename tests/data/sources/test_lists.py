"""Lists of images: a text file with one path a line."""

import os
import shutil
import sys
from functools import partial

import pytest
from image_sets import save
from support import REAL_DATA, TINY, final, mistake

from dmjd.cli.main import main
from dmjd.data.sources.lists import ListSource
from dmjd.data.sources.registry import align_labels, open_source


@pytest.fixture
def images(tmp_path):
    """Six gray images in two folders."""
    for i in range(6):
        save(tmp_path / "images" / "ab"[i % 2] / f"{i}.png", 10 * i)
    return tmp_path / "images"


def write(file, *lines):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(map(str, lines)))
    return file


def test_images_are_in_the_order_of_the_list_with_relative_and_absolute_paths(images, tmp_path):
    file = write(tmp_path / "lists" / "some.txt", "../images/b/3.png", "", images / "a" / "0.png", "../images/b/1.png")
    source = open_source(file)
    assert isinstance(source, ListSource)
    assert [int(source.read(i)[0, 0, 0]) for i in range(len(source))] == [30, 0, 10]
    assert source.describe(1) == str(images / "a" / "0.png")
    labeled = open_source(str(file), labels="folder")
    assert (labeled.labels.tolist(), labeled.classes) == ([1, 0, 1], ["a", "b"])


def test_a_list_of_a_whole_folder_is_the_same_set(images, tmp_path):
    """So a run that began with one may go on with the other, wherever the list lies."""
    paths = sorted(path for path in images.rglob("*.png"))
    for folder in (tmp_path, images, tmp_path / "deep" / "er"):
        file = write(folder / "all.txt", *(os.path.relpath(path, folder) for path in paths))
        assert open_source(file).fingerprint() == open_source(images).fingerprint()
        assert open_source(file).content_hash() == open_source(images).content_hash()
        file.unlink()


def test_marks_and_endings_of_other_systems(images):
    file = images / "windows.txt"
    file.write_bytes(b"\xef\xbb\xbfa/0.png\r\nb/1.png\r\n")
    assert len(open_source(file)) == 2


@pytest.mark.skipif(sys.platform == "darwin", reason="names are UTF-8 there")
def test_names_may_hold_anything_but_line_breaks(images):
    name = os.fsdecode(b"  \xff x#y.png")
    shutil.copy(images / "a" / "0.png", images / name)
    (images / "odd.txt").write_bytes(os.fsencode(name) + b"\n")
    assert int(open_source(images / "odd.txt").read(0)[0, 0, 0]) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n  \n", r"list\.txt lists no images: put the path"),
        (b"a/0.png\nb/1.png\n./a/0.png\n", r"line 3 of .*list\.txt names the image of line 1 again: \./a/0\.png"),
        (b"a/0.png\nc.png\nd.png\n", r"2 of 3 files in .*list\.txt do not exist: c\.png, d\.png; paths are relative"),
        (b"a\n", r"1 of 1 files in .*list\.txt do not exist: a"),
        (b"a/0.png\0", "it holds null characters"),
    ],
)
def test_a_list_that_cannot_be_used_is_one_line(images, content, message, capsys):
    (images / "list.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_source(images / "list.txt")
    mistake(capsys, "pretrain", "--data", images / "list.txt", "--out", images / "run", *TINY)


def test_a_list_has_no_test_part(images, tmp_path):
    file = write(images / "list.txt", "a/0.png")
    with pytest.raises(ValueError, match="has no test part"):
        open_source(file, split="test")
    with pytest.raises(ValueError, match="pass --labels folder"):
        open_source(file, labels="column")


def test_a_resumed_run_sees_the_images_it_began_with(images, tmp_path):
    """The list changes, even the folder that holds its images: the run goes on as if nothing had happened."""
    whole = write(images / "list.txt", "b/5.png", "a/0.png", "b/1.png", "a/2.png")
    command = ["pretrain", "--data", str(whole), *TINY, "--batch-size", "2", "--out"]
    assert main([*command, str(tmp_path / "straight"), "--steps", "4"]) == 0
    assert main([*command, str(tmp_path / "run"), "--steps", "4", "--checkpoint-every", "2"]) == 0
    (tmp_path / "run" / "checkpoints" / "final.safetensors").unlink()
    write(whole, "a/2.png")
    assert main([*command, str(tmp_path / "run"), "--steps", "4", "--checkpoint-every", "2"]) == 0
    straight, resumed = final(tmp_path / "straight"), final(tmp_path / "run")
    assert all(resumed[name].equal(value) for name, value in straight.items())


def test_a_run_on_a_list_with_columns_replaces_tolerated_missing_images_and_resumes(images, tmp_path, capsys):
    """The list loses rows and its split names change while the run stops: the order of the images stays."""
    rows = ["a/0.png,train,x", "b/1.png,train,", "a/gone.png,train,y", "a/2.png,train,x", "b/3.png,test,x"]
    file = write(images / "list.csv", "path,split,kind", *rows)
    command = ["pretrain", "--data", str(file), *TINY, "--batch-size", "3", "--held-out", "0", "--label-column", "kind"]
    said = mistake(capsys, *command, "--out", tmp_path / "run")
    assert "1 of 4 files" in said
    assert "do not exist: a/gone.png" in said
    command += ["--steps", "4", "--checkpoint-every", "2", "--max-unreadable", "0.25", "--out"]
    assert main([*command, str(tmp_path / "straight")]) == 0
    said = capsys.readouterr().err
    assert "do not exist: a/gone.png; other images replace them" in said
    assert "list.csv (train): 4 images" in said
    assert (tmp_path / "straight" / "unreadable.txt").read_text().startswith(str(images / "a" / "gone.png"))
    shutil.copytree(tmp_path / "straight", tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "final.safetensors").unlink()
    write(file, "path,split,kind", rows[3], *rows[4:])
    assert main([*command, str(tmp_path / "run")]) == 0
    straight, resumed = final(tmp_path / "straight"), final(tmp_path / "run")
    assert all(resumed[name].equal(value) for name, value in straight.items())


@pytest.mark.skipif(not (REAL_DATA / "grocery").exists(), reason="needs ../shared/data/grocery")
def test_a_real_list_with_splits_and_two_columns_of_labels():
    list_of = partial(open_source, REAL_DATA / "grocery" / "list.csv")
    for column, most in (("label", 81), ("coarse_label", 43)):
        train, val, test = (list_of(split=split, label_column=column) for split in ("train", "val", "test"))
        assert [len(part) for part in (train, val, test)] == [2640, 296, 2485]
        assert (len(train.classes), len(test.classes)) == (most, most)
        for part in (val, test):
            aligned = align_labels(train, part)
            assert all(train.classes[aligned[i]] == part.class_of(i) for i in range(0, len(part), 7))
    assert train.read(0).shape[2] == 3
