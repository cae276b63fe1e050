"""Images with boxes, and with instance masks where every object has one, in COCO's JSON format.

Boxes that reach outside their image are clipped, and boxes without area are left out; both are counted. Any other
mistake in the file is an error that names the entry.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dmjd.data.sources.base import Source, short_hash
from dmjd.images.decoding import FORMATS
from dmjd.images.stored import UnreadableImage

LEAST_SIDE = 1e-3  # pixels; narrower boxes have no area

_PARTS = {"train": ("train", "train2017"), "test": ("test", "val", "valid", "val2017")}

# JSON file and image folder of a part, below the root.
_LAYOUTS = (
    ("{part}.json", "{part}"),
    ("annotations/{part}.json", "{part}"),
    ("annotations/instances_{part}.json", "{part}"),
    ("annotations/instances_{part}.json", "images/{part}"),
    ("{part}/_annotations.coco.json", "{part}"),  # Roboflow's export
)


@dataclass
class Instances:
    """The objects of one image.

    Attributes:
        boxes: [n, 4] float32 (left, top, right, bottom) in pixels.
        labels: [n] int64 from 0.
        crowd: [n] bool, regions of many objects, which are ignored in training and evaluation.
        masks: [n, H, W] uint8 of 0 and 1, or None.
    """

    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    masks: Tensor | None = None

    def keep(self, selected: Tensor) -> "Instances":
        """The objects selected by [n] bool."""
        masks = self.masks[selected] if self.masks is not None else None
        return Instances(self.boxes[selected], self.labels[selected], self.crowd[selected], masks)

    def to(self, device: torch.device) -> "Instances":
        """Move the objects to a device."""
        masks = self.masks.to(device) if self.masks is not None else None
        return Instances(self.boxes.to(device), self.labels.to(device), self.crowd.to(device), masks)


class _Object(NamedTuple):
    """One object: box (left, top, right, bottom), class, and its mask as COCO stores it, or None."""

    box: list[float]
    label: int
    crowd: bool
    segmentation: Any


class CocoSource(Source):
    """The images of a folder with the objects of a COCO JSON file.

    Args:
        file: the JSON file.
        folder: folder of the images.
        classes: names of the classes, in order; None: the file's own, sorted
            by id.
        in_chans, value_range: see :func:`~dmjd.images.reading.read_image`.

    Attributes:
        notes: what was clipped or left out, and how often.
        has_masks: whether every object has a mask.

    Raises:
        ValueError: saying what is wrong with the file.
    """

    def __init__(
        self,
        file: Path,
        folder: Path,
        classes: list[str] | None = None,
        in_chans: int = 3,
        value_range: tuple[float, float] | None = None,
    ) -> None:
        self.name, self.file, self.folder = str(file), file, folder
        self.in_chans, self.value_range = in_chans, value_range
        content = _read_json(file)
        used = {annotation.get("category_id") for annotation in content["annotations"]}
        label_of = self._categories(content["categories"], classes, used)
        self._entries: list[dict[str, Any]] = content["images"]
        self._sizes = [_image_size(entry, file, folder) for entry in self._entries]
        self._sort(content["annotations"], label_of)

    def _categories(
        self, categories: list[dict[str, Any]], classes: list[str] | None, used: set[Any]
    ) -> dict[Any, int]:
        """Category id -> class from 0."""
        names: dict[Any, str] = {c.get("id"): str(c.get("name", c.get("id"))) for c in categories}
        if missing := sorted(str(i) for i in used - set(names)):
            listed = ", ".join(f"{i} {name}" for i, name in list(names.items())[:10]) or "none"
            raise ValueError(
                f"{self.file}: annotations have category_id {', '.join(missing[:10])}, which 'categories' does not "
                f"list; it lists: {listed}"
            )
        self.classes = classes if classes is not None else [names[i] for i in sorted(names)]
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"{self.file}: two categories have the same name: {', '.join(self.classes[:10])}")
        index_of = {name: k for k, name in enumerate(self.classes)}
        if unknown := sorted(names[i] for i in used if names[i] not in index_of):
            raise ValueError(
                f"{self.file} has objects of {', '.join(unknown[:10])}, which the training set does not have; "
                f"it has {', '.join(self.classes[:10])}"
            )
        return {i: index_of[name] for i, name in names.items() if name in index_of}

    def _sort(self, annotations: list[dict[str, Any]], label_of: dict[int, int]) -> None:
        """Group the objects by image, and clip their boxes to it."""
        index_of = {entry["id"]: i for i, entry in enumerate(self._entries)}
        self._objects: list[list[_Object]] = [[] for _ in self._entries]
        counted: Counter[str] = Counter()
        for annotation in annotations:
            if annotation.get("image_id") not in index_of:
                raise ValueError(
                    f"{self.file}: annotation {annotation.get('id')} has image_id {annotation.get('image_id')}, which "
                    "'images' does not list"
                )
            index = index_of[annotation["image_id"]]
            box, note = _corners(annotation, self._sizes[index], self.file)
            counted[note] += 1
            if box is not None:
                label = label_of[annotation["category_id"]]
                crowd, segmentation = bool(annotation.get("iscrowd")), annotation.get("segmentation") or None
                self._objects[index].append(_Object(box, label, crowd, segmentation))
        self.notes = [f"{count} of {len(annotations)} boxes {note}" for note, count in counted.items() if note]
        with_mask = sum(o.segmentation is not None for o in self._all())
        self.has_masks = 0 < with_mask == self.num_objects
        if 0 < with_mask < self.num_objects:
            without = self.num_objects - with_mask
            self.notes.append(f"{without} of {self.num_objects} objects have no instance mask: boxes only")

    def _all(self) -> Iterable[_Object]:
        return (o for objects in self._objects for o in objects)

    @property
    def num_objects(self) -> int:
        """The number of objects in all images."""
        return sum(map(len, self._objects))

    def __len__(self) -> int:
        return len(self._entries)

    def stored(self, index: int) -> Path:
        """The image's path."""
        return self.folder / self._entries[index]["file_name"]

    def describe(self, index: int) -> str:
        """The image's path."""
        return str(self.stored(index))

    def read_example(self, index: int) -> tuple[np.ndarray, Instances]:
        """Image [H, W, C] on the 0..255 scale and its objects.

        Raises:
            UnreadableImage: if the image cannot be read, or its size is not the one in the JSON.
        """
        image, size = self.read(index), self._sizes[index]
        if image.shape[:2] != size:
            sizes = f"{image.shape[1]} x {image.shape[0]} pixels, {self.file.name} has {size[1]} x {size[0]}"
            raise UnreadableImage(self.describe(index), f"the image has {sizes} (width x height)")
        objects = self._objects[index]
        masks = None
        if self.has_masks:
            masks = torch.zeros(0, *size, dtype=torch.uint8)
            if objects:
                masks = torch.stack([instance_mask(o.segmentation, size, self.describe(index)) for o in objects])
        boxes = torch.tensor([o.box for o in objects], dtype=torch.float32).reshape(-1, 4)
        labels = torch.tensor([o.label for o in objects], dtype=torch.int64)
        return image, Instances(boxes, labels, torch.tensor([o.crowd for o in objects], dtype=torch.bool), masks)

    def _identity(self) -> Iterable[str]:
        yield from (entry["file_name"] for entry in self._entries)
        # These keys date from version 0.1 and are kept, so that fingerprints do not change.
        entries = ({"box": o.box, "crowd": o.crowd, "label": o.label, "outline": o.segmentation} for o in self._all())
        yield short_hash(json.dumps(entry, sort_keys=True) for entry in entries)


def instance_mask(segmentation: Any, size: tuple[int, int], name: str) -> Tensor:
    """A COCO "segmentation" (polygons or run lengths) as [H, W] uint8 of 0 and 1.

    Raises:
        UnreadableImage: if it cannot be decoded.
    """
    from pycocotools import mask as coco_mask  # an extra

    try:
        if isinstance(segmentation, dict) and isinstance(segmentation.get("counts"), list):
            segmentation = coco_mask.frPyObjects(segmentation, *size)
        if isinstance(segmentation, list):
            segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))
        mask = coco_mask.decode(segmentation)
    except Exception as error:  # the C library raises many types
        raise UnreadableImage(name, f"an object's mask can't be decoded ({str(error)[:100]})") from None
    if mask.shape != size:
        raise UnreadableImage(name, f"an object's mask is of an image of {mask.shape[1]} x {mask.shape[0]} pixels")
    return torch.from_numpy(np.ascontiguousarray(mask))


def open_coco(
    data: str | Path,
    split: str,
    *,
    classes: list[str] | None = None,
    in_chans: int = 3,
    value_range: tuple[float, float] | None = None,
) -> CocoSource:
    """Open images with boxes.

    Args:
        data: a folder with ``train/`` and ``train.json``, COCO's own ``train2017/`` and
            ``annotations/instances_train2017.json``, or ``train/_annotations.coco.json``; the same for test or val.
        split: "train" or "test".
        classes, in_chans, value_range: see :class:`CocoSource`.

    Raises:
        ValueError: if the data has none of these layouts.
    """
    location = find_coco(data, split)
    if location is None:
        root = Path(data).expanduser()
        if not root.is_dir():
            raise ValueError(f"there is no folder {data}: give one with train/ and train.json in COCO form")
        if split == "test" and find_coco(data, "train") is not None:
            raise ValueError(f"{data} has no test part (test/ and test.json, or val/ and val.json): pass --test-data")
        raise ValueError(
            f"{data} holds no images with boxes: give a folder with train/ and train.json in COCO form "
            "(or train2017/ and annotations/instances_train2017.json)"
        )
    return CocoSource(*location, classes, in_chans, value_range)


def find_coco(data: str | Path, split: str) -> tuple[Path, Path] | None:
    """JSON file and image folder of a part, or None."""
    root = Path(data).expanduser()
    for part in _PARTS[split]:
        for file, folder in _LAYOUTS:
            location = root / file.format(part=part), root / folder.format(part=part)
            if location[0].is_file() and location[1].is_dir():
                return location
    return None


def _read_json(file: Path) -> dict[str, Any]:
    """The parsed file; ValueError for anything but COCO annotations."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} can't be read as JSON ({str(error)[:120]})") from None
    lists = ("images", "annotations", "categories")
    missing = [name for name in lists if not isinstance(content, dict) or not isinstance(content.get(name), list)]
    if missing:
        raise ValueError(f"{file} has no list {' and no list '.join(map(repr, missing))}: it is not in COCO's form")
    if not content["images"] or not content["categories"]:
        empty = "images" if not content["images"] else "categories"
        raise ValueError(f"{file}: the list '{empty}' is empty")
    ids = [entry.get("id") for entry in content["images"]]
    if len(set(ids)) < len(ids):
        repeated = next(i for i, count in Counter(ids).items() if count > 1)
        raise ValueError(f"{file}: two images have the id {repeated}")
    return content


def _image_size(entry: dict[str, Any], file: Path, folder: Path) -> tuple[int, int]:
    """(height, width) from the JSON, else from the image's header."""
    if not isinstance(entry.get("file_name"), str):
        raise ValueError(f"{file}: image {entry.get('id')} has no file_name")
    if not (folder / entry["file_name"]).is_file():
        raise ValueError(f"{file} lists {entry['file_name']}, which is not in {folder}")
    size = entry.get("height"), entry.get("width")
    if all(isinstance(side, int) and side > 0 for side in size):
        return size  # type: ignore[return-value]
    try:
        with Image.open(folder / entry["file_name"], formats=FORMATS) as image:
            return image.height, image.width
    except OSError:
        raise ValueError(f"{file}: image {entry['file_name']} has no height and width, and can't be opened") from None


def _corners(annotation: dict[str, Any], size: tuple[int, int], file: Path) -> tuple[list[float] | None, str]:
    """(left, top, right, bottom) clipped to the image, or None if nothing is left; and a note on what was changed."""
    box = annotation.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(_is_finite(v) for v in box)):
        raise ValueError(f"{file}: annotation {annotation.get('id')} needs a bbox of four numbers, it has {box}")
    left, top, width, height = map(float, box)
    if min(width, height) < LEAST_SIDE:
        return None, "without area were left out"
    unclipped = left, top, left + width, top + height
    ends = size[1], size[0], size[1], size[0]
    inside = [min(max(value, 0.0), float(end)) for value, end in zip(unclipped, ends, strict=True)]
    if min(inside[2] - inside[0], inside[3] - inside[1]) < LEAST_SIDE:
        return None, "outside their image were left out"
    # Changes of up to one pixel are not noted: annotation tools differ in where the last pixel ends.
    changed = max(abs(a - b) for a, b in zip(inside, unclipped, strict=True)) > 1.0
    return inside, "that reach outside their image were clipped" if changed else ""


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
