"""Names that come from outside (files, folders, classes), made safe to print."""

import unicodedata

# Control, format (such as right-to-left marks), surrogate, private and unassigned characters; line separators.
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def printable(text: object, keep: str = "") -> str:
    """A text whose control characters, and bytes that are not UTF-8, are shown as escapes such as ``\\x1b``.

    Such characters move the cursor or change colors of a terminal, and unpaired surrogates, by which Python stands for
    bytes of a file name, cannot be encoded.

    Args:
        text: any object; its ``str`` is used.
        keep: characters to leave as they are, such as a line break.
    """
    return "".join(
        c if c in keep or unicodedata.category(c) not in _HIDDEN else c.encode("unicode_escape").decode("ascii")
        for c in str(text)
    )
