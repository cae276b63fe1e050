"""Checks of single values that come from outside: settings of configurations and arguments of public functions.

Imports no torch. Every check takes the name of the value first and raises ValueError with it in the message, so that
the command line, configurations and functions refuse a value with the same text.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from dmjd.text import is_utf8, printable

MAX_SEED = 2**63 - 1  # 64 bits

# The largest values that make sense, with room to spare. Beyond them a run takes years or all memory.
MAX_COUNT = 10**9  # steps, intervals
MAX_EPOCHS = 10**6
MAX_MINUTES = 10**7
MAX_BATCH_SIZE = 10**6
MAX_WORKERS = 512
MAX_SIDE = 16_384  # pixels
MAX_CHANNELS = 4096
MAX_WIDTH = 16_384
MAX_DEPTH = 1000  # layers
MAX_HEADS = 1024
MAX_MLP_RATIO = 100
MAX_VIEWS = 64
MAX_FACTOR = 10**4  # learning rates, weight decay, weights of losses

_SHOWN = 100  # characters of a refused value in a message


@dataclass(frozen=True)
class Bounds:
    """Limits of a number.

    Attributes:
        gt, ge, lt, le: greater than, at least, less than, at most: the values that have a meaning.
        most: the largest value that makes sense; larger ones are taken for a mistake.
    """

    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None
    most: float | None = None

    def reason(self, value: float) -> str | None:
        """What a value must do that it does not, to follow "must"; None if it is finite and within the limits."""
        allowed = (
            (isinstance(value, int) or math.isfinite(value))
            and (self.gt is None or value > self.gt)
            and (self.ge is None or value >= self.ge)
            and (self.lt is None or value < self.lt)
            and (self.le is None or value <= self.le)
        )
        if not allowed:
            return str(self)
        return f"be at most {_short(self.most)}" if self.most is not None and value > self.most else None

    def __str__(self) -> str:
        """The limits in words, to follow "must"."""
        if self.ge is not None and self.le is not None:
            return f"lie between {_short(self.ge)} and {_short(self.le)}"
        if self.gt is not None and self.lt is not None:
            return f"lie between {_short(self.gt)} and {_short(self.lt)} (both excluded)"
        words = (("greater than", self.gt), ("at least", self.ge), ("less than", self.lt), ("at most", self.le))
        limits = [f"{word} {_short(limit)}" for word, limit in words if limit is not None]
        return f"be {' and '.join(limits) or 'finite'}"


ANY = Bounds()


def _short(limit: float) -> str:
    return str(limit) if isinstance(limit, int) else f"{limit:g}"


def shown(value: Any) -> str:
    """A refused value for a message: printable, on one line and not too long."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except ValueError:  # an integer of thousands of digits
        text = "a number of thousands of digits"
    text = printable(text)
    text = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"
    return f"'{text}'" if isinstance(value, str) else text


def plain(value: Any) -> Any:
    """NumPy and torch numbers and arrays as Python numbers and lists; other values unchanged."""
    return value.tolist() if hasattr(value, "tolist") else value


def check_int(name: str, value: Any, bounds: Bounds = ANY) -> int:
    """An integer, also NumPy's, within bounds."""
    value = plain(value)
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ValueError(f"{name} must be int, got {shown(value)}")
    return _within(name, int(value), bounds)


def check_real(name: str, value: Any) -> float:
    """A number, possibly not finite, as a float."""
    value = plain(value)
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError(f"{name} must be float, got {shown(value)}")
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.copysign(math.inf, 1 if value > 0 else -1)  # type: ignore[operator]


def check_float(name: str, value: Any, bounds: Bounds = ANY) -> float:
    """A finite number within bounds, as a float."""
    return _within(name, check_real(name, value), bounds)


def _within(name: str, value: Any, bounds: Bounds) -> Any:
    if (reason := bounds.reason(value)) is not None:
        raise ValueError(f"{name} must {reason}, got {shown(value)}")
    return value


def check_bool(name: str, value: Any) -> bool:
    """True or False, also NumPy's."""
    value = plain(value)
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be bool, got {shown(value)}")
    return value


def check_seed(seed: Any, *, ge: int = -MAX_SEED) -> int:
    """A seed of at most 64 bits."""
    return check_int("seed", seed, Bounds(ge=ge, le=MAX_SEED))


def check_text(name: str, value: Any, choices: Sequence[str] = ()) -> str:
    """A text or path as a text that is not empty, and one of ``choices`` if there are any."""
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(value, str):
        raise ValueError(f"{name} must be str, got {shown(value)}")
    if not value.strip():
        raise ValueError(f"{name} must not be empty; leave it out for its default")
    if "\0" in value:
        raise ValueError(f"{name} must not hold a null character, got {shown(value)}")
    if choices and value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {shown(value)}")
    return str(value)


def check_memory(what: str, num_weights: float) -> None:
    """Refuse a model whose float32 weights alone take more than this machine's memory, before it is built."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # unknown on some systems
        return
    if 4 * num_weights > memory:
        sizes = f"{4e-9 * num_weights:.0f} GB, this machine has {1e-9 * memory:.0f} GB"
        raise ValueError(f"{what} is too large: its weights alone take {sizes}. Lower width or depth")


def check_out(name: str, value: Any) -> Path:
    """A path to write to: as :func:`check_path`, and UTF-8, because safetensors and parquet open no other."""
    path = check_path(name, value)
    if not is_utf8(path):
        raise ValueError(f"{name} {shown(str(path))} is not UTF-8 text: files cannot be read from there; give another")
    return path


def check_path(name: str, value: Any) -> Path:
    """A path that is not empty, with ``~`` expanded."""
    text = check_text(name, value)
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"{name} {shown(text)}: there is no such home folder; write the path out") from None


def not_rising(name: str, value: Sequence[float]) -> str:
    """The message about a pair of numbers that does not rise."""
    return f"{name} must rise from its first to its second number, got {value[0]} {value[1]}"
