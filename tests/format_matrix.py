"""Cells of a matrix of image formats: each is written, read, and compared with the values it was made of.

``judge(cell)`` returns "right", "refused: REASON", "not writable" or "WRONG: ...".
"""

import io
import itertools
import logging
import struct
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tifffile

from dmjd.images.reading import LUMINANCE, read_image
from dmjd.images.stored import UnreadableImage, upright

SIZE = (17, 23)

WHITE = 255.0


class TiffCell(NamedTuple):
    dtype: str
    order: str
    compression: str | None
    photometric: str
    planar: str
    pages: int
    extra: str | None
    orientation: int
    channels: int


class PngCell(NamedTuple):
    color: int  # 0 gray, 2 RGB, 3 palette, 4 gray + alpha, 6 RGBA
    bits: int
    clear: bool  # with a transparent color or palette alpha
    orientation: int
    channels: int


TIFF_AXES = (
    ("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "float16", "float32", "float64"),
    ("<", ">"),
    (None, "zlib", "lzw", "packbits", "lzma", "zstd"),
    ("minisblack", "miniswhite", "rgb", "separated", "palette"),
    ("contig", "separate"),
    (1, 2),
    (None, "unspecified", "assocalpha", "unassalpha"),
    (1, 2, 3, 4, 5, 6, 7, 8),
    (1, 3, 4, 0),  # 0: as many as are stored
)

PNG_AXES = ((0, 2, 3, 4, 6), (1, 2, 4, 8, 16), (False, True), (1, 3, 6, 8), (1, 3, 4))

_BITS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # that PNG allows

_SAMPLES = {"minisblack": 1, "miniswhite": 1, "rgb": 3, "separated": 4, "palette": 1}


def tiff_cells() -> Iterator[TiffCell]:
    return map(TiffCell._make, itertools.product(*TIFF_AXES))


def png_cells() -> Iterator[PngCell]:
    for cell in map(PngCell._make, itertools.product(*PNG_AXES)):
        if cell.bits in _BITS[cell.color] and not (cell.clear and cell.color in (4, 6)):
            yield cell


def judge(cell: TiffCell | PngCell, seed: int = 0) -> str:
    made = _tiff(cell, seed) if isinstance(cell, TiffCell) else _png(cell, seed)
    if made is None:
        return "not writable"
    data, color, alpha, bands, value_range, tolerance = made
    channels = cell.channels or bands.shape[2]
    try:
        read = read_image(data, channels, value_range)
    except UnreadableImage as error:
        return f"refused: {error.reason}"
    expected = upright(_expected(color, alpha, bands, channels), cell.orientation)
    if read.shape != expected.shape:
        return f"WRONG: shape {read.shape}, not {expected.shape}"
    wrong = float(np.abs(read - expected).max())
    return "right" if wrong <= tolerance else f"WRONG: by {wrong:g}"


def _expected(color: np.ndarray, alpha: np.ndarray | None, bands: np.ndarray, channels: int) -> np.ndarray:
    """The documented conversion of [H, W, C] values on the 0..255 scale."""
    if channels not in (1, 3, 4) or (alpha is None and bands.shape[2] == channels):
        return bands
    if channels == 4:
        opaque = np.full_like(color[..., :1], WHITE) if alpha is None else alpha
        return np.concatenate([np.broadcast_to(color, (*color.shape[:2], 3)), opaque], -1)
    if alpha is not None:
        color = color * (alpha / WHITE) + WHITE * (1 - alpha / WHITE)
    if channels == 1:
        return (color @ np.array(LUMINANCE))[..., None] if color.shape[2] == 3 else color
    return np.broadcast_to(color, (*color.shape[:2], 3))


def _limits(dtype: np.dtype) -> tuple[float, float]:
    return (0.0, 1.0) if dtype.kind in "fb" else (float(np.iinfo(dtype).min), float(np.iinfo(dtype).max))


def _random(rng: np.random.Generator, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    if dtype.kind == "f":
        return rng.random(shape).astype(dtype)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, shape, dtype=dtype, endpoint=True)


def _tiff(cell: TiffCell, seed: int) -> Any:
    rng, dtype = np.random.default_rng(seed), np.dtype(cell.dtype)
    samples = _SAMPLES[cell.photometric]
    total = samples + (cell.extra is not None)
    values = _random(rng, dtype, (cell.pages, *SIZE, total))
    low, high = _limits(dtype)
    if cell.extra == "assocalpha":
        opacity = values[..., samples:].astype(np.float64) / high
        values[..., :samples] = np.floor(values[..., :samples].astype(np.float64) * opacity).astype(dtype)
    colors = rng.integers(0, 1 << 16, (3, 1 << min(16, 8 * dtype.itemsize)), dtype=np.uint16)
    data = _tiff_file(cell, values, colors)
    if data is None:
        return None
    with tifffile.TiffFile(io.BytesIO(data)) as opened:  # it writes some types otherwise, such as bits of many samples
        stored = opened.pages[0].asarray()
    stored = stored.reshape(total, *SIZE).transpose(1, 2, 0) if cell.planar == "separate" and total > 1 else stored
    stored = stored.reshape(*SIZE, total).astype(np.float64)
    base, extra = stored[..., :samples], stored[..., samples:]
    alpha = None
    if cell.extra in ("assocalpha", "unassalpha"):
        alpha = (extra / high).clip(0) * WHITE
        if cell.extra == "assocalpha":
            base = np.divide(base, alpha / WHITE, out=np.zeros_like(base), where=alpha > 0).clip(0, high)
    color = _colors(cell, base, high, colors)
    bands = (np.concatenate([color, extra], -1) - low) * WHITE / (high - low)
    natural = dtype.kind in "fb" or dtype in (np.uint8, np.uint16)
    coarse = dtype.itemsize == 1 or cell.photometric == "palette"  # rounded to 8 bits
    return data, bands[..., : color.shape[2]], alpha, bands, None if natural else (low, high), 2.6 if coarse else 0.1


def _tiff_file(cell: TiffCell, values: np.ndarray, colors: np.ndarray) -> bytes | None:
    options: dict[str, Any] = {"photometric": cell.photometric, "byteorder": cell.order, "metadata": None}
    stored = values
    if values.shape[3] == 1:
        stored = values[..., 0]
    else:
        options["planarconfig"] = cell.planar
        stored = values if cell.planar == "contig" else values.transpose(0, 3, 1, 2)
    if cell.extra:
        options["extrasamples"] = [cell.extra]
    if cell.photometric == "palette":
        options["colormap"] = colors
    if cell.orientation != 1:
        options["extratags"] = [(274, "H", 1, cell.orientation, True)]
    file = io.BytesIO()
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    try:
        tifffile.imwrite(file, stored if cell.pages > 1 else stored[0], compression=cell.compression, **options)
    except Exception:  # it does not write every combination
        return None
    return file.getvalue()


def _colors(cell: TiffCell, base: np.ndarray, high: float, colors: np.ndarray) -> np.ndarray:
    """Stored samples as gray or RGB of the same range."""
    if cell.photometric == "miniswhite":
        return high - base
    if cell.photometric == "separated":
        light = (high - base) / high
        return light[..., :3] * light[..., 3:] * high
    if cell.photometric == "palette":
        return colors[:, base[..., 0].astype(int)].transpose(1, 2, 0) * (high / 65535)
    return base


def png_file(values: np.ndarray, bits: int, color: int = 0, chunks: tuple[tuple[bytes, bytes], ...] = ()) -> bytes:
    """A PNG of [H, W] or [H, W, C] values of 1 to 16 bits, with more chunks before the pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = values.reshape(len(values), -1).astype(">u2")
    each = np.unpackbits(rows.view(np.uint8).reshape(*rows.shape, 2), axis=-1)[..., 16 - bits :]
    packed = b"".join(b"\0" + np.packbits(row).tobytes() for row in each.reshape(len(rows), -1))
    header = struct.pack(">IIBBBBB", values.shape[1], len(values), bits, color, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(packed)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in parts)


def exif(orientation: int) -> bytes:
    return struct.pack(">2sHIHHHIHHI", b"MM", 42, 8, 1, 274, 3, 1, orientation, 0, 0)


def _png(cell: PngCell, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[cell.color]
    values = rng.integers(0, 1 << cell.bits, (*SIZE, samples), dtype=np.uint16, endpoint=False)
    chunks: list[tuple[bytes, bytes]] = []
    full = WHITE / ((1 << cell.bits) - 1)
    color, alpha = values * full, None
    if cell.color in (4, 6):
        color, alpha = color[..., :-1], color[..., -1:]
    if cell.color == 3:
        palette = rng.integers(0, 256, (1 << cell.bits, 3)).astype(np.uint8)
        chunks.append((b"PLTE", palette.tobytes()))
        color = palette[values[..., 0]].astype(np.float64)
        if cell.clear:
            opacity = rng.integers(0, 256, 1 << cell.bits).astype(np.uint8)
            chunks.append((b"tRNS", opacity.tobytes()))
            alpha = opacity[values].astype(np.float64)
    elif cell.clear:
        clear = values[3, 4]
        chunks.append((b"tRNS", clear.astype(">u2").tobytes()))
        alpha = WHITE * (values != clear).any(-1, keepdims=True)
    if cell.orientation != 1:
        chunks.append((b"eXIf", exif(cell.orientation)))
    bands = color if alpha is None else np.concatenate([color, alpha], -1)
    data = png_file(values, cell.bits, cell.color, tuple(chunks))
    return data, color, alpha, bands, None, 1.1 if cell.bits <= 8 else 0.1
