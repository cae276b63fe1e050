"""Images with boxes in COCO's JSON format: layouts, corrections and error messages."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_sets import KINDS, SIZE

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
    assert "lists lost.png, which is not in" in message()
    (coco_layout / "train.json").write_text('{"images": [')
    assert "can't be read as JSON" in message()
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


def test_the_fingerprint_is_that_of_version_0_1(coco_layout):
    """It is stored in results and runs."""
    assert open_coco(coco_layout, "train").fingerprint() == "9cf7d54f8391"
