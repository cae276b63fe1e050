"""Images with boxes, and with instance masks where every object has one, in COCO's JSON format.

Boxes that reach outside their image are clipped. Boxes without area, and annotations that are damaged, are left out.
All of these are counted. A file of the wrong structure is an error that names the entry.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmjd.data.sources.base import Source, short_hash
from dmjd.data.sources.coco_json import (
    CocoObject,
    LeftOut,
    coco_categories,
    coco_images,
    parse_object,
    read_coco,
    reference,
    segmentation_error,
)
from dmjd.data.sources.instance_masks import instance_mask
from dmjd.data.sources.paths import expanded, one_line, permission_checked
from dmjd.images.invalid import InvalidPixels
from dmjd.images.stored import UnreadableImage
from dmjd.text import printable

_LEAST_AREA = 1e-6  # square pixels; an area of 0 stands for an unknown one in torchmetrics

_VALIDATION = ("val", "valid", "val2017")

# The first that exists.
_PARTS = {"train": ("train", "train2017"), "val": _VALIDATION, "test": ("test", *_VALIDATION)}

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
        areas: [n] float32 in square pixels, by which an evaluation tells small from large objects; None: those of the
            masks or boxes.
    """

    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    masks: Tensor | None = None
    areas: Tensor | None = None

    def keep(self, selected: Tensor) -> "Instances":
        """The objects selected by [n] bool."""
        masks, areas = (None if x is None else x[selected] for x in (self.masks, self.areas))
        return Instances(self.boxes[selected], self.labels[selected], self.crowd[selected], masks, areas)

    def to(self, device: torch.device) -> "Instances":
        """Move the objects to a device."""
        masks, areas = (None if x is None else x.to(device) for x in (self.masks, self.areas))
        return Instances(self.boxes.to(device), self.labels.to(device), self.crowd.to(device), masks, areas)


class CocoSource(Source):
    """The images of a folder with the objects of a COCO JSON file.

    Args:
        file: the JSON file.
        folder: folder of the images.
        classes: names of the classes, in order; None: the file's own, sorted
            by id.
        in_chans, value_range: see :func:`~dmjd.images.reading.read_image`.
        root: folder that no image may lie outside of; None: ``folder``.

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
        root: Path | None = None,
    ) -> None:
        self.name, self.file, self.folder = str(file), file, folder
        self.in_chans, self.value_range = in_chans, value_range
        content = read_coco(file)
        self._names = coco_categories(content["categories"], file)
        self.classes = self._names_of_classes(classes)
        self._entries = coco_images(content["images"], file, folder, root or folder)
        self._sort(content["annotations"])

    def _names_of_classes(self, classes: list[str] | None) -> list[str]:
        names = classes if classes is not None else list(self._names.values())
        if len(set(names)) < len(names):
            raise ValueError(f"{self.file}: two categories have the same name: {', '.join(map(printable, names[:10]))}")
        return names

    def _label_of(self, used: set[Any]) -> dict[Any, int]:
        """Category id -> class from 0, of the categories of objects."""
        names = self._names
        if missing := sorted(printable(i) for i in used - set(names)):
            listed = ", ".join(f"{i} {printable(name)}" for i, name in list(names.items())[:10]) or "none"
            raise ValueError(
                f"{self.file}: annotations have category_id {', '.join(missing[:10])}, which 'categories' does not "
                f"list; it lists: {listed}"
            )
        index_of = {name: k for k, name in enumerate(self.classes)}
        if unknown := sorted(printable(names[i]) for i in used if names[i] not in index_of):
            raise ValueError(
                f"{self.file} has objects of {', '.join(unknown[:10])}, which the training set does not have; "
                f"it has {', '.join(map(printable, self.classes[:10]))}"
            )
        return {i: index_of[name] for i, name in names.items() if name in index_of}

    def _sort(self, annotations: list[Any]) -> None:
        """Group the objects by image, clip their boxes to it, and leave out what cannot be used."""
        index_of = {entry.id: i for i, entry in enumerate(self._entries)}
        left_out, counted = LeftOut(), Counter[str]()
        usable = list(_referring(annotations, left_out))
        label_of = self._label_of({category for _, _, category, _ in usable})
        self._objects: list[list[CocoObject]] = [[] for _ in self._entries]
        for which, image, category, annotation in usable:
            if image not in index_of:
                raise ValueError(f"{self.file}: {which} has image_id {printable(image)}, which 'images' does not list")
            index = index_of[image]
            try:
                item, note = parse_object(annotation, label_of[category], self._entries[index].size)
            except ValueError as error:
                left_out.add(str(error).split(",")[0], f"{which} {error}")
                continue
            counted[note] += 1
            if item is not None:
                self._objects[index].append(item)
        self.notes = [f"{count} of {len(annotations)} boxes {note}" for note, count in counted.items() if note]
        self._check_masks(left_out)
        self.notes += [f"{n} of {len(annotations)} annotations were left out: {t}" for n, t in left_out.listed()]
        if left_out.counts and not self.num_objects:
            raise ValueError(
                f"{self.file}: none of {len(annotations)} annotations can be used: {left_out.listed()[0][1]}"
            )

    def _check_masks(self, left_out: LeftOut) -> None:
        """Leave out objects whose mask is damaged if the others have masks; else use boxes only."""
        errors = {
            id(item): (entry, error)
            for entry, objects in zip(self._entries, self._objects, strict=True)
            for item in objects
            if (error := segmentation_error(item, entry.size))
        }
        missing = sum(item.segmentation is None for item in self._all())
        self.has_masks = missing == 0 and len(errors) < self.num_objects
        if self.has_masks:
            for entry, error in errors.values():
                left_out.add(error, f"an instance mask in {printable(entry.file_name)} is damaged: {error}")
            self._objects = [[item for item in objects if id(item) not in errors] for objects in self._objects]
            return
        if errors:
            entry, error = next(iter(errors.values()))
            self.notes.append(
                f"{len(errors)} of {self.num_objects} objects have a damaged instance mask, one in "
                f"{printable(entry.file_name)}: {error}"
            )
        if 0 < (without := missing + len(errors)) < self.num_objects:
            self.notes.append(f"{without} of {self.num_objects} objects have no instance mask: boxes only")

    def _all(self) -> Iterable[CocoObject]:
        return (o for objects in self._objects for o in objects)

    @property
    def num_objects(self) -> int:
        """The number of objects in all images."""
        return sum(map(len, self._objects))

    @property
    def has_objects(self) -> bool:
        """Whether there is any object that is no crowd."""
        return any(not o.crowd for o in self._all())

    def __len__(self) -> int:
        return len(self._entries)

    def stored(self, index: int) -> str:
        """The image's path."""
        return self._entries[index].path

    def describe(self, index: int) -> str:
        """The image's path."""
        return one_line(os.path.join(self.folder, self._entries[index].file_name))

    def read_example(self, index: int) -> tuple[np.ndarray, Instances]:
        """Image [H, W, C] on the 0..255 scale and its objects.

        Raises:
            UnreadableImage: if the image cannot be read, or its size is not the one in the JSON.
        """
        image, size = self.read(index), self._entries[index].size
        if image.shape[:2] != size:
            sizes = f"{image.shape[1]} x {image.shape[0]} pixels, {self.file.name} has {size[1]} x {size[0]}"
            raise UnreadableImage(self.describe(index), f"the image has {sizes} (width x height)")
        objects = self._objects[index]
        boxes = torch.tensor([o.box for o in objects], dtype=torch.float32).reshape(-1, 4)
        labels = torch.tensor([o.label for o in objects], dtype=torch.int64)
        crowd = torch.tensor([o.crowd for o in objects], dtype=torch.bool)
        if not self.has_masks:
            areas = torch.tensor([o.area for o in objects], dtype=torch.float32).clamp(min=_LEAST_AREA)
            return image, Instances(boxes, labels, crowd, areas=areas)
        masks = torch.zeros(0, *size, dtype=torch.uint8)
        if objects:
            masks = torch.stack([instance_mask(o.segmentation, size, self.describe(index)) for o in objects])
        return image, Instances(boxes, labels, crowd, masks)

    def _identity(self) -> Iterable[str]:
        yield from (entry.file_name for entry in self._entries)
        # These keys date from version 0.1 and are kept, so that fingerprints do not change.
        entries = ({"box": o.box, "crowd": o.crowd, "label": o.label, "outline": o.segmentation} for o in self._all())
        yield short_hash(json.dumps(entry, sort_keys=True) for entry in entries)
        if not self.has_masks and any(o.area != o.box_area for o in self._all()):
            yield short_hash(str(o.area) for o in self._all())


def _referring(annotations: list[Any], left_out: LeftOut) -> Iterable[tuple[str, Any, Any, dict[str, Any]]]:
    """(its name in messages, image_id, category_id, annotation) of those that refer to an image and a category."""
    for number, annotation in enumerate(annotations):
        given = annotation.get("id") if isinstance(annotation, dict) else None
        which = f"annotation {number if given is None else printable(given)[:40]}"
        try:
            ids = [reference(annotation, name) for name in ("image_id", "category_id")]
        except ValueError as error:
            left_out.add("reference", f"{which}: {error}")
            continue
        yield which, *ids, annotation


def open_coco(
    data: str | Path,
    split: str,
    *,
    classes: list[str] | None = None,
    in_chans: int = 3,
    value_range: tuple[float, float] | None = None,
    invalid: InvalidPixels | None = None,
) -> CocoSource:
    """Open images with boxes.

    Args:
        data: a folder with ``train/`` and ``train.json``, COCO's own ``train2017/`` and
            ``annotations/instances_train2017.json``, or ``train/_annotations.coco.json``; the same for test or val.
        split: "train", "val" or "test".
        classes, in_chans, value_range: see :class:`CocoSource`.
        invalid: see :func:`~dmjd.images.reading.read_image`.

    Raises:
        ValueError: if the data has none of these layouts.
    """
    location = find_coco(data, split)
    if location is None:
        root = expanded(data)
        if not root.is_dir():
            raise ValueError(f"there is no folder {data}: give one with train/ and train.json in COCO form")
        if split != "train" and find_coco(data, "train") is not None:
            files = "test/ and test.json, or val/ and val.json" if split == "test" else "val/ and val.json"
            cure = "pass --test-data" if split == "test" else "give data that has one"
            raise ValueError(f"{data} has no {split} part ({files}): {cure}")
        raise ValueError(
            f"{data} holds no images with boxes: give a folder with train/ and train.json in COCO form "
            "(or train2017/ and annotations/instances_train2017.json)"
        )
    source = CocoSource(*location, classes, in_chans, value_range, expanded(data))
    source.invalid = invalid
    source.split = "val" if split != "train" and location == find_coco(data, "val") else split
    return source


def find_coco(data: str | Path, split: str) -> tuple[Path, Path] | None:
    """JSON file and image folder of a part, or None."""
    root = expanded(data)
    with permission_checked(root):
        for part in _PARTS[split]:
            for file, folder in _LAYOUTS:
                location = root / file.format(part=part), root / folder.format(part=part)
                if location[0].exists() and location[1].is_dir():
                    return location
    return None
