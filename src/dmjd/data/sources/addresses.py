"""The addresses of remote files (``https://``, ``s3://``, ...), and the names that files keep when they move."""

import itertools
import os
import re
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence

from dmjd.text import printable

_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")

_MOST_FILES = 1_000_000  # of an address


def is_url(data: str) -> bool:
    """Whether ``data`` is the address of remote files."""
    return _URL.match(data) is not None


def ends_with(url: str, endings: tuple[str, ...]) -> bool:
    """Whether the path of an address ends so, in small or capital letters.

    Raises:
        ValueError: for what cannot be an address.
    """
    try:
        return urllib.parse.urlsplit(url).path.lower().endswith(endings)
    except ValueError as error:
        raise ValueError(f"{printable(url)} is no address: {error}") from None


def is_http(address: str) -> bool:
    """Whether an address is of HTTP, where odd characters are written as %20."""
    return address.partition("://")[0].lower() in ("http", "https")


def local_path(data: str) -> str:
    """``data``, or the path of a ``file://`` address, which is not remote."""
    if not data.lower().startswith("file://"):
        return data
    return urllib.request.url2pathname(data[len("file://") :].removeprefix("localhost"))


def ranges(url: str) -> Iterator[str]:
    """``a-{08..10}`` -> ``a-08``, ``a-09``, ``a-10``.

    Raises:
        ValueError: if a range names nothing, or too much.
    """
    match = _RANGE.search(url)
    if match is None:
        yield url
        return
    first, last = match.groups()
    if not 0 <= int(last) - int(first) < _MOST_FILES:
        raise ValueError(f"{printable(url)}: a range such as {{000..099}} names 1 to {_MOST_FILES:,} files, in order")
    for number in range(int(first), int(last) + 1):
        yield from ranges(f"{url[: match.start()]}{number:0{len(first)}d}{url[match.end() :]}")


def without_secrets(address: str) -> str:
    """An address as messages show it: without a password, and without what follows "?", which may be a signature."""
    protocol, mark, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    if "@" in host:
        user, _, host = host.rpartition("@")
        host = f"{user.partition(':')[0]}:...@{host}" if ":" in user else f"{user}@{host}"
    if is_http(address):
        path = re.split("[?#]", path, maxsplit=1)[0]
    return f"{protocol}{mark}{host}{slash}{path}"


def names_of(addresses: Sequence[str]) -> tuple[str, list[str]]:
    """What a server may change, and what stays: the deepest folder that holds all files, and their paths below it.

    Copies of the files on another server, or in a folder of this machine, have the same paths, so these tell the files
    apart. Where only the part after "?" does, it is added to the names.

    Returns:
        The address of the folder, as messages show it, and the names, with "/".
    """
    parts = [_parts(address) for address in addresses]
    depths = zip(*(part[:-1] for part in parts), strict=False)
    above = sum(1 for _ in itertools.takewhile(lambda folders: len(set(folders)) == 1, depths))
    names = ["/".join(part[above:]) for part in parts]
    repeated = {name for name, count in Counter(names).items() if count > 1}
    for number, name in enumerate(names):
        if name in repeated:
            stem, ending = os.path.splitext(name)
            names[number] = f"{stem}?{addresses[number].partition('?')[2]}{ending}"
    shown = without_secrets(addresses[0]).split("/")[: 2 + above]
    return "/".join(shown), names


def _parts(address: str) -> tuple[str, ...]:
    """Host, folders and name of an address, as they are called on a disk."""
    host, _, path = address.partition("://")[2].partition("/")
    if is_http(address):
        path = urllib.parse.unquote(re.split("[?#]", path, maxsplit=1)[0])
    return host, *path.split("/")
