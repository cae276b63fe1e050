"""The settings of invalid pixels: those that mean nothing. Imports no torch."""

from typing import Any

from dmjd.config.checks import plain, shown

AUTO = "auto"

BLENDED, INVALID = "white", "invalid"  # what alpha 0 means

ALPHAS = (BLENDED, INVALID)

NODATA_HELP = (
    "pixels that mean nothing get no loss: of this value, NaN, GDAL_NODATA, DICOM padding; auto: the last three"
)

ALPHA_HELP = "white: transparent pixels are blended with white; invalid: pixels of alpha 0 mean nothing, as for nodata"


def nodata_text(value: Any) -> str | None:
    """The setting ``nodata``, a number or its text, as it is stored: "auto", the text of a number, or None for off.

    Raises:
        ValueError: for anything else.
    """
    value = plain(value)
    if value is None or value == AUTO:
        return value
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"nodata must be auto or the value of invalid pixels, such as -9999, got {shown(value)}"
        ) from None
    return str(int(number)) if number.is_integer() and abs(number) < 1e15 else repr(number)


def nodata_value(nodata: str | None) -> float | None:
    """The number of :func:`nodata_text`; None for "auto" and None."""
    return None if nodata in (None, AUTO) else float(nodata)


def check_alpha(value: Any) -> str:
    """The setting ``alpha``; ValueError if it is none of :data:`ALPHAS`."""
    if value not in ALPHAS:
        raise ValueError(f"alpha must be one of {', '.join(ALPHAS)}, got {shown(value)}")
    return str(value)
