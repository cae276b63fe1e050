"""JSON from files that may be damaged or edited: decoded and checked against a type, with errors that name the file.

Every JSON text the package reads goes through :func:`parse_json` or :func:`read_json`.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from dmjd.regular import irregular

T = TypeVar("T")

_DIGEST = "sha256"  # the key of a digest in JSON


def parse_json(text: str | bytes, schema: type[T], name: str) -> T:
    """Decode a JSON text and check its types.

    Args:
        text: the JSON text, UTF-8 if bytes.
        schema: type of the content: a dataclass, a TypedDict, ``dict[str, list[str]]``, ... Entries that a dataclass
            or TypedDict does not name are ignored. NaN and infinity are floats.
        name: what the text is and where it stands, e.g. ``"runs/a/config.json"``, for error messages.

    Raises:
        ValueError: "NAME: ..." if the text is no JSON, is nested too deeply, or holds other types, with the position.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"{name}: its JSON is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError(f"{name}: not UTF-8 text") from None
    except ValueError as error:  # also an integer of too many digits
        reason = f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise ValueError(f"{name}: not valid JSON ({reason}); it may be cut short") from None
    return check_json(value, schema, name)


def check_json(value: Any, schema: type[T], name: str) -> T:
    """Check the types of decoded JSON; see :func:`parse_json`."""
    try:
        return msgspec.convert(value, schema)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ValueError(f"{name}: wrong content ({error})") from None


def read_json(file: Path, schema: type[T], name: str | None = None) -> T:
    """Read a JSON file and check its types.

    Args:
        file: the file.
        schema: see :func:`parse_json`.
        name: for error messages; default the path.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: "NAME: ..." if it cannot be read or its content is wrong.
    """
    name = name or str(file)
    try:
        if kind := irregular(file):
            raise ValueError(f"{name}: cannot be read (it is {kind}, not a file)")
        content = file.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{name}: cannot be read ({error.strerror})") from None
    return parse_json(content, schema, name)


def signed(content: Mapping[str, Any], *context: str) -> dict[str, Any]:
    """JSON content with its SHA-256, for :func:`verified`. The ``context`` counts too, such as the content's key."""
    return {**content, _DIGEST: _digest(content, context)}


def verified(content: Mapping[str, Any], name: str, *context: str) -> dict[str, Any]:
    """The content that :func:`signed` got; content without a digest, which former versions wrote, as it is.

    Raises:
        ValueError: "NAME: ..." if it does not match its digest.
    """
    own = {key: value for key, value in content.items() if key != _DIGEST}
    if _DIGEST in content and content[_DIGEST] != _digest(own, context):
        raise ValueError(
            f"{name}: its content does not match its digest, so it is damaged or was edited; "
            f"to keep an edit, delete {_DIGEST} in it"
        )
    return own


def _digest(content: Mapping[str, Any], context: tuple[str, ...]) -> str:
    plain = json.loads(json.dumps([content, *context]))  # as it is read back: keys are strings
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
