"""Folders of images: what is found, labels, names, listings, links and permissions."""

import os
import pickle
import shutil

import numpy as np
import pytest
from image_sets import first_values, save

from dmjd.data.sources.registry import open_source
from dmjd.warning import DMJDWarning


def test_sorted_nested_and_hidden(tmp_path):
    for i, name in enumerate(["b/x.png", "a/z.JPG", "a.png", "a/b/c.bmp", ".hidden/x.png", "a/.x.png"]):
        save(tmp_path / name, i)
    (tmp_path / "notes.txt").write_text("no image")
    source = open_source(tmp_path)
    names = [os.path.relpath(source.describe(i), tmp_path) for i in range(len(source))]
    assert names == ["a.png", "a/b/c.bmp", "a/z.JPG", "b/x.png"]
    assert source.labels is None
    assert source.classes == []


def test_labels_are_first_folders(tmp_path):
    for name in ["dog/1.png", "cat/deep/2.png", "cat/3.png"]:
        save(tmp_path / name)
    source = open_source(tmp_path, labels="folder")
    assert source.classes == ["cat", "dog"]
    assert source.labels.tolist() == [0, 0, 1]
    save(tmp_path / "loose.png")
    with pytest.raises(ValueError, match=r"1 of 4 images lie in no class folder, .*loose\.png.* labels 'none'"):
        open_source(tmp_path, labels="folder")


def test_names_with_spaces_unicode_and_invalid_utf8(tmp_path):
    root = tmp_path / "meine Bilder – 写真"
    save(root / "ü ß.png", 7)
    raw = os.fsencode(root) + b"/\xff.png"
    shutil.copy(os.fsencode(root / "ü ß.png"), raw)
    source = pickle.loads(pickle.dumps(open_source(root)))
    assert first_values(source) == [7, 7]
    assert "\\xff.png" in [source.describe(i) for i in range(2)][1] + source.describe(0)
    assert source.fingerprint()


def test_listing_is_kept_and_read_again(tmp_path):
    for i in range(3):
        save(tmp_path / "set" / f"{i}.png", i)
    listing = tmp_path / "run" / "images.json"
    listing.parent.mkdir()
    first = open_source(tmp_path / "set", listing=listing)
    assert not listing.exists()
    first.save_listing(listing)
    save(tmp_path / "set" / "00.png", 9)
    again = open_source(tmp_path / "set", listing=listing)
    assert first_values(again) == first_values(first) == [0, 1, 2]
    assert again.fingerprint() == first.fingerprint()
    assert open_source(tmp_path / "set").fingerprint() != first.fingerprint()
    assert os.listdir(listing.parent) == ["images.json"]
    listing.write_text("{")
    with pytest.raises(ValueError, match="not a list of images: delete it"):
        open_source(tmp_path / "set", listing=listing)


def test_circular_links_end(tmp_path):
    save(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "back").symlink_to(tmp_path)
    assert len(open_source(tmp_path)) == 1


def test_empty(tmp_path):
    with pytest.raises(ValueError, match=r"no images found in .*; known extensions: \.jpg"):
        open_source(tmp_path)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path):
    save(tmp_path / "open" / "1.png")
    save(tmp_path / "locked" / "2.png")
    (tmp_path / "locked").chmod(0)
    try:
        for folder in (tmp_path, tmp_path / "locked"):
            with pytest.raises(ValueError, match=r"no permission to read the folder .*locked"):
                open_source(folder)
    finally:
        (tmp_path / "locked").chmod(0o700)


def test_sixteen_bit_and_many_channels(tmp_path):
    np.save(tmp_path / "a.npy", np.full((4, 5, 6), 1000, np.uint16))
    source = open_source(tmp_path, in_chans=6)
    np.testing.assert_allclose(source.read(0), np.full((4, 5, 6), 1000 / 257), rtol=1e-6)


@pytest.mark.parametrize(
    ("images", "masks"), [("images", "masks"), ("images", "labels"), ("images/training", "annotations/training")]
)
def test_segmentation_masks_are_no_images(tmp_path, images, masks):
    """As in a folder that ``dmjd evaluate segmentation`` reads."""
    for i, name in enumerate([f"{images}/a.jpg", f"{images}/b.c.png", f"{masks}/a.png", f"{masks}/b.c.png"]):
        save(tmp_path / name, i)
    save(tmp_path / masks / "other.png", 5)  # of no image
    with pytest.warns(DMJDWarning, match=f"2 masks in {tmp_path / masks.split('/')[0]} are left out"):
        source = open_source(tmp_path)
    names = [os.path.relpath(source.describe(i), tmp_path) for i in range(len(source))]
    assert names == sorted([f"{images}/a.jpg", f"{images}/b.c.png", f"{masks}/other.png"])


def test_a_class_called_masks_stays(tmp_path):
    save(tmp_path / "masks/a.png", 0)
    save(tmp_path / "hats/a.png", 1)
    assert len(open_source(tmp_path, labels="folder")) == 2
