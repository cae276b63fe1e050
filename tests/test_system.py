"""Other systems: a run without what only Unix has, and what takes its place."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import metrics

from dmjd import system


def test_a_run_without_what_only_unix_has(tmp_path, image_folder):
    """Every module is imported; worker processes start as new programs."""
    script = Path(__file__).with_name("other_system.py")
    command = [sys.executable, str(script), str(image_folder), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line["step"] for line in metrics(tmp_path / "run")][-1] == 3
    assert (tmp_path / "run" / "encoder.safetensors").exists()


def test_a_lock_is_held_until_the_file_is_closed(tmp_path):
    path = tmp_path / "file"
    with path.open("w") as first:
        system.lock(first)
        with path.open("r") as second, pytest.raises(BlockingIOError):
            system.lock(second)
        assert not system.is_left_behind(path)
    assert system.is_left_behind(path)


def test_without_locks_only_old_files_count_as_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(system, "fcntl", None)
    path = tmp_path / "file"
    path.touch()
    with path.open() as file:
        system.lock(file)  # holds nothing
    assert not system.is_left_behind(path)
    os.utime(path, (time.time() - 2 * 24 * 3600,) * 2)
    assert system.is_left_behind(path)


def test_processes_that_exist():
    assert system.exists(os.getpid())
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert not system.exists(process.pid)
    assert not system.exists(1 << 70)
