"""Files that are not regular are recognized without being opened."""

import os
import socket

import pytest

from dmjd.checked_json import read_json
from dmjd.regular import irregular


def test_kinds(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "linked fifo").symlink_to(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
    kinds = {name: irregular(tmp_path / name) for name in sorted(os.listdir(tmp_path))}
    assert kinds == {"fifo": "a FIFO", "file": None, "link": None, "linked fifo": "a FIFO", "socket": "a socket"}
    assert irregular("/dev/null") == "a device"
    assert irregular(tmp_path) == "a folder"
    with pytest.raises(FileNotFoundError):
        irregular(tmp_path / "nothing")


def test_json_is_not_read_from_a_fifo(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"a\.json: cannot be read \(it is a FIFO, not a file\)"):
        read_json(tmp_path / "a.json", dict)
