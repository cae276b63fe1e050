"""Decode TIFF: photometric interpretation, extra samples, orientation, pages and sample formats are handled here.

Pillow decodes what it reads faithfully, common images of up to 8 bits; tifffile decodes the rest: uncompressed,
deflated and packed data by itself, other compressions with the package imagecodecs.
"""

import contextlib
import dataclasses
import logging
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from dmjd.images.stored import Stored, UnreadableImage, check_pixels, upright

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # classic and BigTIFF, both byte orders

# Photometric interpretation -> color samples: gray, gray, RGB, palette, CMYK.
_COLORS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4}
_WHITE_IS_ZERO, _PALETTE, _CMYK = 0, 3, 5
_GRAYS = (_WHITE_IS_ZERO, 1)

# None, CCITT, LZW, JPEG, deflate, PackBits: every build of Pillow decodes them.
_PILLOWS_COMPRESSIONS = (1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946)
_UNSPECIFIED, _PREMULTIPLIED = 0, 1  # kinds of extra samples; 2 is alpha that is not premultiplied

_GDAL_NODATA = 42113  # tag


def decode_tiff(file: Any, in_chans: int, from_pillow: Callable[[Image.Image], Stored]) -> Stored:
    """Decode the first image of a file, or its pages as channels; with the value of its tag GDAL_NODATA.

    Pages are channels if ImageJ or OME metadata says so, or if ``in_chans`` (other than 1, 3, 4) pages are there.
    Other files that an OME-TIFF names are not opened.

    Args:
        file: open for reading, at its start.
        in_chans: number of channels wanted.
        from_pillow: converts an opened Pillow image.

    Raises:
        UnreadableImage: with the reason, or another exception for damaged data.
    """
    with _opened(file) as tiff:
        return dataclasses.replace(_decoded(tiff, file, in_chans, from_pillow), nodata=_nodata(tiff.pages[0]))


def _decoded(tiff: Any, file: Any, in_chans: int, from_pillow: Callable[[Image.Image], Stored]) -> Stored:
    """:func:`decode_tiff` of an opened file, without its tag."""
    page: Any = tiff.pages[0]
    channels = _paged_channels(tiff, in_chans)
    _check_size(page, channels)
    if channels == 1 and in_chans in (1, 3, 4) and _pillow_is_faithful(page):
        file.seek(0)
        with contextlib.suppress(UnidentifiedImageError), Image.open(file, formats=["TIFF"]) as image:
            return from_pillow(image)
    try:
        values = _pages(tiff, channels) if channels > 1 else _last_axis(page.asarray(), page.axes)
    except ValueError as error:
        if "imagecodecs" not in str(error):
            raise
        file.seek(0)
        return _without_codec(file, page, channels, from_pillow)
    if channels > 1:
        if channels != in_chans:
            raise UnreadableImage("", f"it has {channels} channels, in_chans is {in_chans}")
        return Stored(upright(values, _orientation(page)))
    stored = _interpreted(values, page)
    values = stored.values
    if in_chans == 1 and not stored.alpha and int(page.photometric) in _GRAYS:
        values = values[..., :1]  # bands of unknown meaning follow, which are not red, green and blue
    return Stored(upright(values, _orientation(page)), stored.alpha, masked=stored.masked)


def decode_numbers(file: Any) -> np.ndarray:
    """The samples of the first page as stored, upright: [H, W] or [H, W, S]. Photometric interpretation is ignored.

    Args:
        file: open for reading, at its start.

    Raises:
        UnreadableImage: with the reason, or another exception for damaged data.
    """
    with _opened(file) as tiff:
        page: Any = tiff.pages[0]
        _check_size(page)
        try:
            values = _last_axis(page.asarray(), page.axes)
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            raise _needs_codec(page) from None
        values = upright(values, _orientation(page))
    return values[..., 0] if values.shape[2] == 1 else values


@contextlib.contextmanager
def _opened(file: Any) -> Iterator[Any]:
    """The file in tifffile."""
    import tifffile  # slow to import and rarely needed

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it logs every unusual tag; errors are raised anyway
    with tifffile.TiffFile(file, is_ome=False) as tiff:  # an OME-TIFF could name other files
        yield tiff


def _nodata(page: Any) -> float | None:
    """The value of the tag GDAL_NODATA, a text; None without one, and for samples that are not stored as shown."""
    if _GDAL_NODATA not in page.tags or int(page.photometric) in (_WHITE_IS_ZERO, _PALETTE, _CMYK):
        return None
    try:
        return float(str(page.tags[_GDAL_NODATA].value).strip("\0 "))
    except ValueError:
        return None


def _orientation(page: Any) -> int:
    return page.tags[274].value if 274 in page.tags else 1


def _check_size(page: Any, channels: int = 1) -> None:
    samples = max(channels, page.samplesperpixel)
    check_pixels(page.imagelength, page.imagewidth, samples * max(1, max(_bits(page)) // 8))


def _needs_codec(page: Any) -> UnreadableImage:
    compression = getattr(page.compression, "name", page.compression)
    return UnreadableImage(
        "", f"its compression ({compression}) needs the package imagecodecs: pip install 'dmjd[tiff]'"
    )


def _paged_channels(tiff: Any, in_chans: int) -> int:
    """How many pages are channels of one image; 1: the first page alone is read."""
    page, axes = tiff.pages[0], dict(zip(tiff.series[0].axes, tiff.series[0].shape, strict=True))
    if page.samplesperpixel > 1:
        return 1
    if "C" in axes:
        return axes["C"]
    sizes, _ = _ome_sizes(page)
    if sizes["C"] > 1:
        planes = sizes["C"] * sizes["Z"] * sizes["T"]
        if planes != len(tiff.pages):
            raise UnreadableImage("", f"its OME metadata is of {planes} planes, the file holds {len(tiff.pages)}")
        return sizes["C"]
    return in_chans if in_chans not in (1, 3, 4) and len(tiff.pages) == in_chans else 1


def _ome_sizes(page: Any) -> tuple[dict[str, int], int]:
    """Lengths of the axes C, Z and T in OME metadata, 1 without, and the number of pages between two channels."""
    text = page.description or ""
    sizes = {"C": 1, "Z": 1, "T": 1} | {n: int(size) for n, size in re.findall(r'\bSize([CZT])="(\d+)"', text)}
    order = re.search(r'\bDimensionOrder="XY([CZT]{3})"', text)
    before = order[1].partition("C")[0] if order else ""
    return sizes, math.prod(sizes[axis] for axis in before)


def _pages(tiff: Any, channels: int) -> np.ndarray:
    """Pages that are channels: [H, W, C]; the first of any other axis."""
    series = tiff.series[0]
    if "C" in series.axes:
        array = series.asarray()
        keep = tuple(slice(None) if axis in "CYX" else 0 for axis in series.axes)
        return np.moveaxis(array[keep], [axis for axis in series.axes if axis in "CYX"].index("C"), -1)
    step = _ome_sizes(tiff.pages[0])[1]
    pages = [tiff.pages[i * step].asarray() for i in range(channels)]
    if len({(page.shape, page.dtype) for page in pages}) > 1:
        raise UnreadableImage("", "its pages differ in size or type")
    return np.stack(pages, axis=-1)


def _last_axis(array: np.ndarray, axes: str) -> np.ndarray:
    """A page [H, W], [H, W, S] or [S, H, W] as [H, W, S]."""
    if "S" not in axes:
        return array[..., None]
    return np.moveaxis(array, axes.index("S"), -1)


def _pillow_is_faithful(page: Any) -> bool:
    """Unsigned integers of up to 8 bits in common compressions, and no extra sample that Pillow takes for alpha."""
    bits = max(_bits(page)) if max(_bits(page)) <= 8 and page.samplesperpixel == 1 else 8
    return (
        _bits(page) == (bits,) * len(_bits(page))
        and _unsigned(page)
        and _UNSPECIFIED not in page.extrasamples
        and int(page.compression) in _PILLOWS_COMPRESSIONS
        and (page.samplesperpixel == 1 or int(page.planarconfig) == 1)
    )


def _unsigned(page: Any) -> bool:
    return page.sampleformat in (None, 1)


def _bits(page: Any) -> tuple[int, ...]:
    bits = page.bitspersample
    return bits if isinstance(bits, tuple) else (bits,)


def _without_codec(file: Any, page: Any, channels: int, from_pillow: Callable[[Image.Image], Stored]) -> Stored:
    """Gray images of 16-bit unsigned integers by Pillow; others need the missing decoder."""
    plain_gray = page.samplesperpixel == 1 and _bits(page) == (16,) and _unsigned(page)
    if channels == 1 and plain_gray and page.photometric == 1:
        with Image.open(file, formats=["TIFF"]) as image:
            return from_pillow(image)
    raise _needs_codec(page)


def _interpreted(values: np.ndarray, page: Any) -> Stored:
    """Samples [H, W, S] -> gray or RGB, with alpha or bands after it."""
    photometric = int(page.photometric)
    if photometric not in _COLORS:
        name = getattr(page.photometric, "name", photometric)
        raise UnreadableImage("", f"photometric interpretation {name} of {max(_bits(page))} bits is not supported")
    if values.dtype == bool or (values.dtype == np.uint8 and photometric != _PALETTE and max(_bits(page)) < 8):
        values = values.astype(np.uint8) * np.uint8(255 // (2 ** max(_bits(page)) - 1))  # 0..255, as Pillow does
    colors = _COLORS[photometric]
    kinds = [int(kind) for kind in page.extrasamples]
    color, extra = values[..., :colors], values[..., colors:]
    alpha = extra.shape[2] == 1 and kinds[:1] not in ([], [_UNSPECIFIED])
    if alpha and kinds[0] == _PREMULTIPLIED:
        color = _straight(color, extra)
    if photometric == _WHITE_IS_ZERO:
        color = _top(color, page) - color
    if photometric == _CMYK:
        color = _rgb_from_cmyk(color, _top(color, page))
    if photometric == _PALETTE:
        color = (page.colormap[:, color[..., 0]] >> 8).astype(np.uint8).transpose(1, 2, 0)
        if extra.shape[2]:
            raise UnreadableImage("", "a palette with extra samples is not supported")
    masked = extra.shape[2] > 1 and kinds[-1] != _UNSPECIFIED
    return Stored(np.concatenate([color, extra], axis=-1) if extra.shape[2] else color, alpha, masked=masked)


def _top(values: np.ndarray, page: Any) -> Any:
    """The largest value of unsigned samples, in their data type."""
    if values.dtype.kind != "u":
        raise UnreadableImage("", f"inverted samples of type {values.dtype} are not supported")
    return values.dtype.type(2 ** max(8, *_bits(page)) - 1)


def _rgb_from_cmyk(cmyk: np.ndarray, top: Any) -> np.ndarray:
    """[H, W, 4] -> [H, W, 3] of the same unsigned type: (top - C) (top - K) / top, as Pillow converts 8 bits."""
    light = (float(top) - cmyk.astype(np.float64)) / float(top)
    return np.rint(light[..., :3] * light[..., 3:] * float(top)).astype(cmyk.dtype)


def _straight(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Undo the multiplication of color by alpha; black where alpha is 0."""
    if alpha.dtype.kind == "i":
        raise UnreadableImage("", f"premultiplied samples of type {alpha.dtype} are not supported")
    top = float(np.iinfo(alpha.dtype).max) if alpha.dtype.kind == "u" else 1.0
    opacity = alpha.astype(np.float64) / top
    straight = np.divide(color, opacity, out=np.zeros(color.shape), where=opacity > 0)
    return (
        np.rint(straight).clip(0, top).astype(color.dtype) if color.dtype.kind == "u" else straight.astype(color.dtype)
    )
