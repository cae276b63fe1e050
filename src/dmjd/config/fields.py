"""Fields of the configurations: help text, choices, types. Imports no torch."""

import dataclasses
import os
import types
import typing
from typing import Any


def option(
    default: Any, text: str, group: str, *, choices: tuple[str, ...] = (), resume: bool = False, common: bool = False
) -> Any:
    """A field: help text, group, allowed words, whether it may change on resume and is among the common flags."""
    metadata = {"help": text, "group": group, "choices": choices, "resume": resume, "common": common}
    return dataclasses.field(default=default, metadata=metadata)


def value_types(field_type: Any) -> tuple[type, bool, bool]:
    """Of an annotation: the plain type, whether a tuple of it is meant, whether None is allowed."""
    parts = typing.get_args(field_type) if isinstance(field_type, types.UnionType) else (field_type,)
    optional = type(None) in parts
    plain = next(part for part in parts if part is not type(None))
    many = typing.get_origin(plain) is tuple
    return (typing.get_args(plain)[0] if many else plain), many, optional


def check_types(config: Any) -> None:
    """Bring Python arguments to the declared types (3 to 3.0, 32 to (32,), Path to str), or name the wrong field."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        kind, many, optional = value_types(field.type)
        if value is None and optional:
            continue
        values = list(value) if many and isinstance(value, list | tuple) else [value]
        if kind is str:
            values = [os.fspath(v) if isinstance(v, os.PathLike) else v for v in values]
        if kind is float:
            values = [float(v) if isinstance(v, int) and not isinstance(v, bool) else v for v in values]
        if not values or any(not isinstance(v, kind) or (kind is int and isinstance(v, bool)) for v in values):
            words = f"{'one or more of type ' if many else ''}{kind.__name__}"
            raise ValueError(f"{field.name} must be {words}, got {value!r}")
        choices = field.metadata["choices"]
        if choices and values[0] not in choices:
            raise ValueError(f"{field.name} must be one of {', '.join(choices)}, got '{values[0]}'")
        object.__setattr__(config, field.name, tuple(values) if many else values[0])
