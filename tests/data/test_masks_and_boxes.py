"""Images with masks and boxes: how they are placed in frames, read from disk, and what is said of wrong ones."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_sets import KINDS, SIZE, make_detection_set, make_scene, make_segmentation_set
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dmjd.data.dense_loader import BoxAugment, ExampleLoader, MaskAugment, read_examples
from dmjd.data.dense_transforms import (
    IGNORE,
    Placement,
    boxes_to_image,
    covering,
    fitting,
    jitter_colors,
    place_boxes,
    place_image,
    place_masks,
    random_placement,
    scaled,
)
from dmjd.data.sources.coco import Instances, open_coco
from dmjd.data.sources.segmentation_masks import open_segmentation, read_mask, settle_classes
from dmjd.images.decoding import UnreadableImage

GRAY = (128.0, 128.0, 128.0)


# --- placement

sides = st.tuples(st.integers(3, 60), st.integers(3, 60))


@settings(max_examples=60, deadline=None)
@given(image=sides, frame=sides, key=st.integers(-(2**63), 2**63 - 1), low=st.floats(0.3, 1.0), flip=st.booleans())
def test_pixels_masks_and_boxes_move_together(image, frame, key, low, flip):
    """An image that says of every pixel where it is: what the frame shows agrees with mask and box."""
    H, W = image
    placement = random_placement(key, image, frame, fitting(image, frame), (low, 2.0), flip)
    box = torch.tensor([[W * 0.25, H * 0.25, W * 0.75, H * 0.75]])
    inside = np.zeros(image, np.uint8)
    inside[int(H * 0.25) : int(np.ceil(H * 0.75)), int(W * 0.25) : int(np.ceil(W * 0.75))] = 1
    mask = place_masks(inside, placement, IGNORE & 0xFF)
    moved = place_boxes(box, placement)[0]
    assert mask.shape == frame
    assert (moved >= 0).all()
    assert (moved <= torch.tensor([frame[1], frame[0], frame[1], frame[0]])).all()
    found = (mask == 1).nonzero()
    if len(found):
        reach = torch.tensor([found[:, 1].min(), found[:, 0].min(), found[:, 1].max() + 1, found[:, 0].max() + 1])
        pixel = max(placement.resized[0] / H, placement.resized[1] / W) + 1
        assert (reach - moved).abs().max() <= pixel


@settings(max_examples=30, deadline=None)
@given(image=sides, key=st.integers(0, 2**62))
def test_the_filled_part_of_image_and_mask_is_the_same(image, key):
    placement = random_placement(key, image, (40, 40), fitting(image, (40, 40)), (0.5, 1.5), True)
    white = np.full((*image, 3), 255, np.uint8)
    canvas = place_image(white, placement, (0.0, 0.0, 0.0))
    mask = place_masks(np.zeros(image, np.int16), placement, IGNORE)
    assert torch.equal(canvas[0] == 255, mask != IGNORE)


def test_a_small_image_stays_inside_the_frame_and_a_large_one_fills_it():
    for key in range(40):
        small = random_placement(key, (10, 20), (32, 32), 1.0, (1.0, 1.0), False)
        assert -22 <= small.top <= 0
        assert -12 <= small.left <= 0
        large = random_placement(key, (50, 60), (32, 32), 1.0, (1.0, 1.0), False)
        assert 0 <= large.top <= 18
        assert 0 <= large.left <= 28
    tops = {random_placement(key, (34, 34), (32, 32), 1.0, (1.0, 1.0), False).top for key in range(60)}
    assert tops == {0, 1, 2}  # both ends can be drawn


def test_boxes_come_back_from_the_frame():
    placement = Placement((37, 61), scaled((37, 61), fitting((37, 61), (48, 64))), (48, 64))
    boxes = torch.tensor([[1.0, 2.0, 30.0, 36.5], [0.0, 0.0, 61.0, 37.0]])
    torch.testing.assert_close(boxes_to_image(place_boxes(boxes, placement), placement), boxes, atol=1e-4, rtol=0)


def test_whole_images_are_placed_without_change_where_sizes_agree():
    image = np.random.default_rng(0).integers(0, 256, (*SIZE, 3)).astype(np.uint8)
    placed = place_image(image, Placement(SIZE, SIZE, SIZE), GRAY)
    assert torch.equal(placed, torch.from_numpy(image).permute(2, 0, 1))
    mirrored = place_image(image, Placement(SIZE, SIZE, SIZE, flip=True), GRAY)
    assert torch.equal(mirrored, placed.flip(-1))


def test_covering_and_fitting():
    assert scaled((100, 200), covering((100, 200), (50, 50))) == (50, 100)
    assert scaled((100, 200), fitting((100, 200), (50, 50))) == (25, 50)


def test_colors_change_by_the_key_alone_and_stay_in_range():
    image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    changed = [jitter_colors(image, key) for key in range(12)]
    assert all(torch.equal(jitter_colors(image, key), changed[key]) for key in range(12))
    assert len({tuple(c.flatten().tolist()) for c in changed}) > 6
    assert all(c.dtype == torch.uint8 for c in changed)
    floats = jitter_colors(image.float(), 3)
    assert 0 <= float(floats.min()) <= float(floats.max()) <= 255
    assert jitter_colors(image[:1], 3).shape == (1, 8, 8)
    seven = torch.rand(7, 8, 8)
    assert torch.equal(jitter_colors(seven, 3), seven)


# --- masks


@pytest.fixture
def camvid_form(tmp_path) -> Path:
    return make_segmentation_set(tmp_path / "set", {"train": 5, "test": 3})


def opened(root: Path, **options):
    train, test = (open_segmentation(root, split) for split in ("train", "test"))
    return train, test, settle_classes(train, test, options.get("num_classes"), options.get("ignored", (255,)))


def test_masks_become_classes_and_ignore(camvid_form):
    train, test, classes = opened(camvid_form)
    assert classes.names == ("0", "1", "2")
    assert (len(train), len(test)) == (5, 3)
    image, mask = train.read_example(0)
    assert image.shape == (*SIZE, 3)
    assert set(np.unique(mask)) == {IGNORE, 0, 1, 2}
    assert (mask[:2] == IGNORE).all()


def test_ignored_numbers_leave_no_gap(camvid_form):
    """ADE20K's 0 means "no label": its classes begin at 1, and 255 may be ignored as well."""
    train, _, classes = opened(camvid_form, ignored=(0, 255))
    assert classes.names == ("1", "2")
    assert classes.numbers == [1, 2]
    assert set(np.unique(train.read_example(0)[1])) == {IGNORE, 0, 1}


@pytest.mark.parametrize(
    ("images", "masks"),
    [("images/{}", "annotations/{}"), ("{}", "{}annot"), ("{}/images", "{}/labels"), ("images/{}", "masks/{}")],
)
def test_other_forms_of_folders_are_the_same_set(camvid_form, tmp_path, images, masks):
    for part, other in (("train", "train"), ("test", "val")):
        for kind, form in (("images", images), ("masks", masks)):
            shutil.copytree(camvid_form / part / kind, tmp_path / "other" / form.format(other))
    expected, found = open_segmentation(camvid_form, "train"), open_segmentation(tmp_path / "other", "train")
    assert np.array_equal(expected.read_numbers(3), found.read_numbers(3))
    assert len(open_segmentation(tmp_path / "other", "test")) == 3


def test_names_of_classes_come_from_a_file(camvid_form):
    (camvid_form / "classes.txt").write_text("ground\nrectangle\ndisc\n")
    assert opened(camvid_form)[0].classes == ["ground", "rectangle", "disc"]
    with pytest.raises(ValueError, match=r"classes.txt names 3 classes, --num-classes says 4"):
        opened(camvid_form, num_classes=4)


def test_a_table_of_images_and_masks(camvid_form, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [open_segmentation(camvid_form, "train").stored(i).name for i in range(5)]
    folders = {name: camvid_form / "train" / name for name in ("images", "masks")}
    table = datasets.Dataset.from_dict(
        {"pixel_values": [str(folders["images"] / r) for r in rows], "label": [str(folders["masks"] / r) for r in rows]}
    )
    table = table.cast_column("pixel_values", datasets.Image()).cast_column("label", datasets.Image())
    (tmp_path / "t").mkdir()
    for split in ("train", "test"):
        table.to_parquet(tmp_path / "t" / f"{split}.parquet")
    train, _, classes = opened(tmp_path / "t")
    assert classes.names == ("0", "1", "2")
    expected = opened(camvid_form)[0]
    for found, wanted in zip(train.read_example(2), expected.read_example(2), strict=True):
        assert np.array_equal(found, wanted)


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


def test_what_is_no_mask_says_why(tmp_path):
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
        ("floats.npy", "number no classes"),
        ("negative.npy", "number no classes"),
    ]:
        with pytest.raises(UnreadableImage, match=f"{name}.*{reason}"):
            read_mask(tmp_path / name, name)


def write_mask(root: Path, part: str, name: str, numbers: np.ndarray) -> None:
    Image.fromarray(numbers).save(root / part / "masks" / name)


def test_wrong_masks_are_named(camvid_form):
    def message(**options) -> str:
        with pytest.raises(ValueError, match=r".") as caught:
            opened(camvid_form, **options)
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    assert "holds the number 2; the 2 classes are numbered up to 1" in message(num_classes=2)
    wrong = np.full(SIZE, 7, np.uint8)
    write_mask(camvid_form, "test", "01.png", wrong)  # past the classes of the training set
    assert "test/images/01.png holds the number 7" in message()
    assert "--ignore-index 7" in message()
    assert opened(camvid_form, ignored=(7, 255))[2].names == ("0", "1", "2")
    (camvid_form / "train" / "masks" / "03.png").unlink()
    assert "1 of 5 images have no mask" in message()
    for i in range(5):
        write_mask(camvid_form, "train", f"{i:02d}.png", np.full(SIZE, 1, np.uint8))
    assert "the number 1 alone: segmentation needs at least two classes" in message()
    for i in range(5):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (*SIZE, 3)).astype(np.uint8)).save(
            camvid_form / "train" / "masks" / f"{i:02d}.png"
        )
    assert "5 of 5 masks" in message()
    assert "it is in color" in message()


def test_folders_without_masks_say_what_is_wanted(tmp_path, image_folder):
    with pytest.raises(ValueError, match="holds no images with masks: give a folder with train/images"):
        open_segmentation(image_folder, "train")
    with pytest.raises(ValueError, match="holds no images with masks"):
        open_segmentation("digits", "train")
    make_segmentation_set(tmp_path / "one part", {"train": 2})
    with pytest.raises(ValueError, match="has no test part"):
        open_segmentation(tmp_path / "one part", "test")


def test_a_mask_of_another_size_counts_as_unreadable(camvid_form):
    write_mask(camvid_form, "train", "02.png", np.ones((5, 6), np.uint8))
    train = opened(camvid_form)[0]
    bad: list = []
    read = [e.index for batch in read_examples(train, batch_size=2, unreadable=bad) for e in batch]
    assert read == [0, 1, 3, 4]
    assert len(bad) == 1
    assert "48 x 64 pixels, its mask 5 x 6" in bad[0][1]


# --- boxes


@pytest.fixture
def coco_form(tmp_path) -> Path:
    return make_detection_set(tmp_path / "boxes", {"train": 4, "val": 2}, instance_masks=True)


def change(root: Path, part: str, **lists) -> None:
    file = root / f"{part}.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | lists))


def content(root: Path, part: str = "train") -> dict:
    return json.loads((root / f"{part}.json").read_text())


def test_objects_of_a_image(coco_form):
    source = open_coco(coco_form, "train")
    assert source.classes == list(KINDS)
    assert source.has_masks
    assert source.notes == []
    image, target = source.read_example(1)
    assert image.shape == (*SIZE, 3)
    assert target.labels.tolist() == [0, 1]
    x, y, w, h = content(coco_form)["annotations"][2]["bbox"]
    assert target.boxes[0].tolist() == [x, y, x + w, y + h]
    assert int(target.masks[0].sum()) == w * h
    assert len(open_coco(coco_form, "test")) == 2


def test_run_lengths_and_polygons_are_the_same_outline(coco_form):
    coco_mask = pytest.importorskip("pycocotools.mask")
    source = open_coco(coco_form, "train")
    masks = source.read_example(0)[1].masks
    annotations = content(coco_form)["annotations"]
    for annotation, mask in zip(annotations, masks, strict=False):
        packed = coco_mask.encode(np.asfortranarray(mask.numpy()))
        annotation["segmentation"] = {"size": packed["size"], "counts": packed["counts"].decode()}
    flat = masks[1].numpy().flatten(order="F")
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[1 - flat[0]], flat, [1 - flat[-1]]])))).tolist()
    annotations[1]["segmentation"] = {"size": list(SIZE), "counts": [0] * int(flat[0]) + runs}
    change(coco_form, "train", annotations=annotations)
    assert torch.equal(open_coco(coco_form, "train").read_example(0)[1].masks, masks)


def test_boxes_are_put_right_and_counted(coco_form):
    annotations = content(coco_form)["annotations"]
    for annotation, box in zip(
        annotations, [[-5, 3, 20, 10], [60, 40, 30, 30], [1, 1, 0, 5], [70, 5, 9, 9]], strict=False
    ):
        annotation["bbox"] = box
    change(coco_form, "train", annotations=annotations)
    source = open_coco(coco_form, "train")
    assert source.notes == [
        "2 of 8 boxes that reach out of their image were cut off at its edge",
        "1 of 8 boxes of no area were left out",
        "1 of 8 boxes wholly outside of their image were left out",
    ]
    assert source.num_objects == 6
    assert source.read_example(0)[1].boxes.tolist() == [[0, 3, 15, 13], [60, 40, 64, 48]]
    image, target = source.read_example(1)  # both its boxes are gone: an image without objects
    assert len(target.boxes) == 0
    assert target.boxes.shape == (0, 4)
    assert target.masks.shape == (0, *SIZE)
    assert image is not None


def test_wrong_json_is_named(coco_form):
    def message(part: str = "train", **options) -> str:
        with pytest.raises(ValueError, match=f"{part}.json") as caught:
            open_coco(coco_form, "train" if part == "train" else "test", **options)
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    good = content(coco_form)
    change(coco_form, "train", categories=good["categories"][:1])
    assert "have category_id 20, which 'categories' does not list; it lists: 10 rectangle" in message()
    change(coco_form, "train", categories=[])
    assert "the list 'categories' is empty" in message()
    change(coco_form, "train", **good)
    change(coco_form, "train", annotations=[good["annotations"][0] | {"image_id": 99}])
    assert "image_id 99, which 'images' does not list" in message()
    change(coco_form, "train", annotations=[good["annotations"][0] | {"bbox": [1, 2, float("nan"), 4]}])
    assert "needs a bbox of four numbers" in message()
    change(coco_form, "train", annotations=[{k: v for k, v in good["annotations"][0].items() if k != "bbox"}])
    assert "needs a bbox of four numbers, it has None" in message()
    change(coco_form, "train", **good | {"images": [*good["images"], good["images"][0]]})
    assert "two images have the id 0" in message()
    change(coco_form, "train", images=[*good["images"], {"id": 9, "file_name": "lost.png"}])
    assert "lists lost.png, which is not in" in message()
    (coco_form / "train.json").write_text('{"images": [')
    assert "can't be read as JSON" in message()
    (coco_form / "train.json").write_text('{"images": []}')
    assert "no list 'annotations' and no list 'categories'" in message()
    assert "has objects of disc, which the training set does not have" in message("val", classes=["rectangle"])


def test_a_json_without_sizes_takes_those_of_the_images(coco_form):
    images = [
        {k: v for k, v in image.items() if k not in ("height", "width")} for image in content(coco_form)["images"]
    ]
    change(coco_form, "train", images=images)
    assert open_coco(coco_form, "train").read_example(0)[0].shape[:2] == SIZE
    images[2] |= {"height": 64, "width": 48}  # an image that was turned after it was annotated
    change(coco_form, "train", images=images)
    with pytest.raises(UnreadableImage, match=r"has 64 x 48 pixels, train.json says 48 x 64"):
        open_coco(coco_form, "train").read_example(2)


def test_forms_of_folders(coco_form, tmp_path):
    for form in ("annotations/instances_{}2017.json", "{}2017/_annotations.coco.json"):
        root = tmp_path / form.split("/")[0]
        for part in ("train", "val"):
            shutil.copytree(coco_form / part, root / f"{part}2017")
            (root / form.format(part)).parent.mkdir(exist_ok=True)
            shutil.copy(coco_form / f"{part}.json", root / form.format(part))
        assert [len(open_coco(root, split)) for split in ("train", "test")] == [4, 2]
    with pytest.raises(ValueError, match="holds no images with boxes: give a folder with train/"):
        open_coco(tmp_path, "train")
    (coco_form / "val.json").unlink()
    with pytest.raises(ValueError, match="has no test part"):
        open_coco(coco_form, "test")


# --- streams


def mask_loader(root: Path, workers: int = 0) -> ExampleLoader:
    augment = MaskAugment((32, 40), (24, 32), GRAY)
    return ExampleLoader(opened(root)[0], augment, batch_size=3, seed=1, num_workers=workers)


def test_batches_follow_from_the_step_whatever_the_workers(camvid_form):
    streams = [
        mask_loader(camvid_form).batches(),
        mask_loader(camvid_form, 2).batches(),
        mask_loader(camvid_form).batches(2),
    ]
    one, two = ([next(stream) for _ in range(4)] for stream in streams[:2])
    later = [next(streams[2]) for _ in range(2)]
    for stream in streams:
        stream.close()
    for a, b in zip([*one, *one[2:]], [*two, *later], strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.targets, b.targets)
    assert one[0].images.shape == (3, 3, 32, 40)
    assert one[0].targets.dtype == torch.int16
    assert not torch.equal(one[0].images, one[1].images)


def test_an_unreadable_image_is_replaced_and_named_once(camvid_form):
    (camvid_form / "train" / "images" / "01.png").write_bytes(b"no image")
    said: list[str] = []
    augment = MaskAugment((32, 40), (24, 32), GRAY)
    loader = ExampleLoader(opened(camvid_form)[0], augment, batch_size=5, seed=1, num_workers=0, warn=said.append)
    stream = loader.batches()
    shown = [next(stream).images for _ in range(3)]
    assert [len(images) for images in shown] == [5, 5, 5]
    assert len(said) == 1
    assert "01.png" in said[0]


def test_objects_that_leave_the_frame_and_crowds_are_dropped():
    rng = np.random.default_rng(0)
    image, _, objects = make_scene(rng)
    boxes = torch.tensor([[x, y, x + w, y + h] for _, (x, y, w, h) in objects], dtype=torch.float32)
    target = Instances(boxes, torch.tensor([0, 1]), torch.tensor([False, True]))
    augment = BoxAugment((32, 32), (96, 128), GRAY, (0.9, 1.1))  # a frame far smaller than the image
    seen = [augment(image, target, key) for key in range(30)]
    assert {len(one.boxes) for _, one in seen} == {0, 1}
    for crop, one in seen:
        assert crop.shape == (3, 32, 32)
        assert (one.labels == 0).all()
        assert ((one.boxes[:, 2:] - one.boxes[:, :2]) >= 1).all()
