"""A list of images at addresses (``https://``, ``s3://``, ...), which are fetched one by one while they are read."""

import json
import os
import posixpath
import urllib.parse
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dmjd.data.sources.addresses import is_http, is_url, without_secrets
from dmjd.data.sources.base import SourceOptions
from dmjd.data.sources.folder import Strings, labels_of_folders, read_listing
from dmjd.data.sources.image_cache import AT_ONCE, ImageCache
from dmjd.data.sources.list_files import ADDRESS, ListFile
from dmjd.data.sources.list_paths import first_repeated, relative_paths
from dmjd.data.sources.listed import ListedSource
from dmjd.data.sources.paths import cache_folder, one_line
from dmjd.data.sources.table_labels import optional_labels
from dmjd.data.sources.transfer import MissingRemoteFile, stated
from dmjd.files import write_text
from dmjd.images.stored import UnreadableImage
from dmjd.text import printable

_PLAIN = rb"^[A-Za-z0-9_.~!$&'()*+,;=:@/-]*$"  # characters that stand for themselves in an address

_UNUSUAL = r"(^|/)\.{1,2}(/|$)|//|^/"  # paths that have to be normalized


class AddressListSource(ListedSource):
    """The images of a list, in its order, each of which is a file on a server.

    A copy in the cache is used as long as it is there. An image that the server does not have is unreadable.

    Args:
        name: the path or address of the list.
        rows: the list. Its rows are addresses, or paths relative to ``base``.
        base: the address of the folder of the list; None: all rows are addresses.
        options: as for :class:`~dmjd.data.sources.lists.ListSource`.

    Raises:
        ValueError: if the list is empty or cannot be read, or names an image twice.
    """

    kind = "a list of addresses"
    removable = True

    def __init__(self, name: str, rows: ListFile, base: str | None, options: SourceOptions) -> None:
        self.name, self.in_chans, self.value_range = name, options.in_chans, options.value_range
        self.split, chosen = rows.split_rows(options.split)
        if not self.split:
            raise ValueError(f"no row of {printable(name)} belongs to the {options.split} part")
        self._base, self._titled = base, rows.split_column is not None
        remote = options.remote
        bound = None if remote.cache_gb is None else round(remote.cache_gb * 1e9)
        self._cache = ImageCache(cache_folder("images", "remote images are kept", remote.cache_dir), bound)
        listed = read_listing(options.listing) if options.listing is not None else None
        self.listing = options.listing if listed is not None else None
        needed = listed is None or options.labels == "column" or _may_have_secrets(rows)
        addresses = absolute_addresses(rows, base) if needed else pa.array([], pa.large_binary())
        names = _names(addresses)
        if listed is None:
            _check_repeated(rows, addresses)
            own, whole = (array if chosen is None else array.filter(chosen) for array in (names, addresses))
            self._root = _common_root(own)
            self._paths = Strings.of_arrow(relative_paths(own, self._root) if self._root else own)
            self._listed_sizes: list[int] | None = None
        else:
            self._root = _joined(base, listed.root) if listed.root else ""
            self._paths = Strings(map(os.fsencode, listed.paths))
            self._listed_sizes = listed.sizes
            own = pa.array([os.fsencode(self._named(i)) for i in range(len(self))], pa.large_binary())
            at = pc.index_in(_without_passwords(own), value_set=names)  # null: it is no longer in the list
            whole = pc.coalesce(addresses.take(at), own)
        self._whole = None if whole.equals(own) else Strings.of_arrow(whole)
        self._sizes_now: list[int] | None = None
        self.classes: list[str] = []
        if options.labels == "folder":
            self.labels, self.classes = labels_of_folders(
                without_secrets(self._root), [self._shown(i) for i in range(len(self))]
            )
        elif options.labels == "column":
            column = rows.label_column(options.label_column)
            values = rows.labels(column)
            if listed is not None:
                values = values.take(at)
            elif chosen is not None:
                values = values.filter(chosen)
            self.labels, self.classes = optional_labels(values, f"{printable(name)}: column '{printable(column)}'")

    @property
    def title(self) -> str:
        """The list, and the split if it has several."""
        return f"{self.name} ({self.split})" if self._titled else self.name

    def __len__(self) -> int:
        return len(self._paths)

    def stored(self, index: int) -> bytes:
        """The encoded image, from the cache or the server.

        Raises:
            UnreadableImage: if the server does not have it.
            ConnectionError: if it does not arrive in several attempts.
        """
        try:
            return self._cache.read(self._address(index))
        except MissingRemoteFile as error:
            reason = str(error).rpartition("can't be fetched (")[2].removesuffix(")")
            raise UnreadableImage(self.describe(index), reason) from None

    def prepare(self, indices: Iterable[int]) -> None:
        """Fetch images that will be read, several at a time."""
        self._cache.fetch({self._address(index) for index in indices})

    def describe(self, index: int) -> str:
        """The address, without a password or a signature; odd characters are escaped."""
        return one_line(without_secrets(self._address(index)))

    def save_listing(self, file: Path) -> None:
        """Write the list of addresses, and the sizes in the fingerprint, unless they were read from there."""
        if self._listed_sizes is None:
            self._listed_sizes = self._sizes()
            paths = [self._paths[i] for i in range(len(self))]
            listing = {"paths": paths, "sizes": self._listed_sizes, "root": _relative(self._base, self._root)}
            write_text(file, json.dumps(listing, indent=0))

    def _name_of(self, index: int) -> str:
        """As for a folder with the same images."""
        return self._shown(index)

    def _sizes(self) -> list[int]:
        """Bytes of the sampled images; -1 for one that the server does not have."""
        if self._sizes_now is None:
            addresses = [self._address(index) for index in self._sampled()]
            with ThreadPoolExecutor(AT_ONCE) as pool:
                try:
                    self._sizes_now = list(pool.map(self._size, addresses))
                finally:
                    pool.shutdown(cancel_futures=True)
        return self._sizes_now

    def _size(self, address: str) -> int:
        if (size := self._cache.size(address)) is not None:
            return size
        try:
            size = stated(address).size
        except MissingRemoteFile:
            return -1
        return len(self._cache.read(address)) if size is None else size

    def _address(self, index: int) -> str:
        return self._named(index) if self._whole is None else self._whole[index]

    def _named(self, index: int) -> str:
        return f"{self._root}/{self._paths[index]}" if self._root else self._paths[index]

    def _shown(self, index: int) -> str:
        """The path of an image below the common address, as it would be called on a disk."""
        path = self._paths[index]
        return urllib.parse.unquote(path) if "%" in path and is_http(self._named(index)) else path


def absolute_addresses(rows: ListFile, base: str | None) -> pa.LargeBinaryArray:
    """The addresses of all rows: [n] large_binary.

    Raises:
        ValueError: naming a row that is neither an address nor relative to one.
    """
    written = rows.paths
    whole = pc.match_substring_regex(written, ADDRESS)
    others = np.flatnonzero(~whole.to_numpy(zero_copy_only=False))
    if not len(others):
        return written
    if base is None:
        shown = printable(os.fsdecode(written[int(others[0])].as_py()))
        raise ValueError(
            f"{rows.where(int(others[0]))} of {rows.shown} is a path ({shown}) where others are addresses: "
            "make two lists, and give both (--data A B)"
        )
    unusual = pc.match_substring_regex(written, _UNUSUAL)
    if is_http(base):
        unusual = pc.or_(unusual, pc.invert(pc.match_substring_regex(written, _PLAIN.decode())))
    joined = pc.binary_join_element_wise(
        pa.scalar(os.fsencode(base), pa.large_binary()), written, pa.scalar(b"/", pa.large_binary())
    )
    single = pc.and_(unusual, pc.invert(whole))
    if pc.any(single).as_py():
        fixed = [os.fsencode(_address_below(base, path)) for path in written.filter(single).to_pylist()]
        joined = pc.replace_with_mask(joined, single, pa.array(fixed, pa.large_binary()))
    return pc.if_else(whole, written, joined)


def _may_have_secrets(rows: ListFile) -> bool:
    return bool(pc.any(pc.match_substring_regex(rows.paths, "[?@]")).as_py())


def _names(addresses: pa.LargeBinaryArray) -> pa.LargeBinaryArray:
    """Addresses as a run keeps them, without the passwords and signatures of rows, which may be others tomorrow.

    Where only what follows "?" tells two images apart, it stays.
    """
    names = _without_passwords(addresses)
    short = pc.replace_substring_regex(names, r"(?is)^(https?://[^?#]*)[?#].*$", r"\1")
    return names if first_repeated(short) is not None else short


def _without_passwords(addresses: pa.LargeBinaryArray) -> pa.LargeBinaryArray:
    return pc.replace_substring_regex(addresses, r"^([A-Za-z0-9+.-]+://[^/@:]*):[^/]*@", r"\1@")


def _address_below(base: str, path: bytes) -> str:
    """The address of a path that is relative to the folder of a list, or begins at its server with "/"."""
    text = os.fsdecode(path)
    if is_http(base):
        text = urllib.parse.quote(path, safe="/:@!$&'()*+,;=~")
    return _joined(base, text)


def _joined(base: str | None, path: str) -> str:
    """A path below an address, without "." and ".."."""
    if is_url(path) or base is None:
        return path
    protocol, _, rest = base.partition("://")
    host, _, folder = rest.partition("/")
    below = posixpath.normpath(posixpath.join("/" + folder, path)).strip("/")
    return f"{protocol}://{host}/{below}".rstrip("/")


def _relative(base: str | None, root: str) -> str:
    """:func:`_joined` backwards: the folder of all images relative to that of the list, if it is on the same server."""
    if base is not None:
        base = os.fsdecode(_without_passwords(pa.array([os.fsencode(base)], pa.large_binary()))[0].as_py())
    if base is None or root.split("/")[:3] != base.split("/")[:3]:
        return root
    return posixpath.relpath("/" + "/".join(root.split("/")[3:]), "/" + "/".join(base.split("/")[3:]))


def _common_root(addresses: pa.LargeBinaryArray) -> str:
    """The deepest address that all are below; empty if they are on several servers."""
    bounds = pc.min_max(addresses).as_py()  # what the first and the last one in order share, all share
    folders = [os.fsdecode(address).partition("?")[0].split("/")[:-1] for address in bounds.values()]
    shared = [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*folders, strict=False))]
    return "/".join(shared) if len(shared) > 2 else ""


def _check_repeated(rows: ListFile, addresses: pa.LargeBinaryArray) -> None:
    if (found := first_repeated(addresses)) is not None:
        row, first = found
        shown = printable(os.fsdecode(addresses[row].as_py()))
        raise ValueError(f"{rows.where(row)} of {rows.shown} names the image of {rows.where(first)} again: {shown}")
