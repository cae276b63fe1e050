"""What is found in tar and zip files, whole and damaged."""

import io
import os
import tarfile
import time
import zipfile

import pytest
from archives import cut, overwrite, tar, zipped
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_sets import first_values, png
from support import TINY, mistake

from dmjd.data.sources.registry import open_source
from dmjd.images.stored import UnreadableImage
from dmjd.warning import DMJDWarning


def test_masks_and_hidden_files_are_left_out_but_two_images_of_a_name_count(tmp_path):
    names = ("a.jpg", "a.seg.png", "b.png", "b.jpg", "._c.png", "x/.d/e.png", "__MACOSX/f.png", "2020.01.png", "f.pdf")
    file = tar(tmp_path / "a.tar", {name: png(0) for name in names})
    with pytest.warns(DMJDWarning, match=r"1 of 1 shards .* left out \(a\.tar: 1 masks\)"):
        source = open_source(file)
    assert [source.describe(i).rpartition("/")[2] for i in range(len(source))] == [
        "a.jpg", "b.png", "b.jpg", "2020.01.png",
    ]  # fmt: skip


@pytest.mark.parametrize("style", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_every_length_and_alphabet(tmp_path, style):
    names = [f"{'x' * length}.png" for length in (1, 94, 95, 96)]
    names += [f"{'d' * 90}/{'é' * 30}.png", "../../etc/cat.png", "/etc/a\x1b[2J.png"]
    names += [f"{'/'.join(['deep' * 10] * 9)}.png", "日本.png"] if style != tarfile.USTAR_FORMAT else []
    with tarfile.open(tmp_path / "a.tar", "w", format=style) as file:
        for value, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = len(png(value))
            file.addfile(member, io.BytesIO(png(value)))
    source = open_source(tmp_path / "a.tar")
    assert first_values(source) == list(range(len(names)))
    shown = [source.describe(i).removeprefix(f"{tmp_path}/a.tar/") for i in range(len(source))]
    assert shown == [name.replace("\x1b", "\\x1b") for name in names]
    assert not (tmp_path / "etc").exists()


@given(st.dictionaries(st.text(st.characters(exclude_characters="\0/", codec="utf-8"), min_size=1, max_size=120)
    .filter(lambda n: not n.startswith(".")), st.integers(0, 255), min_size=1, max_size=8))  # fmt: skip
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_python_packs_is_found(tmp_path, contents):
    """Any names, in any archive: the images are those that tarfile and zipfile read."""
    members = {f"{name}.png": png(value) for name, value in contents.items()}
    for file in (tar(tmp_path / "a.tar", members), zipped(tmp_path / "a.zip", members, zipfile.ZIP_DEFLATED)):
        os.utime(file, ns=(time.time_ns(), time.time_ns()))
        source = open_source(file)
        assert [source.stored(i) for i in range(len(source))] == list(members.values())


def test_joined_and_prefixed_archives_and_large_headers(tmp_path):
    """As from cat a.tar b.tar, as a self-extracting zip, and as written to a pipe with the headers of zip64."""
    parts = [tar(tmp_path / f"{i}.tar", {f"{i}.png": png(i)}).read_bytes() for i in range(3)]
    (tmp_path / "all.tar").write_bytes(b"".join(parts))
    assert first_values(open_source(tmp_path / "all.tar")) == [0, 1, 2]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file, file.open("a.png", "w", force_zip64=True) as member:
        member.write(png(5))
    (tmp_path / "b.zip").write_bytes(b"#!/bin/sh\n" + (tmp_path / "a.zip").read_bytes())
    assert first_values(open_source(str(tmp_path / "*.zip"))) == [5, 5]


def test_links_folders_devices_and_sparse_files(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for name, kind in (("d.png", tarfile.DIRTYPE), ("l.png", tarfile.SYMTYPE), ("h.png", tarfile.LNKTYPE),
                           ("c.png", tarfile.CHRTYPE), ("f.png", tarfile.FIFOTYPE)):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            file.addfile(member)
        member = tarfile.TarInfo("s.png")
        member.pax_headers = {"GNU.sparse.map": "0,4", "GNU.sparse.size": "9"}
        member.size = 4
        file.addfile(member, io.BytesIO(b"abcd"))
        member = tarfile.TarInfo("g.png")
        member.size = len(png(7))
        file.addfile(member, io.BytesIO(png(7)))
    with pytest.warns(DMJDWarning, match="3 sparse files or devices"):
        assert first_values(open_source(tmp_path / "a.tar")) == [7]
    zipped(tmp_path / "b.zip", {"d.png/": b"", "e.png": png(3)})
    link = zipfile.ZipInfo("l.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "b.zip", "a") as file:
        file.writestr(link, "/etc/passwd")
    assert first_values(open_source(tmp_path / "b.zip")) == [3]


@pytest.mark.parametrize(
    ("harm", "left", "message"),
    [
        (lambda file: cut(file, 5 * 512 + 20), 2, r"it is cut short, in 2\.png, after 2 images, which count"),
        (lambda file: cut(file, 4 * 512), 2, "its end is missing, after 2 images"),
        (lambda file: cut(file, 4 * 512 + 9), 2, "its end is missing, after 2 images"),
        (lambda file: overwrite(file, 4 * 512, b"\xff" * 600), 2, "it is damaged at byte 2048 of 10240 .*2 images"),
        (lambda file: overwrite(file, 4 * 512 + 124, b"9"), 2, "it is damaged at byte 2048 of 10240 .*2 images"),
        (lambda file: cut(file, 0), 0, "it is empty"),
        (lambda file: file.write_text("words" * 200), 0, "it is no tar"),
        (lambda file: tar(file, {"readme.md": b"x"}), 0, "it holds no images"),
    ],
)  # fmt: skip
def test_what_lies_before_the_damage_counts(tmp_path, harm, left, message):
    tar(tmp_path / "s" / "a.tar", {f"{i}.png": png(i) for i in range(4)})
    zipped(tmp_path / "s" / "b.zip", {"9.png": png(9)})
    harm(tmp_path / "s" / "a.tar")
    with pytest.warns(DMJDWarning, match=rf"1 of 2 shards of .* are damaged or hold no images \(a\.tar: {message}"):
        source = open_source(tmp_path / "s")
    assert first_values(source) == [*range(left), 9]


def test_a_damaged_zip(tmp_path):
    file = zipped(tmp_path / "s" / "a.zip", {f"{i}.png": png(i) for i in range(4)}, zipfile.ZIP_DEFLATED)
    whole = file.read_bytes()
    overwrite(file, 0, b"????")
    with pytest.warns(DMJDWarning, match=r"1 of its 4 members lie outside of it"):
        assert first_values(open_source(file)) == [1, 2, 3]
    file.write_bytes(whole)
    overwrite(file, 40, b"\xff\xff\xff")
    source = open_source(file)
    with pytest.raises(UnreadableImage, match=r"a\.zip/0\.png: damaged"):
        source.read(0)
    assert int(source.read(1)[0, 0, 0]) == 1
    cut(file, len(whole) - 30)
    with pytest.raises(ValueError, match=r"no images found in .*a\.zip: it is no zip, or its end is missing"):
        open_source(file)


def with_password(file):
    zipped(file, {"0.png": png(0)})
    content = file.read_bytes()
    at = content.index(b"PK\1\2") + 8
    file.write_bytes(content[:at] + b"\1" + content[at + 1 :])


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("a.zip", with_password, "it is protected by a password: unpack it"),
        (
            "a.zip",
            lambda f: zipped(f, {"0.png": png(0)}, zipfile.ZIP_LZMA),
            "by a method other .*14.: pack it",
        ),
        ("a.tar", lambda f: tarfile.open(f, "w:gz").close(), "it is compressed, .*: decompress it"),
        ("a.tar.gz", lambda f: tarfile.open(f, "w:gz").close(), "is compressed as a whole, .*: decompress it"),
        ("a.tar", lambda f: tar(f, {"0.cls": b"0"}), "no images found in .*it holds no images.*known extensions"),
    ],
)
def test_a_shard_that_cannot_be_used_is_one_line(tmp_path, name, make, message, capsys):
    (tmp_path / "s").mkdir()
    make(tmp_path / "s" / name)
    for data in (tmp_path / "s", tmp_path / "s" / name):
        with pytest.raises(ValueError, match=message):
            open_source(data)
    mistake(capsys, "pretrain", "--data", tmp_path / "s", "--out", tmp_path / "run", *TINY)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", [b"-0000001000\0", b"-1\0", b"\xff" * 10 + b"\xfe\0", b"\xff" * 12])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.FIFOTYPE, b"Z"])
def test_a_negative_size_ends_the_scan(tmp_path, size, kind):
    """It would lead backwards, for ever."""
    file = tar(tmp_path / "a.tar", {"a.png": png(0), "b.png": png(1), "c.png": png(2)})
    content = bytearray(file.read_bytes())
    start = 512 + -(-len(png(0)) // 512) * 512  # of the second member
    content[start + 124 : start + 136] = size.ljust(12, b"\0")[:12]
    content[start + 156 : start + 157] = kind
    content[start + 148 : start + 156] = b" " * 8
    checksum = sum(content[start : start + 512])
    content[start + 148 : start + 156] = f"{checksum:06o}\0 ".encode()
    file.write_bytes(content)
    with pytest.warns(DMJDWarning, match="damaged at byte|it is no tar|sparse files or devices"):
        source = open_source(file)
    assert first_values(source)[0] == 0
