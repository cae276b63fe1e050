"""FIFOs in place of the files of a run: opening one would wait forever."""

import os

import pytest

from dmjd.files import locked, try_lock
from dmjd.interop.feature_files import check_finished
from dmjd.runs.checkpoint import read_config_of
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
