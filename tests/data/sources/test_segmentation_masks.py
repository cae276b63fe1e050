"""Images with segmentation masks: layouts, formats, classes and error messages."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from dense_sets import SIZE, make_segmentation_set, open_resolved
from PIL import Image

from dmjd.data.dense_transforms import IGNORE
from dmjd.data.sources.segmentation_masks import open_segmentation
from dmjd.images.class_numbers import read_mask
from dmjd.images.preprocess import Preprocess
from dmjd.images.stored import UnreadableImage


def test_masks_become_classes_and_ignore(camvid_layout):
    train, test, classes = open_resolved(camvid_layout)
    assert classes.names == ("0", "1", "2")
    assert (len(train), len(test)) == (5, 3)
    image, mask = train.read_example(0)
    assert image.shape == (*SIZE, 3)
    assert set(np.unique(mask)) == {IGNORE, 0, 1, 2}
    assert (mask[:2] == IGNORE).all()


def test_ignored_numbers_leave_no_gap_between_classes(camvid_layout):
    """ADE20K's 0 means "no label": its classes begin at 1, and 255 may be ignored as well."""
    train, _, classes = open_resolved(camvid_layout, ignored=(0, 255))
    assert classes.names == ("1", "2")
    assert classes.numbers == [1, 2]
    assert set(np.unique(train.read_example(0)[1])) == {IGNORE, 0, 1}


@pytest.mark.parametrize(
    ("images", "masks"),
    [("images/{}", "annotations/{}"), ("{}", "{}annot"), ("{}/images", "{}/labels"), ("images/{}", "masks/{}")],
)
def test_other_layouts_are_the_same_set(camvid_layout, tmp_path, images, masks):
    for part, other in (("train", "train"), ("test", "val")):
        for kind, layout in (("images", images), ("masks", masks)):
            shutil.copytree(camvid_layout / part / kind, tmp_path / "other" / layout.format(other))
    expected, source = open_segmentation(camvid_layout, "train"), open_segmentation(tmp_path / "other", "train")
    assert np.array_equal(expected.read_numbers(3), source.read_numbers(3))
    assert len(open_segmentation(tmp_path / "other", "test")) == 3


def test_names_of_classes_come_from_a_file(camvid_layout):
    (camvid_layout / "classes.txt").write_text("ground\nrectangle\ndisc\n")
    assert open_resolved(camvid_layout)[0].classes == ["ground", "rectangle", "disc"]
    with pytest.raises(ValueError, match=r"classes.txt names 3 classes, --num-classes is 4"):
        open_resolved(camvid_layout, num_classes=4)


def test_a_table_of_images_and_masks(camvid_layout, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [open_segmentation(camvid_layout, "train").stored(i).name for i in range(5)]
    folders = {name: camvid_layout / "train" / name for name in ("images", "masks")}
    columns = {"pixel_values": folders["images"], "label": folders["masks"]}
    stored = {name: [{"bytes": (f / r).read_bytes(), "path": r} for r in rows] for name, f in columns.items()}
    table = datasets.Dataset.from_dict(stored)
    table = table.cast_column("pixel_values", datasets.Image()).cast_column("label", datasets.Image())
    (tmp_path / "t").mkdir()
    for split in ("train", "test"):
        table.to_parquet(tmp_path / "t" / f"{split}.parquet")
    train, _, classes = open_resolved(tmp_path / "t")
    assert classes.names == ("0", "1", "2")
    expected = open_resolved(camvid_layout)[0]
    for actual, wanted in zip(train.read_example(2), expected.read_example(2), strict=True):
        assert np.array_equal(actual, wanted)


def test_masks_in_other_formats_hold_the_same_numbers(tmp_path):
    numbers = np.arange(12, dtype=np.uint8).reshape(3, 4)
    palette = Image.fromarray(numbers, "P")
    palette.putpalette([255 - v // 3 for v in range(768)])
    palette.save(tmp_path / "palette.png")
    Image.fromarray(numbers.astype(np.uint16)).save(tmp_path / "sixteen.png")
    Image.fromarray(np.repeat(numbers[..., None], 3, 2)).save(tmp_path / "rgb.png")
    Image.fromarray(numbers).save(tmp_path / "gray.tif")
    np.save(tmp_path / "array.npy", numbers.astype(np.int64))
    for file in sorted(tmp_path.iterdir()):
        assert np.array_equal(read_mask(file, file.name), numbers), file


def test_files_that_are_not_masks_are_unreadable(tmp_path):
    color = np.random.default_rng(0).integers(0, 255, (4, 5, 3)).astype(np.uint8)
    Image.fromarray(color).save(tmp_path / "color.png")
    Image.fromarray(color[..., 0]).save(tmp_path / "lossy.jpg")
    (tmp_path / "cut.png").write_bytes((tmp_path / "color.png").read_bytes()[:60])
    np.save(tmp_path / "floats.npy", color[..., 0] / 255)
    np.save(tmp_path / "negative.npy", color[..., 0].astype(int) - 300)
    for name, reason in [
        ("color.png", "it is in color"),
        ("lossy.jpg", "JPEG"),
        ("cut.png", "damaged"),
        ("floats.npy", "cannot number classes"),
        ("negative.npy", "cannot number classes"),
    ]:
        with pytest.raises(UnreadableImage, match=f"{name}.*{reason}"):
            read_mask(tmp_path / name, name)


def write_mask(root: Path, part: str, name: str, numbers: np.ndarray) -> None:
    Image.fromarray(numbers).save(root / part / "masks" / name)


def test_wrong_masks_are_named_in_the_message(camvid_layout):
    def message(**options) -> str:
        with pytest.raises(ValueError, match=r".") as caught:
            open_resolved(camvid_layout, **options)
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    assert "holds the number 2; the 2 classes are numbered up to 1" in message(num_classes=2)
    wrong = np.full(SIZE, 7, np.uint8)
    write_mask(camvid_layout, "test", "01.png", wrong)  # beyond the classes of the training set
    assert "test/images/01.png holds the number 7" in message()
    assert "--ignore-index 7" in message()
    assert open_resolved(camvid_layout, ignored=(7, 255))[2].names == ("0", "1", "2")
    (camvid_layout / "train" / "masks" / "03.png").unlink()
    assert "1 of 5 images have no mask" in message()
    for i in range(5):
        write_mask(camvid_layout, "train", f"{i:02d}.png", np.full(SIZE, 1, np.uint8))
    assert "only the number 1: segmentation needs at least two classes" in message()
    for i in range(5):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (*SIZE, 3)).astype(np.uint8)).save(
            camvid_layout / "train" / "masks" / f"{i:02d}.png"
        )
    assert "5 of 5 masks" in message()
    assert "it is in color" in message()


def test_folders_without_masks_name_the_layouts(tmp_path, image_folder):
    with pytest.raises(ValueError, match="holds no images with masks: give a folder with train/images"):
        open_segmentation(image_folder, "train")
    with pytest.raises(ValueError, match="holds no images with masks"):
        open_segmentation("digits", "train")
    make_segmentation_set(tmp_path / "one part", {"train": 2})
    with pytest.raises(ValueError, match="has no test part"):
        open_segmentation(tmp_path / "one part", "test")


def test_masks_of_0_and_255_say_what_to_do(camvid_layout):
    for i in range(5):
        write_mask(camvid_layout, "train", f"{i:02d}.png", np.full(SIZE, 255 * (i % 2), np.uint8))
    with pytest.raises(
        ValueError,
        match=r"hold only the number 0, and 255, which means no label \(--ignore-index\):"
        " where it is a class, save it as 1: segmentation needs at least two classes",
    ):
        open_resolved(camvid_layout)


def test_masks_without_labels_are_noticed(camvid_layout):
    for i in range(3):
        write_mask(camvid_layout, "test", f"{i:02d}.png", np.full(SIZE, (254, 255, 255)[i], np.uint8))
    train, test, _ = open_resolved(camvid_layout, ignored=(254, 255))
    assert (train.has_labels, test.has_labels) == (True, False)


def test_numbers_far_apart_are_a_warning(camvid_layout):
    for part, count in (("train", 5), ("test", 3)):
        for i in range(count):
            write_mask(camvid_layout, part, f"{i:02d}.png", np.full(SIZE, 100 * (i % 2), np.uint8))
    with pytest.warns(UserWarning, match="hold 2 of the 101 numbers up to 100, and each number is a class"):
        open_resolved(camvid_layout)


def test_a_file_of_names_may_be_wrong(camvid_layout):
    for content, message in ((b"a\n\xff\n", "can't be read as UTF-8 text"), (b"a\nb\na", "names the class a twice")):
        (camvid_layout / "classes.txt").write_bytes(content)
        with pytest.raises(ValueError, match=f"classes.txt {message}"):
            open_resolved(camvid_layout)


def test_invalid_pixels_are_filled(camvid_layout, tmp_path):
    shutil.copytree(camvid_layout, tmp_path / "holed")
    file = sorted((tmp_path / "holed" / "train" / "images").iterdir())[0]
    image = Image.open(file).convert("RGBA")
    image.putpixel((3, 1), (*image.getpixel((3, 1))[:3], 0))
    image.save(file)
    filling = Preprocess(SIZE, 3, (0.2, 0.4, 0.6), (0.1,) * 3, alpha="invalid").filling
    source = open_segmentation(tmp_path / "holed", "train", invalid=filling)
    found, opaque = source.read(0), np.asarray(image)[..., :3]
    np.testing.assert_allclose(found[1, 3], [51, 102, 153])
    assert (found == opaque).all(axis=2).sum() == opaque[..., 0].size - 1
