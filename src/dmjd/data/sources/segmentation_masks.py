"""Images with segmentation masks: two folders (CamVid and ADE20K layouts), parquet files and Hugging Face sets.

A mask is an image with one number per pixel: gray or palette PNG, TIFF, BMP, GIF or .npy. The classes are the numbers
0, 1, 2, ... without the ignored ones.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dmjd.config.fields import SPLITS
from dmjd.data.dense_transforms import IGNORE
from dmjd.data.sources.base import Source
from dmjd.data.sources.folder import FolderSource
from dmjd.data.sources.paths import expanded, permission_checked
from dmjd.data.sources.registry import has_split, missing_split, open_source
from dmjd.data.workers import available_cores
from dmjd.images.class_numbers import read_mask
from dmjd.images.decoding import ImageLike
from dmjd.images.invalid import InvalidPixels
from dmjd.images.stored import UnreadableImage
from dmjd.text import printable
from dmjd.warning import DMJDWarning

MASK_EXTENSIONS = (".png", ".tif", ".tiff", ".bmp", ".gif", ".npy")  # lossless formats

CLASS_NAMES = "classes.txt"

NO_LABEL = 255  # the usual value of pixels without label

_MOST_NUMBERS = 1 << 16

_MOST_UNREADABLE_SHARE = 0.01

_VALIDATION = ("val", "valid", "validation")

# The first that exists.
_FOLDERS = {"train": ("train", "training"), "val": _VALIDATION, "test": ("test", "testing", *_VALIDATION)}

# Folders of the images and masks of a part, relative to the root.
_LAYOUTS: tuple[Callable[[str], tuple[str, str]], ...] = (
    lambda part: (f"{part}/images", f"{part}/masks"),
    lambda part: (f"{part}/images", f"{part}/labels"),
    lambda part: (f"images/{part}", f"masks/{part}"),
    lambda part: (f"images/{part}", f"annotations/{part}"),  # ADE20K
    lambda part: (f"images/{part}", f"labels/{part}"),
    lambda part: (part, f"{part}annot"),  # CamVid as published with SegNet
)

_LAYOUTS_WITHOUT_PARTS = (("images", "masks"), ("images", "annotations"), ("images", "labels"))


@dataclass(frozen=True)
class ClassMap:
    """The classes of the numbers in the masks.

    Attributes:
        names: names of the K classes.
        ignored: numbers that mean "no label".
    """

    names: tuple[str, ...]
    ignored: tuple[int, ...] = (NO_LABEL,)

    @property
    def numbers(self) -> list[int]:
        """The number of each class in the masks."""
        return class_numbers(len(self.names), self.ignored)

    def table(self) -> np.ndarray:
        """[65536] int16: number -> class, IGNORE, or IGNORE - 1 if it is neither."""
        table = np.full(_MOST_NUMBERS, IGNORE - 1, np.int16)
        table[self.numbers] = np.arange(len(self.names))
        table[[number for number in self.ignored if 0 <= number < _MOST_NUMBERS]] = IGNORE
        return table


def class_numbers(count: int, ignored: Sequence[int]) -> list[int]:
    """The first ``count`` numbers from 0 on that are not ignored."""
    return [number for number in range(count + len(ignored)) if number not in ignored][:count]


class SegmentationSource(Source):
    """Images and their masks.

    Args:
        images, masks: sources.
        mask_index: [n] int64, index of the mask of each image; None: the same index.

    Attributes:
        class_map: the classes, set by :meth:`set_classes`.
        has_labels: whether any pixel of the masks has a label, set by :func:`resolve_classes`.
    """

    def __init__(self, images: Source, masks: Source, mask_index: np.ndarray | None = None) -> None:
        self.name, self.in_chans, self.value_range = images.name, images.in_chans, images.value_range
        self.images, self.masks, self.split, self.invalid = images, masks, images.split, images.invalid
        self._mask_index = np.arange(len(masks)) if mask_index is None else mask_index
        self.class_map: ClassMap | None = None
        self.has_labels = True
        self._table: np.ndarray | None = None

    def set_classes(self, class_map: ClassMap) -> None:
        """Set the classes; needed before :meth:`read_example`."""
        self.class_map, self.classes = class_map, list(class_map.names)
        self._table = class_map.table()

    def __len__(self) -> int:
        return len(self._mask_index)

    def stored(self, index: int) -> ImageLike:
        """The image as stored."""
        return self.images.stored(index)

    def describe(self, index: int) -> str:
        """The name of the image in messages."""
        return self.images.describe(index)

    def read_numbers(self, index: int) -> np.ndarray:
        """The mask as stored: [H, W] of integers.

        Raises:
            UnreadableImage: if it cannot be read.
        """
        row = int(self._mask_index[index])
        return read_mask(self.masks.stored(row), f"mask {self.masks.describe(row)}")

    def read_example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image [H, W, C] on the 0..255 scale and mask [H, W] int16 of classes and IGNORE.

        Raises:
            UnreadableImage: if either cannot be read, or if their sizes differ.
        """
        assert self._table is not None, "call set_classes first"
        image, mask = self.read(index), self._table[self.read_numbers(index)]
        if image.shape[:2] != mask.shape:
            sizes = f"{image.shape[0]} x {image.shape[1]} pixels, its mask {mask.shape[0]} x {mask.shape[1]}"
            raise UnreadableImage(self.describe(index), f"the image has {sizes}")
        return image, mask

    def fingerprint(self) -> str:
        """Short hash of images and masks."""
        return f"{self.images.fingerprint()}-{self.masks.fingerprint()}"

    def content_hash(self) -> str:
        """See :meth:`Source.content_hash`."""
        return f"{self.images.content_hash()}-{self.masks.content_hash()}"


def open_segmentation(
    data: str | Path,
    split: str,
    *,
    in_chans: int = 3,
    value_range: tuple[float, float] | None = None,
    invalid: InvalidPixels | None = None,
) -> SegmentationSource:
    """Open images with masks.

    Args:
        data: a folder with ``train/images`` and ``train/masks`` (CamVid layout), ``images/training`` and
            ``annotations/training`` (ADE20K layout), ``train`` and ``trainannot``, or ``images`` and ``masks``, where
            an image and its mask differ only in the ending; or a parquet or hub table with two columns of images.
        split: "train", "val" or "test".
        in_chans, value_range, invalid: see :func:`~dmjd.images.reading.read_image`.

    Raises:
        ValueError: if the data has none of these layouts, or an image has no mask.
    """
    options = {"in_chans": in_chans, "value_range": value_range}
    root = expanded(data)
    folders = _find_folders(root, split)
    if folders is not None:
        validation = split != "train" and folders == _find_folders(root, "val")
        images = FolderSource(folders[0], **options)  # type: ignore[arg-type]
        masks = FolderSource(folders[1], extensions=MASK_EXTENSIONS)
        images.split, images.invalid = "val" if validation else split, invalid
        return SegmentationSource(images, masks, _pair(images, masks))
    if root.is_dir() and split != "train" and _find_folders(root, "train") is not None:
        raise ValueError(missing_split(str(data), split))
    mask_table = open_source(data, split=split, masks=True)  # its message says what is missing
    table = open_source(data, split=split, **options)  # type: ignore[arg-type]
    table.invalid = invalid
    return SegmentationSource(table, mask_table)


def has_segmentation_split(data: str | Path, split: str) -> bool:
    """Whether :func:`open_segmentation` finds this split."""
    root = expanded(data)
    folders = {name: _find_folders(root, name) for name in SPLITS}
    return folders[split] is not None if any(folders.values()) else has_split(data, split)


def _find_folders(root: Path, split: str) -> tuple[Path, Path] | None:
    """The folders of images and masks of a split, or None. Folders without parts are for training."""
    layouts = [layout(part) for part in _FOLDERS[split] for layout in _LAYOUTS]
    layouts += _LAYOUTS_WITHOUT_PARTS if split == "train" else ()
    with permission_checked(root):
        for images, masks in layouts:
            if (root / images).is_dir() and (root / masks).is_dir():
                return root / images, root / masks
    return None


def _pair(images: FolderSource, masks: FolderSource) -> np.ndarray:
    """[n] int64: for each image, the index of the mask with the same relative path except for the ending."""
    mask_of = {_stem(masks, i): i for i in range(len(masks))}
    stems = [_stem(images, i) for i in range(len(images))]
    if len(mask_of) < len(masks):
        raise ValueError(f"{masks.root} holds masks whose names differ only in the ending: keep one of each")
    missing = [i for i, stem in enumerate(stems) if stem not in mask_of]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(images)} images have no mask in {masks.root}, {images.describe(missing[0])} for "
            "one: a mask has its image's name, with .png at the end"
        )
    return np.array([mask_of[stem] for stem in stems], dtype=np.int64)


def _stem(source: FolderSource, index: int) -> str:
    return source.stored(index).relative_to(source.root).with_suffix("").as_posix()


def count_numbers(source: SegmentationSource) -> tuple[np.ndarray, dict[int, int]]:
    """Count the numbers in all masks, in threads.

    Returns:
        [65536] int64, pixels of each number; and, for each number that occurs, the first image with it.

    Raises:
        ValueError: if more than 1 % of the masks (and more than ten) cannot be read.
    """
    pixels = np.zeros(_MOST_NUMBERS, np.int64)
    first: dict[int, int] = {}
    unreadable: list[UnreadableImage] = []
    with ThreadPoolExecutor(available_cores()) as pool:
        for index, counted in enumerate(pool.map(lambda i: _count(source, i), range(len(source)))):
            if isinstance(counted, UnreadableImage):
                unreadable.append(counted)
                continue
            pixels[: len(counted)] += counted
            for number in np.flatnonzero(counted):
                first.setdefault(int(number), index)
    if len(unreadable) > max(10, _MOST_UNREADABLE_SHARE * len(source)) or len(unreadable) == len(source):
        raise ValueError(f"{len(unreadable)} of {len(source)} masks of {source.name} can't be used; {unreadable[0]}")
    return pixels, first


def _count(source: SegmentationSource, index: int) -> np.ndarray | UnreadableImage:
    try:
        return np.bincount(source.read_numbers(index).ravel())
    except UnreadableImage as error:
        return error


def resolve_classes(
    train: SegmentationSource, others: Sequence[SegmentationSource], num_classes: int | None, ignored: Sequence[int]
) -> ClassMap:
    """Find the classes of a training set, check every mask of all sets, and set classes and ``has_labels`` of all.

    Args:
        train: the training set.
        others: test and validation sets.
        num_classes: K; None: the lines of ``classes.txt`` next to the folders, else from the largest
            number in the training masks.
        ignored: numbers that mean "no label".

    Raises:
        ValueError: if a mask holds a number beyond the classes (it is named), or there are fewer than two classes.
    """
    counted = [(source, *count_numbers(source)) for source in (train, *others)]
    present = [number for number in sorted(counted[0][2]) if number not in ignored]
    if len(present) < 2:
        raise ValueError(_too_few(train, present, sorted(set(counted[0][2]) - set(present))))
    names = _names(train, num_classes, present[-1] + 1 - sum(number <= present[-1] for number in ignored), ignored)
    if num_classes is None and len(present) < len(names) / 2:
        warnings.warn(
            f"the masks of {train.name} hold {len(present)} of the {len(names)} numbers up to {present[-1]}, and each "
            "number is a class: number the classes 0, 1, 2, ... to train without those that never occur",
            DMJDWarning,
            stacklevel=3,
        )
    class_map = ClassMap(names, tuple(ignored))
    for source, _, first in counted:
        _check_numbers(source, first, class_map)
        source.set_classes(class_map)
        source.has_labels = not set(first) <= set(ignored)
    return class_map


def _too_few(train: SegmentationSource, present: list[int], unlabeled: list[int]) -> str:
    numbers = f"only the number {present[0]}" if present else "only ignored numbers"
    text = f"the masks of {train.name} hold {numbers}"
    if unlabeled:
        number = next(n for n in range(_MOST_NUMBERS) if n not in present and n not in unlabeled)
        without = ", ".join(map(str, unlabeled))
        text += f", and {without}, which means no label (--ignore-index): where it is a class, save it as {number}"
    return f"{text}: segmentation needs at least two classes"


def _names(train: SegmentationSource, given: int | None, counted: int, ignored: Sequence[int]) -> tuple[str, ...]:
    """Class names: from ``classes.txt``, else the numbers."""
    file = next(_class_files(train), None)
    lines = _lines(file) if file else []
    if lines and given is not None and len(lines) != given:
        raise ValueError(f"{file} names {len(lines)} classes, --num-classes is {given}: make them agree")
    if given is not None and given < 2:
        raise ValueError(f"num_classes must be at least 2, got {given}")
    return tuple(lines) or tuple(map(str, class_numbers(given or counted, ignored)))


def _lines(file: Path) -> list[str]:
    """The names in ``classes.txt``."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        raise ValueError(f"{file} can't be read as UTF-8 text: it names one class per line") from None
    if repeated := [line for line, count in Counter(lines).items() if count > 1]:
        raise ValueError(f"{file} names the class {printable(repeated[0])} twice")
    return lines


def _class_files(train: SegmentationSource) -> Iterator[Path]:
    """``classes.txt`` in the folder of the images or up to two levels above it."""
    if isinstance(train.images, FolderSource):
        folder = train.images.root
        yield from (f / CLASS_NAMES for f in (folder, *folder.parents[:2]) if (f / CLASS_NAMES).is_file())


def _check_numbers(source: SegmentationSource, first: dict[int, int], class_map: ClassMap) -> None:
    allowed = set(class_map.numbers) | set(class_map.ignored)
    wrong = [number for number in sorted(first) if number not in allowed]
    if wrong:
        last = class_map.numbers[-1]
        raise ValueError(
            f"the mask of {source.describe(first[wrong[0]])} holds the number {wrong[0]}; the {len(class_map.names)} "
            f"classes are numbered up to {last}. Pass --num-classes, or --ignore-index {wrong[0]} if it means no label"
        )
