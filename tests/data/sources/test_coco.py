"""Images with boxes in COCO's JSON format: layouts, corrections and error messages."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_sets import KINDS, SIZE
from PIL import Image
from support import SHARED

from dmjd.data.sources.coco import open_coco
from dmjd.images.stored import UnreadableImage


def change(root: Path, part: str, **lists) -> None:
    file = root / f"{part}.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | lists))


def content(root: Path, part: str = "train") -> dict:
    return json.loads((root / f"{part}.json").read_text())


def test_objects_of_an_image(coco_layout):
    source = open_coco(coco_layout, "train")
    assert source.classes == list(KINDS)
    assert source.has_masks
    assert source.notes == []
    image, target = source.read_example(1)
    assert image.shape == (*SIZE, 3)
    assert target.labels.tolist() == [0, 1]
    x, y, w, h = content(coco_layout)["annotations"][2]["bbox"]
    assert target.boxes[0].tolist() == [x, y, x + w, y + h]
    assert int(target.masks[0].sum()) == w * h
    assert len(open_coco(coco_layout, "test")) == 2


def test_run_lengths_and_polygons_are_the_same_mask(coco_layout):
    coco_mask = pytest.importorskip("pycocotools.mask")
    source = open_coco(coco_layout, "train")
    masks = source.read_example(0)[1].masks
    annotations = content(coco_layout)["annotations"]
    for annotation, mask in zip(annotations, masks, strict=False):
        packed = coco_mask.encode(np.asfortranarray(mask.numpy()))
        annotation["segmentation"] = {"size": packed["size"], "counts": packed["counts"].decode()}
    flat = masks[1].numpy().flatten(order="F")
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[1 - flat[0]], flat, [1 - flat[-1]]])))).tolist()
    annotations[1]["segmentation"] = {"size": list(SIZE), "counts": [0] * int(flat[0]) + runs}
    change(coco_layout, "train", annotations=annotations)
    assert torch.equal(open_coco(coco_layout, "train").read_example(0)[1].masks, masks)


def test_boxes_are_clipped_and_counted(coco_layout):
    annotations = content(coco_layout)["annotations"]
    for annotation, box in zip(
        annotations, [[-5, 3, 20, 10], [60, 40, 30, 30], [1, 1, 0, 5], [70, 5, 9, 9]], strict=False
    ):
        annotation["bbox"] = box
    change(coco_layout, "train", annotations=annotations)
    source = open_coco(coco_layout, "train")
    assert source.notes == [
        "2 of 8 boxes that reach outside their image were clipped",
        "1 of 8 boxes without area were left out",
        "1 of 8 boxes outside their image were left out",
    ]
    assert source.num_objects == 6
    assert source.read_example(0)[1].boxes.tolist() == [[0, 3, 15, 13], [60, 40, 64, 48]]
    image, target = source.read_example(1)  # both boxes were left out, so the image has no objects
    assert len(target.boxes) == 0
    assert target.boxes.shape == (0, 4)
    assert target.masks.shape == (0, *SIZE)
    assert image is not None


def test_errors_in_the_json_are_named(coco_layout):
    def message(part: str = "train", **options) -> str:
        with pytest.raises(ValueError, match=f"{part}.json") as caught:
            open_coco(coco_layout, "train" if part == "train" else "test", **options)
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    good = content(coco_layout)
    change(coco_layout, "train", categories=good["categories"][:1])
    assert "have category_id 20, which 'categories' does not list; it lists: 10 rectangle" in message()
    change(coco_layout, "train", categories=[])
    assert "the list 'categories' is empty" in message()
    change(coco_layout, "train", **good)
    change(coco_layout, "train", annotations=[good["annotations"][0] | {"image_id": 99}])
    assert "image_id 99, which 'images' does not list" in message()
    change(coco_layout, "train", annotations=[good["annotations"][0] | {"bbox": [1, 2, float("nan"), 4]}])
    assert "needs a bbox of four numbers" in message()
    change(coco_layout, "train", annotations=[{k: v for k, v in good["annotations"][0].items() if k != "bbox"}])
    assert "needs a bbox of four numbers, it has None" in message()
    change(coco_layout, "train", **good | {"images": [*good["images"], good["images"][0]]})
    assert "two images have the id 0" in message()
    change(coco_layout, "train", images=[*good["images"], {"id": 9, "file_name": "lost.png"}])
    assert "lists 'lost.png', which is not in" in message()
    (coco_layout / "train.json").write_text('{"images": [')
    assert "not valid JSON" in message()
    (coco_layout / "train.json").write_text('{"images": []}')
    assert "no list 'annotations' and no list 'categories'" in message()
    assert "has objects of disc, which the training set does not have" in message("val", classes=["rectangle"])


def test_a_json_without_sizes_takes_those_of_the_images(coco_layout):
    images = [
        {k: v for k, v in image.items() if k not in ("height", "width")} for image in content(coco_layout)["images"]
    ]
    change(coco_layout, "train", images=images)
    assert open_coco(coco_layout, "train").read_example(0)[0].shape[:2] == SIZE
    images[2] |= {"height": 64, "width": 48}  # an image that was rotated after annotation
    change(coco_layout, "train", images=images)
    with pytest.raises(UnreadableImage, match=r"has 64 x 48 pixels, train.json has 48 x 64"):
        open_coco(coco_layout, "train").read_example(2)


def test_layouts(coco_layout, tmp_path):
    for layout in ("annotations/instances_{}2017.json", "{}2017/_annotations.coco.json"):
        root = tmp_path / layout.split("/")[0]
        for part in ("train", "val"):
            shutil.copytree(coco_layout / part, root / f"{part}2017")
            (root / layout.format(part)).parent.mkdir(exist_ok=True)
            shutil.copy(coco_layout / f"{part}.json", root / layout.format(part))
        assert [len(open_coco(root, split)) for split in ("train", "test")] == [4, 2]
    with pytest.raises(ValueError, match="holds no images with boxes: give a folder with train/"):
        open_coco(tmp_path, "train")
    (coco_layout / "val.json").unlink()
    with pytest.raises(ValueError, match="has no test part"):
        open_coco(coco_layout, "test")


def test_some_objects_without_mask_leave_boxes_only(coco_layout):
    annotations = content(coco_layout)["annotations"]
    del annotations[0]["segmentation"]
    change(coco_layout, "train", annotations=annotations)
    source = open_coco(coco_layout, "train")
    assert not source.has_masks
    assert source.notes == ["1 of 8 objects have no instance mask: boxes only"]
    assert source.read_example(0)[1].masks is None


NAN = float("nan")
DAMAGED_MASKS = {
    "nan": [[1, 1, NAN, 1, 9, 9]],
    "far": [[1, 1, 1e9, 1, 9, 9]],
    "long": [[0, 0, 1e6, 1e6] * 10],
    "nothing": [[]],
    "four numbers": [[1, 2, 3, 4]],
    "odd": [[1, 1, 9, 1, 9, 9, 1]],
    "flat": [1, 1, 9, 1, 9, 9],
    "text": "polygon",
    "texts": [["1", "1", "9", "1", "9", "9"]],
    "huge run lengths": {"size": [100_000, 100_000], "counts": [1, 2]},
    "short run lengths": {"size": list(SIZE), "counts": [1, 2]},
    "negative run lengths": {"size": list(SIZE), "counts": [-1, SIZE[0] * SIZE[1] + 1]},
    "run lengths of text": {"size": list(SIZE), "counts": "\u00e9 no"},
    "cut text": {"size": list(SIZE), "counts": "o"},
    "no counts": {"size": list(SIZE)},
}


@pytest.mark.parametrize("name", DAMAGED_MASKS)
def test_an_object_with_a_damaged_mask_is_left_out_and_named(coco_layout, name):
    annotations = content(coco_layout)["annotations"]
    annotations[1]["segmentation"] = DAMAGED_MASKS[name]
    change(coco_layout, "train", annotations=annotations)
    source = open_coco(coco_layout, "train")
    assert (source.num_objects, source.has_masks) == (7, True)
    [note] = source.notes
    assert note.startswith("1 of 8 annotations were left out: an instance mask in 00.png is damaged: ")
    assert source.read_example(0)[1].masks.shape == (1, *SIZE)
    for annotation in annotations:
        annotation["segmentation"] = DAMAGED_MASKS[name]
    change(coco_layout, "train", annotations=annotations)
    source = open_coco(coco_layout, "train")  # the boxes are good
    assert (source.num_objects, source.has_masks) == (8, False)
    assert source.notes[0].startswith("8 of 8 objects have a damaged instance mask, one in 00.png: ")


@pytest.mark.parametrize(
    ("mistake", "text"),
    [
        ({"bbox": [1, 2, 3]}, "annotation 1 needs a bbox of four numbers, it has [1, 2, 3]"),
        ({"bbox": [1, 2, NAN, 4]}, "annotation 1 needs a bbox of four numbers, it has [1, 2, nan, 4]"),
        ({"bbox": [1, 2, 10**400, 4]}, "annotation 1 needs a bbox of four numbers"),
        ({"bbox": "1 2 3 4"}, "annotation 1 needs a bbox of four numbers, it has '1 2 3 4'"),
        ({"iscrowd": "no"}, "annotation 1 needs an iscrowd of 0 or 1, it has 'no'"),
        ({"image_id": [0]}, "annotation 1: it has the image_id [0], which is neither a number nor a text"),
        ({"category_id": {}}, "annotation 1: it has the category_id {}, which is neither"),
        ({"category_id": None}, "annotation 1: it has no category_id"),
        ("words", "annotation 1: is 'words', not an object"),
    ],
)
def test_a_damaged_annotation_is_left_out_and_named(coco_layout, mistake, text):
    annotations = content(coco_layout)["annotations"]
    annotations[1] = annotations[1] | mistake if isinstance(mistake, dict) else mistake
    change(coco_layout, "train", annotations=annotations)
    source = open_coco(coco_layout, "train")
    assert source.num_objects == 7
    [note] = source.notes
    assert note.startswith(f"1 of 8 annotations were left out: {text}")
    change(coco_layout, "train", annotations=[annotations[1]])
    with pytest.raises(ValueError, match=r"train.json: none of 1 annotations can be used: annotation"):
        open_coco(coco_layout, "train")


@pytest.mark.parametrize(
    ("lists", "text"),
    [
        ({"images": [{"file_name": "00.png"}]}, "entry 0 of 'images' has no id"),
        ({"images": [{"id": [1], "file_name": "00.png"}]}, r"entry 0 of 'images' has the id \[1\], which is neither"),
        ({"images": ["00.png"]}, "entry 0 of 'images' is '00.png', not an object with id and file_name"),
        ({"images": [{"id": 1, "file_name": 5}]}, "image 1 has no file_name"),
        ({"images": [{"id": 1, "file_name": "00.png", "height": 10**6, "width": 10**6}]}, "1000000 x 1000000 pixels"),
        ({"categories": ["a"]}, "entry 0 of 'categories' is 'a', not an object"),
        ({"categories": [{"id": 10, "name": "a"}, {"id": 10, "name": "b"}]}, "'a' and 'b' have the same id 10"),
        ({"categories": [{"id": [1], "name": "a"}]}, r"entry 0 of 'categories' has the id \[1\]"),
    ],
)
def test_a_file_of_the_wrong_structure_is_an_error(coco_layout, lists, text):
    change(coco_layout, "train", **lists)
    with pytest.raises(ValueError, match=f"train.json.*{text}") as caught:
        open_coco(coco_layout, "train")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["../../../etc/hosts", "/etc/hosts", "x/../../../etc/hosts", "../../{root}-2/00.png"])
def test_images_outside_of_the_root_are_refused(coco_layout, name):
    shutil.copytree(coco_layout / "train", coco_layout.with_name(f"{coco_layout.name}-2"))
    images = [{"id": 1, "file_name": name.replace("{root}", coco_layout.name)}]
    change(coco_layout, "train", images=images, annotations=[])
    with pytest.raises(ValueError, match="which is outside of"):
        open_coco(coco_layout, "train")
    (coco_layout / "train" / "linked").symlink_to(coco_layout.with_name(f"{coco_layout.name}-2"))
    images = [{"id": 1, "file_name": "linked/00.png"}, {"id": 2, "file_name": "../val/00.png"}]
    change(coco_layout, "train", images=images, annotations=[])
    assert len(open_coco(coco_layout, "train").read_example(0)[0]) == SIZE[0]


@pytest.mark.skipif(not (SHARED / "faults").exists(), reason="the shared files that go wrong are not here")
@pytest.mark.parametrize("name", ["no_image_id", "list_ids", "string_image", "traversal", "two_categories_one_id"])
def test_shared_files_are_errors(tmp_path, name):
    (tmp_path / "train").mkdir()
    Image.new("RGB", (80, 60)).save(tmp_path / "train" / "a.png")
    shutil.copy(SHARED / "faults" / f"coco_{name}.json", tmp_path / "train.json")
    with pytest.raises(ValueError, match=r"train\.json"):
        open_coco(tmp_path, "train")


@pytest.mark.skipif(not (SHARED / "faults").exists(), reason="the shared files that go wrong are not here")
@pytest.mark.parametrize("name", ["flat_polygon", "nan_polygon", "huge_rle"])
def test_shared_files_with_damaged_masks(tmp_path, name):
    (tmp_path / "train").mkdir()
    Image.new("RGB", (80, 60)).save(tmp_path / "train" / "a.png")
    shutil.copy(SHARED / "faults" / f"coco_{name}.json", tmp_path / "train.json")
    source = open_coco(tmp_path, "train")
    assert source.notes[0].startswith("1 of 1 objects have a damaged instance mask, one in a.png: ")
    assert source.read_example(0)[1].boxes.tolist() == [[5, 5, 25, 25]]


def test_areas_of_the_json_are_kept_without_masks(coco_layout):
    annotations = content(coco_layout)["annotations"]
    for annotation, area in zip(annotations, [7.5, -1, NAN, "x", None, 0, 3, 4], strict=True):
        annotation["area"] = area
        del annotation["segmentation"]
    same = open_coco(coco_layout, "train").fingerprint()
    change(coco_layout, "train", annotations=annotations)
    source = open_coco(coco_layout, "train")
    boxes = [annotation["bbox"] for annotation in annotations]
    expected = [7.5, *(box[2] * box[3] for box in boxes[1:5]), 1e-6, 3, 4]
    assert torch.cat([source.read_example(i)[1].areas for i in range(4)]).tolist() == pytest.approx(expected)
    assert source.fingerprint() != same


def test_special_files_among_the_images_are_unreadable(coco_layout):
    (coco_layout / "train" / "00.png").unlink()
    os.mkfifo(coco_layout / "train" / "00.png")
    with pytest.raises(UnreadableImage, match=r"00.png: it is a FIFO, not a file"):
        open_coco(coco_layout, "train").read_example(0)
    images = [{k: v for k, v in image.items() if k != "height"} for image in content(coco_layout)["images"]]
    change(coco_layout, "train", images=images)
    with pytest.raises(ValueError, match=r"00\.png has no height and width, and can't be opened"):
        open_coco(coco_layout, "train")
    (coco_layout / "train.json").unlink()
    os.mkfifo(coco_layout / "train.json")
    with pytest.raises(ValueError, match=r"train\.json: cannot be read \(it is a FIFO, not a file\)"):
        open_coco(coco_layout, "train")


def test_the_fingerprint_is_that_of_version_0_1(coco_layout):
    """It is stored in results and runs."""
    assert open_coco(coco_layout, "train").fingerprint() == "9cf7d54f8391"
