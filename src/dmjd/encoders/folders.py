"""Folders that hold one encoder for other programs and for the hub: weights, configuration and model card."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmjd.checked_json import read_json
from dmjd.files import check_writable, make_folder, write_bytes

CONFIG, WEIGHTS, CARD, PREPROCESSOR = "config.json", "model.safetensors", "README.md", "preprocessor_config.json"

OURS = "dmjd"  # the key in config.json that tells our folders from others

_SIGNATURE = re.compile(r"\n<!-- written by dmjd, ([0-9a-f]{64}) -->\n?\Z")


def is_encoder_folder(folder: Path) -> bool:
    """Whether a folder's ``config.json`` was written by dmjd for an encoder."""
    try:
        return isinstance(read_json(folder / CONFIG, dict[str, Any]).get(OURS), dict)
    except (OSError, ValueError):
        return False


def check_folder(folder: Path, flag: str = "--out") -> None:
    """Check before the work that an encoder can be written to a folder without loss of what is there.

    Raises:
        ValueError: if it is a file, cannot be written to, or holds the weights or configuration of another program.
    """
    check_writable(folder, flag, folder=True)
    taken = [name for name in (CONFIG, WEIGHTS, PREPROCESSOR) if (folder / name).exists()]
    if taken and not is_encoder_folder(folder):
        raise ValueError(f"{flag} {folder} holds a {taken[0]} that is not of an exported encoder; give another folder")


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files of an encoder to a folder, which is created. A card that was edited, and other files, are kept.

    Raises:
        ValueError: if that is impossible; see :func:`check_folder`.
    """
    check_folder(folder)
    make_folder(folder)
    # The configuration comes first: it tells that a folder which a kill left unfinished may be written again.
    for name, content in sorted(files.items(), key=lambda file: file[0] != CONFIG):
        if name == CARD and (folder / CARD).exists() and is_edited((folder / CARD).read_bytes()):
            continue
        write_bytes(folder / name, content)


def signed_card(text: str) -> bytes:
    """A model card with a digest at its end, from which :func:`is_edited` tells whether it was edited."""
    text = text.rstrip() + "\n"
    return f"{text}\n<!-- written by dmjd, {hashlib.sha256(text.encode()).hexdigest()} -->\n".encode()


def is_edited(card: bytes) -> bool:
    """Whether a model card is not as :func:`signed_card` made it."""
    text = card.decode("utf-8", errors="replace").replace("\r\n", "\n")
    match = _SIGNATURE.search(text)
    return match is None or hashlib.sha256(text[: match.start()].encode()).hexdigest() != match[1]
