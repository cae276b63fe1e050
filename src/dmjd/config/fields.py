"""The base of all configurations: fields with help, bounds and choices; checks; JSON. Imports no torch.

Command-line flags are made from the fields, so names, defaults, bounds and help are defined only once.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

from dmjd.checked_json import parse_json
from dmjd.config.checks import Bounds, check_bool, check_float, check_int, check_text, plain, shown
from dmjd.config.sources import stored_data
from dmjd.suggest import did_you_mean
from dmjd.text import printable

SPLITS = ("train", "val", "test")
# Settings of a list of images, which do not hold for other data than they were given for.
LIST_SETTINGS = ("root", "path_column", "label_column", "max_unreadable")
CACHE_SETTINGS = ("cache_dir", "cache_gb")  # of the cache of remote files
LABELS = ("none", "folder", "column")
DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
FEATURE_PRECISIONS = ("fp32", "bf16")

NEAR_DUPLICATE = 0.95  # centered cosine from which on two images count as near duplicates

FORMAT_VERSION = 1

# Former name -> name of a setting. Files with former names are read; callers get an error with the new name.
RENAMED = {
    "max_bad": "max_unreadable",
    "pictures": "num_images",
    "looks": "num_evals",
    "colours": "color_jitter",
    "outlines": "instance_masks",
}
# Former setting -> what replaced it, where it was not just renamed; part of the error message.
REPLACED = {"disjoint": "masks: 'disjoint' (the default) or 'independent' (--masks independent)"}


def option(
    default: Any,
    text: str,
    group: str,
    *,
    choices: Sequence[str] = (),
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
    most: float | None = None,
    length: Sequence[int] = (),
    resume: bool = False,
    common: bool = False,
) -> Any:
    """A field of a configuration.

    Args:
        default: the default value.
        text: help text.
        group: heading under which the flag is listed.
        choices: allowed values of a string.
        gt, ge, lt, le, most: bounds of a number, or of each number of a tuple; see :class:`Bounds`.
        length: allowed lengths of a tuple.
        resume: whether it may change when a run is resumed.
        common: whether it is listed among the common flags.
    """
    metadata = {
        "help": text,
        "group": group,
        "choices": tuple(choices),
        "bounds": Bounds(gt, ge, lt, le, most),
        "length": tuple(length),
        "resume": resume,
        "common": common,
    }
    return dataclasses.field(default=default, metadata=metadata)


def value_types(field_type: Any) -> tuple[type, bool, bool]:
    """Parse an annotation: (plain type, whether it may be a tuple of that type, whether None is allowed)."""
    parts = typing.get_args(field_type) if isinstance(field_type, types.UnionType) else (field_type,)
    optional = type(None) in parts
    kinds = [part for part in parts if part is not type(None)]
    kind = next((part for part in kinds if typing.get_origin(part) is tuple), kinds[0])
    many = typing.get_origin(kind) is tuple
    return (typing.get_args(kind)[0] if many else kind), many, optional


def _may_be_plain(field_type: Any) -> bool:
    """Whether an annotation allows both a tuple and a single value, which is then not stored as a tuple of one."""
    kinds = [part for part in typing.get_args(field_type) if part is not type(None)]
    return isinstance(field_type, types.UnionType) and len(kinds) > 1


class Config:
    """Base of the configurations, which are frozen dataclasses with keyword-only fields made by :func:`option`.

    Values are converted to the declared types (3 to 3.0, 32 to (32,), Path to str, NumPy numbers to Python's) and
    checked.

    Raises:
        ValueError: for an unknown or renamed setting, a value of the wrong type, out of bounds or not among the
            choices. The message names the setting.
    """

    task: ClassVar[str] = "configuration"  # its name in messages

    if typing.TYPE_CHECKING:  # subclasses are dataclasses
        __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def __new__(cls, **settings: Any) -> Self:
        """Check the names first, because the dataclass's constructor would raise a TypeError."""
        cls.check_names(settings)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))

    @classmethod
    def check_names(cls, names: Iterable[str]) -> None:
        """Raise ValueError for unknown settings; the message suggests the nearest one and lists all."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(names) - set(known))
        for name in unknown:
            if RENAMED.get(name) in known:
                raise ValueError(f"the setting {name} is now called {RENAMED[name]}")
            if name in REPLACED and REPLACED[name].split(":")[0] in known:
                raise ValueError(f"the setting {name} is now {REPLACED[name]}")
        if unknown:
            raise ValueError(
                f"'{cls.task}' does not take {', '.join(unknown)}{did_you_mean(unknown[0], known)} "
                f"It takes {', '.join(known)}"
            )

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some settings changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """All settings as JSON types."""
        return {
            field.name: list(value) if isinstance(value := getattr(self, field.name), tuple) else value
            for field in dataclasses.fields(self)
        }

    def to_json(self) -> str:
        """Indented JSON with a format version, without passwords and signatures of addresses."""
        settings = self.to_dict()
        settings |= {name: stored_data(settings[name]) for name in ("data", "test_data") if name in settings}
        return json.dumps({"format": FORMAT_VERSION} | settings, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, name: str = "config.json") -> Self:
        """Inverse of :meth:`to_json`; reads files of former versions too.

        Args:
            text: the JSON text.
            name: the file, for error messages.

        Raises:
            ValueError: "NAME: ..." for another format, unknown settings or values that are not allowed.
        """
        values = parse_json(text, dict[str, Any], name)
        if values.pop("format", None) != FORMAT_VERSION:
            raise ValueError(f"{name} is not of format {FORMAT_VERSION}: it was written by another version of dmjd")
        values = cls.from_former(values)
        if unknown := set(values) - {field.name for field in dataclasses.fields(cls)}:
            raise ValueError(f"{name} holds unknown settings: {printable(', '.join(sorted(unknown)))}")
        try:
            return cls(**values)
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{name}: {error}") from None

    @classmethod
    def from_former(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Rename the settings that a former version may have written."""
        return {RENAMED.get(name, name): value for name, value in values.items()}


def _checked(field: dataclasses.Field[Any], value: Any) -> Any:
    """Convert a value to the declared type of its field, or raise ValueError."""
    kind, many, optional = value_types(field.type)
    value = plain(value)
    if value is None and optional:
        return None
    values = list(value) if many and isinstance(value, list | tuple) else [value]
    lengths = field.metadata["length"]
    if lengths and len(values) not in lengths:
        raise ValueError(f"{field.name} takes {' or '.join(map(str, lengths))} numbers, got {len(values)}")
    if not values:
        raise ValueError(f"{field.name} must be one or more of type {kind.__name__}, got {shown(value)}")
    checked = [_one(field, kind, v) for v in values]
    return tuple(checked) if many and not (len(checked) == 1 and _may_be_plain(field.type)) else checked[0]


def _one(field: dataclasses.Field[Any], kind: type, value: Any) -> Any:
    """Check one value of a field."""
    if kind is bool:
        return check_bool(field.name, value)
    if kind is str:
        return check_text(field.name, value, field.metadata["choices"])
    check = check_int if kind is int else check_float
    return check(field.name, value, field.metadata["bounds"])
