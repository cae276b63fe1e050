"""Data as people have them: COCO files, labels, masks, folders and images that are odd, with what must come of each.

Each case is (what is changed, exit status, what the command must say; "" for data that are fine as they are).
"""

import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from dense_sets import SIZE
from image_sets import png
from PIL import Image

NAN, INF = float("nan"), float("inf")

Case = tuple[Any, int, str]


def _annotation(**changes: Any) -> Callable[[dict], dict]:
    """Changes the first annotation; None removes an entry."""

    def change(content: dict) -> dict:
        first = {k: v for k, v in (content["annotations"][0] | changes).items() if v is not None}
        return content | {"annotations": [first, *content["annotations"][1:]]}

    return change


def _lists(**lists: Any) -> Callable[[dict], dict]:
    return lambda content: content | lists


def _image(**changes: Any) -> Callable[[dict], dict]:
    """Changes the first image; None removes an entry."""

    def change(content: dict) -> dict:
        first = {k: v for k, v in (content["images"][0] | changes).items() if v is not None}
        return content | {"images": [first, *content["images"][1:]]}

    return change


def _categories(*entries: Any) -> Callable[[dict], dict]:
    return lambda content: content | {"categories": list(entries)}


_LEFT_OUT, _MASK = "1 of 8 annotations were left out: ", "1 of 8 annotations were left out: an instance mask in"

_BOXES = "needs a bbox of four numbers"

_PIXELS = SIZE[0] * SIZE[1]

COCO: dict[str, Case] = {
    "as it is": (lambda c: c, 0, ""),
    "more entries": (lambda c: c | {"info": {"a": [1]}, "licenses": None}, 0, ""),
    "a byte order mark": (lambda c: b"\xef\xbb\xbf" + json.dumps(c).encode(), 0, ""),
    "no text": (lambda _: b"\xff\xfe\x00", 2, "not UTF-8 text|not valid JSON"),
    "empty": (lambda _: b"", 2, "not valid JSON"),
    "cut short": (lambda c: json.dumps(c)[:200].encode(), 2, "not valid JSON"),
    "nested deeply": (lambda _: b"[" * 200_000, 2, "nested too deeply"),
    "a list": (lambda _: b"[]", 2, "wrong content"),
    "no lists": (lambda _: b"{}", 2, "has no list 'images'"),
    "lists of another type": (_lists(annotations={"a": 1}), 2, "has no list 'annotations'"),
    "no images": (_lists(images=[]), 2, "the list 'images' is empty"),
    "no categories": (_lists(categories=[]), 2, "the list 'categories' is empty"),
    "no annotations": (_lists(annotations=[]), 2, "has no boxes"),
    "an image without id": (_image(id=None), 2, "entry 0 of 'images' has no id"),
    "an image with a list as id": (_image(id=[0]), 2, "has the id \\[0\\]"),
    "an image that is a text": (_lists(images=["00.png"]), 2, "entry 0 of 'images' is '00.png'"),
    "an image that is nothing": (_lists(images=[None]), 2, "entry 0 of 'images' is None"),
    "ids as texts": (lambda c: json.dumps(c).replace('"id": 0,', '"id": "0",').encode(), 2, "'images' does not list"),
    "two images of one id": (lambda c: c | {"images": c["images"] * 2}, 2, "two images have the id 0"),
    "no file name": (_image(file_name=None), 2, "image 0 has no file_name"),
    "an empty file name": (_image(file_name=""), 2, "image 0 has no file_name"),
    "a file name that is a number": (_image(file_name=7), 2, "image 0 has no file_name"),
    "a lost image": (_image(file_name="lost.png"), 2, "lists .lost.png., which is not in"),
    "a path out of the root": (_image(file_name="../../../etc/hosts"), 2, "outside of"),
    "an absolute path": (_image(file_name="/etc/hosts"), 2, "outside of"),
    "a zero in the file name": (_image(file_name="a\0.png"), 2, "outside of|not in"),
    "a huge size": (_image(height=100_000, width=100_000), 2, "100000 x 100000 pixels, more than"),
    "a negative size": (_image(height=-4), 0, ""),
    "a size that is a text": (_image(height="48"), 0, ""),
    "another size": (_image(height=47), 0, "the image has 64 x 48 pixels"),
    "a category that is a text": (_categories("a"), 2, "entry 0 of 'categories' is 'a'"),
    "a category without id": (_categories({"name": "a"}), 2, "entry 0 of 'categories' has no id"),
    "two categories of one id": (_categories({"id": 10, "name": "a"}, {"id": 10, "name": "b"}), 2, "'a' and 'b' have"),
    "two categories of one name": (_categories({"id": 10, "name": "a"}, {"id": 20, "name": "a"}), 2, "the same name"),
    "an unknown category": (_annotation(category_id=99), 2, "category_id 99, which 'categories' does not list"),
    "a category that is a list": (_annotation(category_id=[10]), 0, _LEFT_OUT),
    "an unknown image": (_annotation(image_id=99), 2, "image_id 99, which 'images' does not list"),
    "an image id that is a list": (_annotation(image_id=[0]), 0, _LEFT_OUT),
    "an annotation that is a text": (lambda c: c | {"annotations": ["a", *c["annotations"][1:]]}, 0, _LEFT_OUT),
    "no box": (_annotation(bbox=None), 0, _LEFT_OUT + "annotation 0 " + _BOXES),
    "a box of three numbers": (_annotation(bbox=[1, 2, 3]), 0, _BOXES),
    "a box of texts": (_annotation(bbox=["1", "2", "3", "4"]), 0, _BOXES),
    "a box with NaN": (_annotation(bbox=[1, NAN, 3, 4]), 0, _BOXES),
    "a box with infinity": (_annotation(bbox=[1, 2, INF, 4]), 0, _BOXES),
    "a box beyond floats": (lambda c: json.dumps(_annotation(bbox=[1, 2, 10**400, 4])(c)).encode(), 0, _BOXES),
    "a negative box": (_annotation(bbox=[5, 5, -4, 4]), 0, "1 of 8 boxes without area"),
    "a box outside": (_annotation(bbox=[500, 5, 4, 4]), 0, "1 of 8 boxes outside"),
    "a huge box": (_annotation(bbox=[0, 0, 1e308, 1e308]), 0, "1 of 8 boxes that reach outside"),
    "a crowd that is a text": (_annotation(iscrowd="0"), 0, "iscrowd of 0 or 1"),
    "an area that is NaN": (_annotation(area=NAN), 0, ""),
    "no polygon": (_annotation(segmentation=None), 0, "1 of 8 objects have no instance mask: boxes only"),
    "an empty polygon": (_annotation(segmentation=[]), 0, "1 of 8 objects have no instance mask: boxes only"),
    "a polygon with NaN": (_annotation(segmentation=[[5, 5, NAN, 5, 25, 25]]), 0, _MASK),
    "a far polygon": (_annotation(segmentation=[[5, 5, 1e9, 5, 25, 25]]), 0, _MASK),
    "a long polygon": (_annotation(segmentation=[[0, 0, 9e5, 9e5] * 9]), 0, _MASK),
    "a polygon of nothing": (_annotation(segmentation=[[]]), 0, _MASK),
    "a polygon of four numbers": (_annotation(segmentation=[[1, 2, 3, 4]]), 0, _MASK),
    "a polygon of seven numbers": (_annotation(segmentation=[[1, 1, 9, 1, 9, 9, 1]]), 0, _MASK),
    "a flat polygon": (_annotation(segmentation=[5, 5, 25, 5, 25, 25]), 0, _MASK),
    "a polygon outside": (_annotation(segmentation=[[500, 500, 600, 500, 600, 600]]), 0, ""),
    "huge run lengths": (_annotation(segmentation={"size": [10**5, 10**5], "counts": [1, 2]}), 0, _MASK),
    "short run lengths": (_annotation(segmentation={"size": list(SIZE), "counts": [1, 2]}), 0, _MASK),
    "long run lengths": (_annotation(segmentation={"size": list(SIZE), "counts": [0, _PIXELS, 9]}), 0, _MASK),
    "negative run lengths": (_annotation(segmentation={"size": list(SIZE), "counts": [-1, _PIXELS + 1]}), 0, _MASK),
    "run lengths of nonsense": (_annotation(segmentation={"size": list(SIZE), "counts": "nonsense"}), 0, _MASK),
}


def coco_command(work: Path, case: Case) -> list[str]:
    content = case[0](json.loads((work / "boxes" / "train.json").read_text()))
    data = work / "data"
    shutil.copytree(work / "boxes", data)
    (data / "train.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    sizes = ["--steps", "1", "--decoder-dim", "32", "--batch-size", "2", "--img-size", "64", "64"]
    quiet = ["--num-workers", "0", "--device", "cpu", "--num-evals", "0", "--num-images", "0"]
    quiet.append("--no-instance-masks")  # they are read, but a head that predicts them takes most of the time
    run = ["evaluate", "detection", str(work / "run"), "--out", str(work / "out")]
    return [*run, "--data", str(data), *sizes, *quiet]


_TYPE = "holds values of type"

LABELS: dict[str, Case] = {
    "whole numbers": (pa.array([3, 1] * 8), 0, ""),
    "huge numbers": (pa.array([2**63 - 1, 0] * 8), 0, ""),
    "unsigned numbers": (pa.array([2**64 - 1, 0] * 8, pa.uint64()), 0, ""),
    "whole floats": (pa.array([1.0, 0.0] * 8), 0, ""),
    "fractions": (pa.array([0.5, 1.0] * 8), 2, "numbers such as 0.5"),
    "infinity": (pa.array([INF, 1.0] * 8), 2, "numbers such as inf"),
    "NaN": (pa.array([NAN, 1.0] * 8), 2, "8 of 16 rows have no label"),
    "nothing": (pa.array([None, 1] * 8), 2, "8 of 16 rows have no label"),
    "nothing at all": (pa.array([None] * 16), 2, "16 of 16 rows have no label"),
    "negative numbers": (pa.array([-1, 1] * 8), 2, "8 of 16 rows have no label"),
    "truth values": (pa.array([True, False] * 8), 0, ""),
    "texts": (pa.array(["a", "b"] * 8), 0, ""),
    "texts with markup": (pa.array(["[/b]", "$_^\x1b[31m"] * 8), 0, ""),
    "empty texts": (pa.array(["", "b"] * 8), 2, "8 of 16 rows have no label"),
    "numbers as texts": (pa.array(["1", "02"] * 8), 0, ""),
    "bytes": (pa.array([b"a", b"b"] * 8), 0, ""),
    "bytes that are no text": (pa.array([b"\xff", b"b"] * 8), 2, "not UTF-8 text"),
    "a dictionary": (pa.array(["a", "b"] * 8).dictionary_encode(), 0, ""),
    "lists": (pa.array([[1], [2]] * 8), 2, _TYPE),
    "empty lists": (pa.array([[], [2]] * 8), 2, _TYPE),
    "structs": (pa.array([{"a": 1}, {"a": 2}] * 8), 2, _TYPE),
    "times": (pa.array([1, 2] * 8, pa.timestamp("s")), 2, _TYPE),
    "decimals": (pa.array([1, 2] * 8).cast(pa.decimal128(19)), 2, _TYPE),
    "images": (pa.array([{"bytes": png(1)}, {"bytes": png(2)}] * 8), 2, _TYPE),
}


def label_command(work: Path, case: Case) -> list[str]:
    images = pa.array([{"bytes": png(i), "path": None} for i in range(len(case[0]))])
    pq.write_table(pa.table({"image": images, "label": case[0]}), work / "x.parquet")
    return ["--data", str(work / "x.parquet"), "--labels", "column"]


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _frames(kind: str, **options: Any) -> bytes:
    """An animation that begins with black."""
    black, white = (Image.new("RGB", (40, 40), (v,) * 3) for v in (0, 255))
    return _encoded(black, kind, save_all=True, append_images=[white], **options)


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


_NOISE = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)

_JPEG, _PNG = (_encoded(Image.fromarray(_NOISE), kind) for kind in ("JPEG", "PNG"))

_HEADER = b"IHDR" + struct.pack(">IIBBBBB", 10**5, 10**5, 8, 0, 0, 0, 0)

_BOMB = _PNG[:12] + _HEADER + struct.pack(">I", zlib.crc32(_HEADER)) + _PNG[33:]

_UNREADABLE = "unreadable, replaced by another image: .*"

IMAGES: dict[str, Case] = {
    "an empty file": ({"a.png": b""}, 0, _UNREADABLE + "the file is empty"),
    "a text": ({"a.jpg": b"words"}, 0, _UNREADABLE + "not an image in a known format"),
    "PostScript": ({"a.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}, 0, _UNREADABLE + "not an image"),
    "a page of HTML": ({"a.jpg": b"<html><body>404</body></html>"}, 0, _UNREADABLE + "not an image"),
    "a JPEG cut in half": ({"a.jpg": _JPEG[: len(_JPEG) // 2]}, 0, _UNREADABLE),
    "a PNG cut in half": ({"a.png": _PNG[: len(_PNG) // 2]}, 0, _UNREADABLE),
    "a PNG of 10^10 pixels": ({"a.png": _BOMB}, 0, _UNREADABLE + "pixels"),
    "a long promise in a .npy": ({"a.npy": _npy(np.zeros((9, 9, 3)))[:200]}, 0, _UNREADABLE + "whose end is missing"),
    "objects in a .npy": (
        {
            "a.npy": b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
            + b" " * 61
            + b"\n"
            + b"\x80\x04N."
        },
        0,
        _UNREADABLE,
    ),
    "NaN in a .npy": ({"a.npy": _npy(np.full((9, 9, 3), NAN))}, 0, _UNREADABLE + "not finite"),
    "a list in a .npy": ({"a.npy": _npy(np.arange(9))}, 0, _UNREADABLE + "array of shape"),
    "an animated GIF": ({"a.gif": _frames("GIF")}, 0, ""),
    "an animated WebP": ({"a.webp": _frames("WEBP")}, 0, ""),
    "an animated PNG": ({"a.png": _frames("PNG")}, 0, ""),
    "a CMYK JPEG": ({"a.jpg": _encoded(Image.fromarray(_NOISE).convert("CMYK"), "JPEG")}, 0, ""),
    "a JPEG named .png": ({"a.png": _JPEG}, 0, ""),
    "one bit": ({"a.png": _encoded(Image.new("1", (40, 40), 1), "PNG")}, 0, ""),
    "a name with a line break": ({"new\nline.png": _PNG}, 0, ""),
    "a name of other bytes": ({"\udcff.png": b"words"}, 0, _UNREADABLE + "xff"),
    "a folder named .png": ({"a.png/b.png": _PNG}, 0, ""),
    "12 bits in 16": ({f"{i}.npy": _npy(_NOISE.astype(np.uint16) * 16) for i in range(90)}, 0, "--value-range 0 4095"),
}


def image_command(work: Path, case: Case) -> list[str]:
    data = work / "data"
    wide = len(case[0]) > 1  # a set of its own
    data.mkdir() if wide else shutil.copytree(work / "plain", data)
    for name, content in case[0].items():
        (data / name).parent.mkdir(exist_ok=True)
        with open(os.fsencode(data / name), "wb") as file:
            file.write(content)
    return ["--data", str(data), "--max-unreadable", "3"]
