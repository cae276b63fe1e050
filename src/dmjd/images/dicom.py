"""Decode DICOM: modality and VOI transforms, inverted gray, palettes, color spaces, and the frames of a file.

Values are those of the modality, such as Hounsfield units, with the range that the file's window maps to black and
white. The package pydicom parses and decompresses; it is optional (``pip install 'dmjd[dicom]'``) and imported late.
"""

import logging
import math
import os
import re
from typing import Any, BinaryIO

import numpy as np

from dmjd.images.jpeg import no_warnings
from dmjd.images.stored import Stored, UnreadableImage, check_pixels
from dmjd.regular import irregular
from dmjd.text import printable

EXTENSIONS = (".dcm", ".dicom", ".ima")

MISSING_EXTRA = "DICOM files need the package pydicom: pip install 'dmjd[dicom]'"

_MARK = b"DICM"  # at byte 128

_FRAME = re.compile(r"(.+)#([1-9][0-9]{0,8})", re.DOTALL)

# Numbers of frames, and of rows, which come later, as they stand in a file.
_FRAMES, _ROWS = (
    (b"\x28\x00\x08\x00", b"\x00\x28\x00\x08"),
    (b"\x28\x00\x10\x00US", b"\x28\x00\x10\x00\x02\x00\x00\x00"),
)

_DEFLATED = "1.2.840.10008.1.2.1.99"

_HEAD = 1 << 16  # bytes of a file that most headers fit into

_SYNTAX = 0x00020010  # tag of the transfer syntax

# Classes of files that hold an image, besides those that are called "... Image Storage".
_OTHER_IMAGES = (
    *("RT Dose Storage", "Segmentation Storage", "Parametric Map Storage", "Enhanced US Volume Storage"),
    *("Ophthalmic Thickness Map Storage", "Corneal Topography Map Storage"),
)

_LEAST_FRAME = 8  # bytes of a compressed frame, at least

_SHARED, _PER_FRAME = "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"

_TRANSFORMS = ("PixelValueTransformationSequence", "FrameVOILUTSequence")  # of enhanced multi-frame images

_TAGS = [
    *("NumberOfFrames", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "PixelRepresentation"),
    *("BitsAllocated", "BitsStored", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "VOILUTSequence"),
    *("VOILUTFunction", "WindowCenter", "WindowWidth", "PixelPaddingValue", "PixelPaddingRangeLimit"),
    *("TransferSyntaxUID", _SHARED, _PER_FRAME),
    *(f"{color}PaletteColorLookupTable{part}" for color in ("Red", "Green", "Blue") for part in ("Descriptor", "Data")),
    *(f"Segmented{color}PaletteColorLookupTableData" for color in ("Red", "Green", "Blue")),
]


def frame_of(path: str | os.PathLike[str]) -> tuple[str, int]:
    """The file and the number of the frame, from 1, that a path names: ``scan.dcm#7``; an existing path is a file."""
    text = os.fspath(path)
    match = _FRAME.fullmatch(text)
    if match is None or os.path.exists(text):
        return text, 1
    return match[1], int(match[2])


def may_be_dicom(name: str) -> bool:
    """Whether a file of this name may be DICOM: known extensions, none, or a number, as in ``1.2.840.113619.2``."""
    ending = os.path.splitext(name)[1].lower()
    return (ending in EXTENSIONS or not ending or ending[1:].isdigit()) and name.upper() != "DICOMDIR"


def is_dicom(file: BinaryIO) -> bool:
    """Whether a file, at its start, is DICOM by its content; it is at its start again after that."""
    file.seek(128)
    found = file.read(4) == _MARK
    file.seek(0)
    return found


def check_installed() -> None:
    """Raise ValueError, naming the extra, without pydicom."""
    try:
        import pydicom  # noqa: F401 (an optional package)
    except ImportError:
        raise ValueError(MISSING_EXTRA) from None


def count_frames(path: str) -> int | None:
    """The images in a file: 0 for a report or a plan, 1 for one that is damaged or cut off; None if it is not DICOM."""
    try:
        if irregular(path):
            return None
        with open(path, "rb") as file, no_warnings():
            return _count(file) if is_dicom(file) else None
    except OSError:
        return None


def _count(file: BinaryIO) -> int:
    """:func:`count_frames` of a DICOM file."""
    try:
        head = file.read(_HEAD)
        rows = [at for mark in _ROWS if (at := head.find(mark)) >= 0]
        if rows and not any(mark in head[: min(rows)] for mark in _FRAMES):
            return 1  # tags ascend
        header = _header(file)
        if "Rows" not in header:
            return int(_is_cut(file, header))
        most = os.fstat(file.fileno()).st_size // _bytes_of_frame(header)
        return min(max(1, int(header.get("NumberOfFrames") or 1)), most + 1)  # a frame that is cut off counts
    except Exception:  # of any kind, as for damaged images; reading it says what is wrong
        return 1


def decode_dicom(file: BinaryIO, frame: int = 1, value_range: tuple[float, float] | None = None) -> Stored:
    """Decode one frame.

    Gray values are transformed by the modality LUT or the rescale slope and intercept. Black and white are the ends of
    the file's first window; without one the ends of what its bits can hold. A VOI LUT or a sigmoid replaces the values.
    ``MONOCHROME1``, whose low values are white, is inverted.

    Args:
        file: open for reading.
        frame: its number, from 1.
        value_range: values of the modality that become black and white, instead of the file's.

    Returns:
        [H, W, 1 or 3], and their range.

    Raises:
        UnreadableImage, or another exception for damaged data.
    """
    try:
        from pydicom.pixels import pixel_array
    except ImportError:
        raise UnreadableImage("", MISSING_EXTRA) from None
    with no_warnings():
        header = _header(file)
        if "Rows" not in header or "Columns" not in header:
            cut = "it is cut off before its image" if _is_cut(file, header) else "a DICOM file without an image"
            raise UnreadableImage("", cut)
        frames = int(header.get("NumberOfFrames") or 1)
        if frame > max(1, frames):
            raise UnreadableImage("", f"it has {frames} frame(s)")
        depth = int(header.get("SamplesPerPixel") or 1) * -(-int(header.get("BitsAllocated") or 8) // 8)
        check_pixels(int(header.Rows), int(header.Columns), depth)
        file.seek(0)
        try:
            values = pixel_array(file, index=frame - 1)
        except (RuntimeError, NotImplementedError) as error:
            raise _undecoded(error, header) from None
        _take_groups(header, frame - 1)
        return _displayed(values, header, value_range)


def _header(file: BinaryIO) -> Any:
    """The elements that say how pixels are stored and shown, without the pixels.

    Raises:
        UnreadableImage: if the file is deflated: pydicom would inflate all of it, to any size.
    """
    import pydicom
    from pydicom.filereader import read_dataset

    if (logger := logging.getLogger("pydicom")).level == logging.NOTSET:
        logger.setLevel(logging.CRITICAL)  # what is wrong with a file is its reason
    file.seek(128 + len(_MARK))
    meta = read_dataset(file, is_implicit_VR=False, is_little_endian=True, stop_when=lambda tag, _, __: tag > _SYNTAX)
    if meta.get("TransferSyntaxUID") == _DEFLATED:
        raise UnreadableImage("", "a deflated DICOM file, which is not supported: save it uncompressed")
    file.seek(0)
    return pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_TAGS)


def _is_cut(file: BinaryIO, header: Any) -> bool:
    """Whether a file whose header was just read, and holds no image, is the beginning of one that does.

    Its class tells. If that is unknown, a file is cut that ends within an element, which was skipped, or has none.
    """
    kind = header.file_meta.get("MediaStorageSOPClassUID")
    if kind is not None and kind.name != kind:
        return "Image Storage" in kind.name or kind.name in _OTHER_IMAGES
    return not len(header) or file.tell() > file.seek(0, os.SEEK_END)


def _bytes_of_frame(header: Any) -> int:
    """The size of a frame in a file; if it is compressed the least one."""
    if header.file_meta.TransferSyntaxUID.is_encapsulated:
        return _LEAST_FRAME
    bits = [int(header.get(name) or 1) for name in ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated")]
    return max(1, math.prod(bits) // 8)


def _undecoded(error: Exception, header: Any) -> UnreadableImage:
    """Why a frame cannot be decompressed, and what helps."""
    syntax = header.file_meta.get("TransferSyntaxUID")
    text = str(error)
    if "missing dependencies" in text or "does not support" in text:
        name = printable(getattr(syntax, "name", str(syntax)))
        return UnreadableImage("", f"its compression ({name}) needs a plugin: pip install 'pylibjpeg[all]' pyjpegls")
    return UnreadableImage("", f"damaged or unsupported ({printable(' '.join(text.split()))[:120]})")


def _take_groups(header: Any, index: int) -> None:
    """Copy the transforms of a frame of an enhanced image to where those of other images stand."""
    for name in (_SHARED, _PER_FRAME):
        groups = header.get(name) or []
        number = index if name == _PER_FRAME else 0
        for transform in _TRANSFORMS if number < len(groups) else ():
            for item in groups[number].get(transform) or []:
                header.update(item)


def _displayed(values: np.ndarray, header: Any, value_range: tuple[float, float] | None) -> Stored:
    """Decoded values [H, W] or [H, W, C] -> those of the modality, and the range from black to white."""
    from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut

    photometric = str(header.get("PhotometricInterpretation") or "")
    padding = _padding(values, header)
    if photometric == "PALETTE COLOR" and values.ndim == 2:
        colors = apply_color_lut(values, header)
        return Stored(colors, value_range=(0.0, float(np.iinfo(colors.dtype).max)), padding=padding)
    bits, signed = int(header.get("BitsStored") or 8 * values.itemsize), header.get("PixelRepresentation") == 1
    ends = (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if signed else (0.0, 2.0**bits - 1)
    if values.ndim == 3:
        return Stored(values, value_range=None if ends == (0, 255) else ends)
    if values.dtype.kind == "f":
        return Stored(values[..., None], padding=padding)
    lut = header.get("ModalityLUTSequence")
    if lut:
        ends = (0.0, 2.0 ** int(lut[0].LUTDescriptor[2]) - 1)
    elif header.get("RescaleSlope") is not None and header.get("RescaleIntercept") is not None:
        slope, intercept = float(header.RescaleSlope), float(header.RescaleIntercept)
        ends = (slope * ends[0] + intercept, slope * ends[1] + intercept)
        ends = (min(ends), max(ends))
    values = measured = apply_modality_lut(values, header)
    if value_range is not None:
        ends = value_range
    elif header.get("VOILUTSequence"):
        values = apply_voi_lut(values, header)
        ends = (0.0, 2.0 ** int(header.VOILUTSequence[0].LUTDescriptor[2]) - 1)
    elif (window := _window(header)) is not None:
        function = str(header.get("VOILUTFunction") or "LINEAR").upper()
        if function == "SIGMOID":
            values = apply_voi_lut(values, header)
        else:
            center, width = window
            half, center = (width / 2, center) if function == "LINEAR_EXACT" else ((width - 1) / 2, center - 0.5)
            ends = (center - half, center + half)
    if ends[0] == ends[1]:  # a window of width 1 is a threshold
        values, ends = (values > ends[0]).astype(np.float32), (0.0, 1.0)
    if photometric == "MONOCHROME1":
        values = sum(ends) - values.astype(np.float64)
    whole = values.dtype == np.uint8 and ends == (0, 255)
    others = None if values is measured else measured[..., None]
    return Stored(values[..., None], value_range=None if whole else ends, padding=padding, measured=others)


def _padding(values: np.ndarray, header: Any) -> np.ndarray | None:
    """Where stored gray values or indices [H, W] are those of padding: [H, W, 1] bool; None if the file names none."""
    value, limit = (_first(header.get(name)) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit"))
    if value is None or values.ndim != 2 or values.dtype.kind == "f":
        return None
    # Signed values are sometimes written as unsigned ones: the cast wraps them.
    ends = np.array([int(value), int(value if limit is None else limit)]).astype(values.dtype)
    return ((values >= ends.min()) & (values <= ends.max()))[..., None]


def _window(header: Any) -> tuple[float, float] | None:
    """Center and width of the first window; None if there is none that can be applied."""
    center, width = (_first(header.get(name)) for name in ("WindowCenter", "WindowWidth"))
    if center is None or width is None:
        return None
    least = 0.0 if str(header.get("VOILUTFunction") or "").upper() in ("LINEAR_EXACT", "SIGMOID") else 1.0
    return (center, width) if width > 0 and width >= least else None


def _first(value: Any) -> float | None:
    """The value of an element, or the first of several; None if it is empty."""
    if value is None or isinstance(value, float | int):
        return value if value is None else float(value)
    return _first(next(iter(value), None))
