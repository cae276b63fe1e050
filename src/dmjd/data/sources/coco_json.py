"""The content of a COCO JSON file, checked before anything uses it.

A file of the wrong structure is an error. A single annotation that cannot be used is left out, and counted.
"""

import math
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from dmjd.checked_json import read_json
from dmjd.data.sources.instance_masks import mask_error
from dmjd.data.sources.paths import path_inside
from dmjd.images.decoding import FORMATS
from dmjd.images.stored import check_pixels
from dmjd.regular import irregular
from dmjd.text import printable

LEAST_SIDE = 1e-3  # pixels; narrower boxes have no area

Id = int | float | str


@dataclass(frozen=True)
class CocoImage:
    """An image: its id, file name below the folder of images, path, and (height, width)."""

    id: Id
    file_name: str
    path: str
    size: tuple[int, int]


class CocoObject(NamedTuple):
    """One object: box (left, top, right, bottom), class, mask as COCO stores it or None, and area in square pixels."""

    box: list[float]
    label: int
    crowd: bool
    segmentation: Any
    area: float

    @property
    def box_area(self) -> float:
        """The area of the box."""
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])


@dataclass
class LeftOut:
    """Annotations that cannot be used: kind of mistake -> how many, and the first of them in words."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, text: str) -> None:
        """Count an annotation."""
        self.counts[kind] += 1
        self.first.setdefault(kind, text)

    def listed(self) -> list[tuple[int, str]]:
        """How many of each kind, and the first of them."""
        return [(count, self.first[kind]) for kind, count in self.counts.items()]


def read_coco(file: Path) -> dict[str, list[Any]]:
    """The lists "images", "annotations" and "categories" of a file.

    Raises:
        ValueError: if it is not in COCO's form.
    """
    content = read_json(file, dict[str, Any])
    lists = ("images", "annotations", "categories")
    missing = [name for name in lists if not isinstance(content.get(name), list)]
    if missing:
        raise ValueError(f"{file} has no list {' and no list '.join(map(repr, missing))}: it is not in COCO's form")
    if not content["images"] or not content["categories"]:
        empty = "images" if not content["images"] else "categories"
        raise ValueError(f"{file}: the list '{empty}' is empty")
    return {name: content[name] for name in lists}


def coco_images(entries: list[Any], file: Path, folder: Path, root: Path) -> list[CocoImage]:
    """The entries of "images".

    Args:
        entries: the list.
        file: the JSON file.
        folder: folder of the images.
        root: folder that no image may lie outside of.

    Raises:
        ValueError: naming the entry that is wrong.
    """
    images: dict[Id, CocoImage] = {}
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ValueError(
                f"{file}: entry {number} of 'images' is {_short(entry)}, not an object with id and file_name"
            )
        name, key = entry.get("file_name"), _id(entry, f"{file}: entry {number} of 'images'")
        if not isinstance(name, str) or not name:
            raise ValueError(f"{file}: image {_short(key)} has no file_name")
        if key in images:
            raise ValueError(f"{file}: two images have the id {_short(key)}: {images[key].file_name} and {name}")
        path = path_inside(root, folder, name)
        if path is None:
            raise ValueError(f"{file} lists {_short(name)}, which is outside of {root}: move the image there")
        if not os.path.exists(path):
            raise ValueError(f"{file} lists {_short(name)}, which is not in {folder}")
        images[key] = CocoImage(key, name, path, _image_size(entry, path, file))
    return list(images.values())


def coco_categories(entries: list[Any], file: Path) -> dict[Id, str]:
    """Category id -> name, in the order of ids.

    Raises:
        ValueError: naming the entry that is wrong, or two with the same id.
    """
    names: dict[Id, str] = {}
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ValueError(
                f"{file}: entry {number} of 'categories' is {_short(entry)}, not an object with id and name"
            )
        key = _id(entry, f"{file}: entry {number} of 'categories'")
        name = str(entry.get("name", key))
        if key in names:
            raise ValueError(f"{file}: the categories {_short(names[key])} and {_short(name)} have the same id {key}")
        names[key] = name
    return dict(sorted(names.items(), key=lambda item: (isinstance(item[0], str), item[0])))


def parse_object(annotation: dict[str, Any], label: int, size: tuple[int, int]) -> tuple[CocoObject | None, str]:
    """An object whose box is clipped to its image, or None if nothing is left; and a note on what was changed.

    Raises:
        ValueError: saying what is wrong with it.
    """
    box, crowd = annotation.get("bbox"), annotation.get("iscrowd") or 0
    if not (isinstance(box, list) and len(box) == 4 and all(_is_finite(v) for v in box)):
        raise ValueError(f"needs a bbox of four numbers, it has {_short(box)}")
    if crowd not in (0, 1):
        raise ValueError(f"needs an iscrowd of 0 or 1, it has {_short(crowd)}")
    inside, note = _clipped(list(map(float, box)), size)
    if inside is None:
        return None, note
    area, segmentation = annotation.get("area"), annotation.get("segmentation") or None
    item = CocoObject(inside, label, bool(crowd), segmentation, -1.0)
    return item._replace(area=float(area) if _is_finite(area) and area >= 0 else item.box_area), note  # type: ignore[operator, arg-type]


def segmentation_error(item: CocoObject, size: tuple[int, int]) -> str | None:
    """What is wrong with an object's mask, if it has one."""
    return None if item.segmentation is None else mask_error(item.segmentation, size)


def reference(annotation: Any, name: str) -> Id:
    """The ``image_id`` or ``category_id`` of an annotation.

    Raises:
        ValueError: if it is not a number or a text.
    """
    if not isinstance(annotation, dict):
        raise ValueError(f"is {_short(annotation)}, not an object")
    return _id(annotation, "it", name)


def _id(entry: dict[str, Any], what: str, name: str = "id") -> Id:
    value = entry.get(name)
    if value is None:
        raise ValueError(f"{what} has no {name}")
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{what} has the {name} {_short(value)}, which is neither a number nor a text")
    return value


def _image_size(entry: dict[str, Any], path: str, file: Path) -> tuple[int, int]:
    """(height, width) from the JSON, else from the image's header."""
    height, width = entry.get("height"), entry.get("width")
    name = printable(entry["file_name"])
    if type(height) is int and type(width) is int and min(height, width) > 0:
        size = height, width
    else:
        try:
            if irregular(path):
                raise OSError
            with Image.open(path, formats=FORMATS) as image:
                size = image.height, image.width
        except Exception:  # decoders raise nearly every built-in exception
            raise ValueError(f"{file}: image {name} has no height and width, and can't be opened") from None
    try:
        check_pixels(*size)
    except ValueError as error:
        raise ValueError(f"{file}: image {name} has {error.args[1]}") from None
    return size


def _clipped(box: list[float], size: tuple[int, int]) -> tuple[list[float] | None, str]:
    """(left, top, right, bottom) inside the image, or None; and a note."""
    left, top, width, height = box
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
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        return False


def _short(value: Any) -> str:
    """A value of the file in a message."""
    text = printable(value)
    text = text if len(text) <= 80 else f"{text[:77]}..."
    return f"'{text}'" if isinstance(value, str) else text
