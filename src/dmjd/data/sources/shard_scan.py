"""Find the images and labels in one tar or zip file, from its headers alone: no member is extracted."""

import os
import stat
import struct
import tarfile
import zipfile
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from dmjd.data.sources.paths import EXTENSIONS
from dmjd.data.sources.shard_index import SCHEMA, Shard
from dmjd.regular import check_regular
from dmjd.text import printable

LABELS = (".txt", ".json", ".cls")  # of an image, weakest first; numbered from 1 in the column label_kind

_IMAGE = 0

_MASKS = ("mask", "masks", "seg", "segmentation", "semantic", "instance", "annotation")  # the a.seg.png of an a.jpg

_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")

_STORED, _DEFLATED = 0, 8  # methods of zip

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: mark, length of its name, length of what follows the name


class RefusedShard(ValueError):  # noqa: N818, the name is clear without "Error"
    """A shard that cannot be used, with the cure."""


def scan_shard(path: Path, name: str) -> tuple[Shard, pa.RecordBatch]:
    """The images of a shard, and where they lie.

    An image is a regular member with a known extension; hidden ones are left out, and so are masks such as
    ``a.seg.png`` next to ``a.jpg``. Its label is the member of the same name that ends in ``.cls``, ``.json`` or
    ``.txt``; the first of these that exists.

    Args:
        path: the file.
        name: its name in the index.
    """
    members = _Members()
    size, mtime = 0, -1  # so a shard that can't be opened is scanned again the next time
    problem = refusal = None
    try:
        check_regular(path)
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            size, mtime = status.st_size, status.st_mtime_ns
            scan = _scan_zip if name.lower().endswith(".zip") else _scan_tar
            problem = scan(file, size, members) if size else "it is empty"
    except RefusedShard as error:
        refusal, members = str(error), _Members()
    except OSError as error:
        problem = f"it can't be read: {(error.strerror or str(error)).lower()}"
    batch, masks = members.images()
    left_out = [f"{masks} masks"] if masks else []
    left_out += [f"{members.irregular} sparse files or devices"] if members.irregular else []
    return Shard(name, size, mtime, batch.num_rows, problem, refusal, " and ".join(left_out) or None), batch


class _Members:
    """The images and labels found in a shard, in flat arrays: a shard may have millions of them.

    Attributes:
        irregular: number of images that are no ordinary files.
    """

    def __init__(self) -> None:
        self.irregular = 0
        self._names, self._ends = bytearray(), array("i", [0])
        self._kinds, self._extents = array("b"), array("q")

    def add(self, name: str, offset: int, packed: int, size: int = -1, crc: int = -1) -> None:
        """Add a member if it is an image or label."""
        kind = kind_of(name)
        if kind is not None:
            self._names += _encoded(name)
            self._ends.append(len(self._names))
            self._kinds.append(kind)
            self._extents.extend((offset, packed, size, crc))

    def images(self) -> tuple[pa.RecordBatch, int]:
        """The images with their labels, and the number of masks that were left out."""
        ends = pa.py_buffer(self._ends)
        names = pa.Array.from_buffers(pa.binary(), len(self._kinds), [None, ends, pa.py_buffer(bytes(self._names))])
        kinds = np.frombuffer(self._kinds, np.int8)
        extents = np.frombuffer(self._extents, np.int64).reshape(-1, 4)
        kept = (kinds == _IMAGE) & ~_masks(names, kinds)
        rows = np.flatnonzero(kept)
        label = _label_rows(names, kinds)[rows]
        labeled = np.where((label >= 0)[:, None], extents[label], -1) if len(extents) else extents
        labeled = labeled[:, :3]  # without their CRC-32
        label_kinds = np.where(label >= 0, kinds[label], 0).astype(np.int8) if len(kinds) else kinds
        columns = [names.take(pa.array(rows)), *extents[rows].T, label_kinds, *labeled.T]
        batch = pa.RecordBatch.from_arrays([pa.array(column) for column in columns], schema=SCHEMA)
        return batch, int((kinds == _IMAGE).sum() - len(rows))


def kind_of(name: str) -> int | None:
    """0 for an image, 1 to 3 for a label (see :data:`LABELS`), None for what does not count."""
    ending = os.path.splitext(name)[1].lower()
    if ending in EXTENSIONS:
        kind = _IMAGE
    elif ending in LABELS:
        kind = 1 + LABELS.index(ending)
    else:
        return None
    folders = name.split("/")
    hidden = any(part.startswith(".") and part not in (".", "..") for part in folders) or "__MACOSX" in folders
    return None if hidden else kind


def _encoded(name: str) -> bytes:
    return name.removeprefix("./").encode("utf-8", "surrogateescape")


def _stems(names: pa.Array) -> list[bytes]:
    return [os.path.splitext(name)[0] for name in names.to_pylist()]


def _label_rows(names: pa.Array, kinds: np.ndarray) -> np.ndarray:
    """[n] int64: the row of the label that has the name of each row but for the ending; -1 if there is none."""
    if not (kinds != _IMAGE).any():
        return np.full(len(kinds), -1)
    stems = pa.array(_stems(names), pa.binary()).dictionary_encode()
    ids = stems.indices.to_numpy()
    row_of = np.full(len(stems.dictionary), -1)
    for kind in range(1, 1 + len(LABELS)):
        rows = np.flatnonzero(kinds == kind)
        row_of[ids[rows]] = rows
    return row_of[ids]


def _masks(names: pa.Array, kinds: np.ndarray) -> np.ndarray:
    """[n] bool: images such as ``a.seg.png`` if there is an image ``a.jpg``."""
    masks = np.zeros(len(kinds), bool)
    rows = np.flatnonzero(kinds == _IMAGE).tolist()
    stems = _stems(names.take(pa.array(rows, pa.int64())))
    endings = tuple(f".{word}".encode() for word in _MASKS)
    suspects = [(row, stem) for row, stem in zip(rows, stems, strict=True) if stem.lower().endswith(endings)]
    if suspects:
        images = set(stems)
        masks[[row for row, stem in suspects if os.path.splitext(stem)[0] in images]] = True
    return masks


def _scan_tar(file: BinaryIO, size: int, members: _Members) -> str | None:
    """Add the members of a tar; returns what is wrong with it."""
    if _read(file, 0, 6).startswith(_COMPRESSED):
        raise RefusedShard("it is compressed, so single images can't be found in it: decompress it")
    file.seek(0)
    position, ended = 0, False
    tar = tarfile.TarFile(fileobj=file, mode="w")  # for its parser: in this mode, it reads nothing itself
    while position + tarfile.BLOCKSIZE <= size:
        header = _read(file, position, tarfile.BLOCKSIZE)
        ended = not any(header)
        if ended:  # the mark of the end, or what fills the file; another archive may follow, as after cat a.tar b.tar
            position += tarfile.BLOCKSIZE
            continue
        member = None if tar.pax_headers else _plain_member(header)
        try:
            name, start, length, regular = member or _any_member(file, position, tar)
        except Exception as error:  # damaged headers raise nearly every built-in exception
            reason = printable(error)[:100]
            return f"it is damaged at byte {position} of {size} ({reason})" if position else f"it is no tar ({reason})"
        if length < 0:
            return f"it is damaged at byte {position} of {size} (a member of {length} bytes)"
        before = position
        if member is not None:
            start, position = position + tarfile.BLOCKSIZE, position + tarfile.BLOCKSIZE + length
            position += -position % tarfile.BLOCKSIZE
        else:
            position = tar.offset
        if position <= before:
            return f"it is damaged at byte {before} of {size} (a member that ends before it begins)"
        if not regular:
            members.irregular += kind_of(name) == _IMAGE
        elif start + length > size:
            return f"it is cut short, in {printable(name)[:100]}"
        elif start >= 0:
            members.add(name, start, length)
    return None if ended else "its end is missing"


def _plain_member(header: bytes) -> tuple[str, int, int, bool] | None:
    """Name, 0, bytes and True of a regular file with a short name; None for others. Six times as fast as tarfile."""
    if header[156:157] != tarfile.REGTYPE or header[257:262] != b"ustar" or header[345] or header[124] >= 0x80:
        return None
    try:
        length, checksum = (int(field.strip(b" \0") or b"0", 8) for field in (header[124:136], header[148:156]))
        name = header[: header.index(0, 0, 101)].decode("utf-8", "surrogateescape")
    except ValueError:  # a name of 100 bytes, or a damaged field
        return None
    return (name, 0, length, True) if sum(header) - sum(header[148:156]) + 256 == checksum else None


def _any_member(file: BinaryIO, position: int, tar: tarfile.TarFile) -> tuple[str, int, int, bool]:
    """Name, offset (-1: it has no content), bytes, and whether it is neither sparse nor a device."""
    file.seek(position)
    member = tarfile.TarInfo.fromtarfile(tar)
    regular = not (member.issparse() or member.isdev())
    return member.name, member.offset_data if member.isreg() else -1, member.size, regular


def _scan_zip(file: BinaryIO, size: int, members: _Members) -> str | None:
    """Add the members of a zip; returns what is wrong with it."""
    try:
        with zipfile.ZipFile(file) as opened:
            listed = opened.infolist()
    except Exception as error:  # damaged directories raise nearly every built-in exception
        return f"it is no zip, or its end is missing ({printable(error)[:100]})"
    lost = _add_zip(listed, file, size, members)
    return f"{lost} of its {len(listed)} members lie outside of it: it is damaged" if lost else None


def _add_zip(listed: Iterable[zipfile.ZipInfo], file: BinaryIO, size: int, members: _Members) -> int:
    """Add members of a zip; returns how many are damaged."""
    lost = 0
    for member in listed:
        mode = member.external_attr >> 16
        if kind_of(member.filename) is None or member.is_dir() or stat.S_ISLNK(mode):
            continue
        if member.flag_bits & 1:
            raise RefusedShard("it is protected by a password: unpack it, and pack it again without")
        if member.compress_type not in (_STORED, _DEFLATED):
            method = f"a method other than deflate (number {member.compress_type})"
            raise RefusedShard(f"its members are compressed by {method}: pack it again, stored (zip -0) or deflated")
        header = _read(file, max(0, member.header_offset), _LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
            lost += 1
            continue
        _, name, extra = _LOCAL_HEADER.unpack(header)
        offset = member.header_offset + _LOCAL_HEADER.size + name + extra
        if offset + member.compress_size > size:
            lost += 1
            continue
        stored = member.compress_type == _STORED
        members.add(member.filename, offset, member.compress_size, -1 if stored else member.file_size, member.CRC)
    return lost


def _read(file: BinaryIO, offset: int, length: int) -> bytes:
    file.seek(offset)
    return file.read(length)
