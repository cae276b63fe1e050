"""The warning if other work keeps cores busy."""

import subprocess
import sys

import pytest
import torch

from dmjd.data.workers import available_cores
from dmjd.engine.busy_cores import lateness, warn_of_busy_cores
from dmjd.engine.console import Console

WARN = """
import torch
from dmjd.engine.busy_cores import warn_of_busy_cores
from dmjd.engine.console import Console
torch.set_num_threads(2)
for _ in range(2):
    warn_of_busy_cores(torch.device("cpu"), Console())
"""


def test_operations_that_some_delay_made_late() -> None:
    assert lateness([1.0] * 20) == 1.0
    assert lateness([1.0] * 10 + [9.0] * 10) == 5.0  # half of them wait
    assert lateness([3.0]) == 1.0


@pytest.mark.slow
def test_threads_beside_busy_cores_are_warned_of() -> None:
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(max(1, available_cores() - 1))]
    try:
        done = subprocess.run([sys.executable, "-c", WARN], capture_output=True, text=True, check=True)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    warning = " ".join(done.stderr.split())
    assert "the 2 threads of this process wait for each other" in warning
    assert warning.count("warning:") == 1  # of the first of two trainings
    assert "OMP_NUM_THREADS" in warning


def test_one_thread_waits_for_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        warn_of_busy_cores(torch.device("cpu"), Console())
    finally:
        torch.set_num_threads(before)
    assert not capsys.readouterr().err
