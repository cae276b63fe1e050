"""Errors of commands as a line with a cure, bugs as a request to report them."""

import errno
import tomllib
from pathlib import Path

import pytest
import torch
from support import ROOT

from dmjd.cli.failures import ISSUES, MAX_ERROR_LINES, explain, report_failure
from dmjd.data.workers import LoaderError
from dmjd.engine.processes import LostProcessError


class ConnectError(Exception):
    """As httpx has it: no OSError."""

    __module__ = "httpx"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("wrong"), "wrong"),
        (FloatingPointError("diverged"), "diverged"),
        (LoaderError("a worker died"), "a worker died"),
        (LostProcessError("lost process 2"), "lost process 2"),
        (MemoryError(), "out of memory; use a smaller --batch-size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (RuntimeError("can't start new thread"), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of GPU memory; use a smaller"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might"), "out of GPU memory"),
        (RuntimeError("received 0 items of ancdata"), "too many open files; raise the limit with ulimit -n"),
        (OSError(errno.EMFILE, "Too many open files", "a.png"), "a.png: too many open files; raise the limit"),
        (OSError(errno.ENOSPC, "No space left on device", "run/a"), "run/a: no space left on the disk; free some"),
        (PermissionError(errno.EACCES, "Permission denied", "run"), "run: permission denied; change"),
        (OSError(errno.ESTALE, "Stale file handle", "a"), "a: the network folder is gone; mount it again"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a"), "a: No such file or directory"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "the system cannot start another process"),
        (ConnectionResetError(errno.ECONNRESET, "reset by peer"), "the network does not answer as it should"),
        (ConnectError("[Errno -2] Name or service not known"), "the network does not answer as it should"),
        (ModuleNotFoundError("No module named 'timm'"), "a package is missing or broken: No module named 'timm'"),
    ],
)
def test_expected_errors_are_one_line(error, words):
    message, code = report_failure(error, [])
    assert message.startswith(f"error: {words}")
    assert code == 2
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("message", "given", "shown"),
    [
        ("batch_size must be at least 1, got 0", "--batch-size 0", "--batch-size must be at least 1, got 0"),
        ("batch_size must be at least 1, got 0", "--batch-size=0", "--batch-size must be at least 1, got 0"),
        ("epochs must be greater than 0", "--epochs -1", "--epochs must be greater than 0"),
        ("batch_size 9 needs accumulate 3", "--accumulate 3", "batch_size 9 needs --accumulate 3"),
        ("more epochs must be given", "--epochs 3", "more epochs must be given"),
        ("config.json: batch_size must be int", "--batch-size 1", "config.json: batch_size must be int"),
        ("there is no x/img_size.png, img_size", "--img-size 8", "there is no x/img_size.png, --img-size"),
        ("unknown encoder 'in_chans'", "--in-chans 2", "unknown encoder 'in_chans'"),
        ("unknown flag --(", "--( --[a", "unknown flag --("),
    ],
)
def test_settings_are_named_by_the_flags_that_were_given(message, given, shown):
    assert report_failure(ValueError(message), given.split())[0] == f"error: {shown}"


def test_long_messages_are_cut_and_made_printable():
    message, _ = report_failure(ValueError("\n".join(f"\x1b[3{i}m" for i in range(20))), [])
    assert len(message.splitlines()) == MAX_ERROR_LINES
    assert "\x1b" not in message
    assert message.endswith("... and 11 more lines")


@pytest.mark.parametrize("given", [["--out", "RUN"], ["--out=RUN"], ["RUN"]])
def test_a_bug_is_to_be_reported_with_its_traceback(tmp_path, given):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    arguments = ["pretrain", *(text.replace("RUN", str(run)) for text in given), "--seed", "1"]
    with pytest.raises(KeyError) as raised:
        raise KeyError("lost \udcff")
    assert explain(raised.value) is None
    message, code = report_failure(raised.value, arguments)
    assert code == 1
    first, second = message.splitlines()
    assert first.startswith("error: KeyError: 'lost ")
    assert ISSUES in second
    file = Path(second.rpartition(" ")[2])
    assert file.parent == run
    assert "raise KeyError" in file.read_text()
    assert "--seed 1" in file.read_text()


def test_without_a_run_folder_the_traceback_is_a_temporary_file(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    message, _ = report_failure(KeyError("a"), ["show", "\0", "~nouser/a"])
    (file,) = tmp_path.iterdir()
    assert str(file) in message
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    message, code = report_failure(KeyError("a"), [])
    assert message.endswith("KeyError: 'a'")
    assert code == 1


def test_of_several_processes_only_the_first_gives_more_than_a_line(monkeypatch):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("TORCHELASTIC_RUN_ID", "none")):
        monkeypatch.setenv(name, value)
    assert report_failure(ValueError("a\nb\nc"), [])[0] == "process 2 of 2: error: a"
    monkeypatch.setenv("RANK", "0")
    assert report_failure(ValueError("a\nb\nc"), [])[0] == "error: a\nb\nc"


def test_the_address_is_that_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["urls"]["Issues"] == ISSUES
