"""Paths as people have them: empty, special, too long, linked in circles, splits in capital letters."""

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest
from image_sets import first_values, save
from PIL import Image
from support import mistake

from dmjd.data.sources.coco import open_coco
from dmjd.data.sources.paths import path_inside
from dmjd.data.sources.registry import absolute, align_labels, has_split, open_source
from dmjd.data.sources.segmentation_masks import open_segmentation
from dmjd.images.stored import UnreadableImage


@pytest.mark.parametrize("opens", [open_source, lambda data: open_coco(data, "train"), open_segmentation])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "the path of the images is empty"),
        ("  ", "the path of the images is empty"),
        ("~nobody-of-this-name/images", "there is no such user, whose home folder ~ could stand for"),
        ("x" * 300, "can't be read .file name too long|there is no"),
        ("d/" * 3000, "can't be read .file name too long|there is no"),
    ],
)
def test_paths_that_cannot_be(opens, data, message):
    with pytest.raises(ValueError, match=message) as caught:
        opens(data, "train") if opens is open_segmentation else opens(data)
    assert len(str(caught.value)) < 7000
    assert absolute(data) == data


def test_what_is_neither_a_file_nor_a_folder(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    for name, message in (("fifo", "fifo is a FIFO"), ("loop", "link to nothing, or to itself"), ("broken", "link to")):
        with pytest.raises(ValueError, match=message):
            open_source(tmp_path / name)
    with pytest.raises(ValueError, match="is a device"):
        open_source("/dev/null")


def test_special_files_and_links_among_the_images_are_unreadable(tmp_path):
    save(tmp_path / "a.png", 3)
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to(tmp_path / "nothing.png")
    (tmp_path / "d.png").symlink_to(tmp_path / "d.png")
    (tmp_path / "e.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "f.png"))
    (tmp_path / "g.png").symlink_to(tmp_path / "a.png")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    source, found = open_source(tmp_path), []
    for i in range(len(source)):
        try:
            found.append(int(source.read(i)[0, 0, 0]))
        except UnreadableImage as error:
            found.append(error.reason)
    links = ["no such file or directory", "too many levels of symbolic links"]
    assert found == [
        3,
        "it is a FIFO, not a file",
        *links,
        "it is a device, not a file",
        "it is a socket, not a file",
        3,
    ]


@pytest.fixture
def nested(tmp_path):
    """Makes folders in each other, deeper than Python's own functions remove them."""

    def make(name: str, depth: int) -> None:
        here = os.getcwd()
        os.chdir(tmp_path)
        for _ in range(depth):
            os.mkdir(name)
            os.chdir(name)
        Image.new("L", (4, 4), 5).save("x.png")
        os.chdir(here)

    yield make
    subprocess.run(["rm", "-rf", str(tmp_path)], check=True)


def test_a_deep_folder_is_walked(tmp_path, nested):
    nested("d", 1200)
    assert first_values(open_source(tmp_path)) == [5]


def test_a_folder_beyond_the_longest_path_is_named(tmp_path, nested):
    nested("n" * 200, 25)
    with pytest.raises(ValueError, match=r"nnn can't be read \(file name too long\)") as caught:
        open_source(tmp_path)
    assert len(str(caught.value)) < 300


def test_names_of_any_bytes_are_shown_in_one_line(tmp_path):
    for raw in (b"new\nline.png", b"\xff\xfe.png", b"\x1b[31mred.png", "\u202ereversed.png".encode()):
        Image.new("L", (3, 3)).save(tmp_path / "a.png")
        os.rename(os.fsencode(tmp_path / "a.png"), os.fsencode(tmp_path) + b"/" + raw)
    source = open_source(tmp_path)
    assert len(first_values(source)) == 4
    shown = [source.describe(i) for i in range(4)]
    assert not any(c in name for name in shown for c in "\n\x1b\udcff")
    assert any(name.endswith("\u202ereversed.png") for name in shown)  # it may be part of a name, and is kept
    assert any(name.endswith("new\\nline.png") for name in shown)


@pytest.mark.parametrize(
    ("train", "test"), [("Train", "Test"), ("TRAIN", "val"), ("train", "VALID"), ("Training", "Testing")]
)
def test_splits_in_capital_letters(tmp_path, train, test):
    save(tmp_path / train / "a" / "1.png", 1)
    save(tmp_path / train / "b" / "2.png", 2)
    save(tmp_path / test / "b" / "3.png", 3)
    assert has_split(tmp_path, "test")
    sources = [open_source(tmp_path, split=split, labels="folder") for split in ("train", "test")]
    assert [first_values(source) for source in sources] == [[1, 2], [3]]
    assert align_labels(*sources).tolist() == [1]


def test_two_spellings_of_a_split_are_an_error(tmp_path):
    for name in ("train", "Train", "test"):
        save(tmp_path / name / "1.png")
    with pytest.raises(ValueError, match="has both train/ and Train/: rename one of them"):
        open_source(tmp_path)


def test_a_run_that_began_with_all_of_train_and_test_goes_on(tmp_path):
    for name in ("Train/1.png", "Test/2.png"):
        save(tmp_path / "set" / name)
    listing = tmp_path / "files.txt"
    listing.write_text(json.dumps({"paths": ["Test/2.png", "Train/1.png"]}))
    assert len(open_source(tmp_path / "set", listing=listing)) == 2
    assert len(open_source(tmp_path / "set")) == 1


@pytest.mark.parametrize("name", ["train", "Train", "val"])
def test_a_part_is_not_a_class(tmp_path, name):
    save(tmp_path / name / "cat" / "1.png")
    save(tmp_path / name / "dog" / "2.png")
    assert len(open_source(tmp_path)) == 2
    with pytest.raises(ValueError, match=f"holds only {name}/, which is a part .* not a class: give .*/{name} itself"):
        open_source(tmp_path, labels="folder")
    assert open_source(tmp_path / name, labels="folder").classes == ["cat", "dog"]


def test_a_name_that_is_also_a_folder_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "digits" / "1.png")
    with pytest.warns(UserWarning, match="'digits' is the built-in set here, not the folder digits/ .* write ./digits"):
        open_source("digits")
    save(tmp_path / "cifar10" / "1.png")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    with (
        pytest.warns(UserWarning, match="'cifar10' is a set that torchvision downloads here"),
        pytest.raises(ValueError, match=r"cifar10 can't be loaded .*: write ./cifar10 for the folder"),
    ):
        open_source("cifar10")
    assert len(open_source(Path("digits"))) == len(open_source("./cifar10")) == 1


def test_damaged_listings_are_named(tmp_path):
    save(tmp_path / "set" / "1.png")
    listing = tmp_path / "files.txt"
    wrong = ["[]", '{"paths": 3}', '{"paths": []}', '{"paths": ["../1.png"]}', '{"paths": ["/1.png"]}', "[" * 9999]
    for content in wrong:
        listing.write_text(content)
        with pytest.raises(ValueError, match=r"files.txt is not a list of images: delete it") as caught:
            open_source(tmp_path / "set", listing=listing)
        assert len(str(caught.value).splitlines()) == 1
    listing.unlink()
    os.mkfifo(listing)
    with pytest.raises(ValueError, match="it is a FIFO, not a file"):
        open_source(tmp_path / "set", listing=listing)


def test_paths_inside_a_root(tmp_path):
    root, folder = tmp_path / "root", tmp_path / "root" / "images"
    for name in ("a.png", "x/../a.png", "../other/a.png", str(root / "a.png"), "x//a.png"):
        assert path_inside(root, folder, name), name
    for name in ("../../a.png", "/etc/hosts", str(tmp_path / "root-2" / "a.png"), "a\0.png", "..", "../.."):
        inside = path_inside(root, folder, name)
        assert inside is None or inside == str(root) + "/", name


@pytest.mark.parametrize("flag", ["--data", "--test-data"])
def test_empty_flags_are_errors(tmp_path, capsys, flag):
    save(tmp_path / "set" / "1.png")
    command = ["pretrain", "folder", "--data", tmp_path / "set", "--out", tmp_path / "run", flag, ""]
    assert f"{flag} must not be empty" in mistake(capsys, *command)
