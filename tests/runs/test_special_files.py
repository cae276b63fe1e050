"""FIFOs in place of the files of a run: opening one would wait forever."""

import os
import signal

import pytest

from dmjd.encoders.headers import read_headers
from dmjd.files import locked, read_digest, try_lock
from dmjd.interop.feature_files import check_finished
from dmjd.runs.checkpoint import RunFolder, read_config_of
from dmjd.runs.metrics import read_metrics

CALLS = {
    "config.json": lambda file: read_config_of(file.parent),
    "metrics.jsonl": read_metrics,
    ".lock": lambda file: locked(file).__enter__(),
    "features.parquet": lambda file: check_finished({}, file),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_fifo_is_named(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}.*it is a FIFO, not a file"):
        CALLS[name](tmp_path / name)


def test_a_fifo_as_the_lock_of_a_run(tmp_path):
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(OSError, match="it is a FIFO"):
        try_lock(tmp_path / ".lock")


@pytest.fixture
def alarm():
    """Ends a test that hangs."""

    def end(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_a_fifo_as_the_encoder_file_has_no_digest(tmp_path, alarm):
    os.mkfifo(tmp_path / "encoder.safetensors")
    assert read_digest(tmp_path / "encoder.safetensors") is None


def test_a_final_checkpoint_that_is_a_link_to_itself_is_unreadable(tmp_path):
    (tmp_path / "final.safetensors").symlink_to("final.safetensors")
    headers, unreadable = read_headers(tmp_path)
    assert not headers
    assert unreadable[0].newer_than(10**9)


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "unreadable.txt", "checkpoints/final.safetensors"])
def test_what_cannot_be_written_later_is_named_at_the_start(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=name):
        RunFolder(tmp_path)
