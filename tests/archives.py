"""Tar and zip files of images, and how they get damaged."""

import io
import json
import os
import tarfile
import zipfile

from image_sets import png


def tar(path, members, **info):
    """A tar of members: name -> content. ``info``: attributes of all of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for attribute, value in info.items():
                setattr(member, attribute, value)
            file.addfile(member, io.BytesIO(content))
    return path


def zipped(path, members, method=zipfile.ZIP_STORED):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def cut(file, size):
    os.truncate(file, size)


def overwrite(file, at, content):
    with open(file, "r+b") as opened:
        opened.seek(at)
        opened.write(content)


def three_shards(root):
    """A tar, a stored zip and a deflated one, of 4 images each, with labels."""
    tar(root / "a.tar", {f"{i}.{e}": c for i in range(4) for e, c in (("png", png(i)), ("cls", str(i % 2).encode()))})
    for name, start, method in (("b.zip", 4, zipfile.ZIP_STORED), ("c.zip", 8, zipfile.ZIP_DEFLATED)):
        numbers = range(start, start + 4)
        members = {f"{i}.json": json.dumps({"label": i % 2, "size": [6, 5]}).encode() for i in numbers}
        zipped(root / name, members | {f"{i}.png": png(i) for i in numbers}, method)
