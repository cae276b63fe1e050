"""Names that come from outside (files, folders, classes), made safe to print and to draw."""

import re
import unicodedata

# Control, format (such as right-to-left marks), surrogate, private and unassigned characters; line separators.
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


# In a text, the user and password of an address, and what follows "?" in one of HTTP.
_PASSWORD = re.compile(r"(://[^\s/@:]*):[^\s/]*@")
_QUERY = re.compile(r"(https?://[^\s?]+)\?(?:\.\.\.|[^\s,;'\"<>()\]]*[^\s,;'\"<>()\].:])", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """A text whose addresses have no passwords, and nothing behind "?", which may be a signature."""
    return _QUERY.sub(r"\1", _PASSWORD.sub(r"\1:...@", text)) if "://" in text else text


def printable(text: object, keep: str = "") -> str:
    """A text whose control characters, and bytes that are not UTF-8, are shown as escapes such as ``\\x1b``.

    Such characters move the cursor or change colors of a terminal, and unpaired surrogates, by which Python stands for
    bytes of a file name, cannot be encoded. Addresses are shown :func:`without_secrets`.

    Args:
        text: any object; its ``str`` is used.
        keep: characters to leave as they are, such as a line break.
    """
    return "".join(
        c if c in keep or unicodedata.category(c) not in _HIDDEN else c.encode("unicode_escape").decode("ascii")
        for c in without_secrets(str(text))
    )


def is_utf8(text: object) -> bool:
    """Whether a text, such as a path, can be encoded; file names that are other bytes cannot."""
    try:
        str(text).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def shortened(text: object, most: int) -> str:
    """A :func:`printable` text of at most ``most`` characters; the end of a longer one becomes an ellipsis."""
    shown = printable(text)
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def drawable(text: object, most: int = 60) -> str:
    """A :func:`shortened` text for a matplotlib figure, which would read what stands between ``$`` as a formula.

    A leading underscore, which hides an entry of a legend, gets a space before it.
    """
    shown = shortened(text, most).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def file_name(text: object, most: int = 60) -> str:
    """A text as part of a file name: every character that is not a letter, digit, ``.``, ``-`` or ``_`` becomes ``_``.

    It is never empty, hidden or a way up (``..``).
    """
    safe = re.sub(r"[^\w.-]", "_", printable(text))[:most].lstrip(".")
    return safe or "_"
