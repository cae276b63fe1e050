"""Worker processes: number, errors, signals and termination."""

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dmjd.data import workers
from dmjd.data.train_loader import TrainLoader
from dmjd.data.workers import auto_workers, auto_workers_once, read_batches
from dmjd.images.stored import UnreadableImage


def test_cores_are_divided_among_processes(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
    monkeypatch.setattr(workers, "available_cores", lambda: 12)
    assert [auto_workers(n) for n in (1, 2, 4, 100)] == [8, 6, 3, 1]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert auto_workers(100) == 4
    assert [auto_workers_once(n, few=10) for n in (10, 11)] == [0, 4]


def square(request):
    if request == 3:
        raise UnreadableImage("three", "made so")
    return request**2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_results_are_in_order_and_errors_keep_their_type(num_workers):
    assert list(read_batches(square, [0, 1, 2, 4], num_workers)) == [0, 1, 4, 16]
    with pytest.raises(UnreadableImage, match="three: made so"):
        list(read_batches(square, [1, 2, 3], num_workers))


def test_the_global_generator_is_not_used(noise_folder):
    states = []
    for num_workers in (0, 2):
        torch.manual_seed(0)
        batches = TrainLoader(noise_folder, img_size=(8, 8), batch_size=4, num_workers=num_workers).batches()
        next(batches)
        batches.close()
        states.append(torch.get_rng_state())
    torch.manual_seed(0)
    assert all(torch.equal(state, torch.get_rng_state()) for state in states)


def children():
    """Ids of the child processes of this process."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(os.getpid())], capture_output=True, text=True)
    return {int(pid) for pid in listed.stdout.split() if os.path.exists(f"/proc/{pid}")}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_closing_ends_the_workers_and_interrupts_do_not(noise_folder):
    batches = TrainLoader(noise_folder, img_size=(8, 8), batch_size=4, num_workers=2).batches(0)
    before = children()
    next(batches)
    workers = {pid for pid in children() - before if b"python" in Path(f"/proc/{pid}/cmdline").read_bytes()}
    assert len(workers) >= 2
    for pid, name in itertools.product(workers, ["INT", "TERM"]):
        subprocess.run(["kill", f"-{name}", str(pid)], check=True)  # sent by another process, as on a cluster
    for _ in range(20):
        next(batches)
    batches.close()
    deadline = time.time() + 10
    while workers & children() and time.time() < deadline:
        time.sleep(0.05)
    assert not workers & children()


SCRIPT = """
import sys
from dmjd.data.sources.folder import FolderSource
from dmjd.data.train_loader import TrainLoader
from pathlib import Path
batches = TrainLoader(FolderSource(Path(sys.argv[1])), img_size=(8, 8), batch_size=4, num_workers=2).batches(0)
next(batches)
print("ready", flush=True)
if sys.argv[2] == "raise":
    raise RuntimeError("as planned")
"""


def test_a_process_ends_with_a_live_iterator(noise_folder):
    """A process must not hang on workers that ignore signals, whether it ends normally or by an exception."""
    runs = {
        end: subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(noise_folder.root), end],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for end in ("return", "raise")
    }
    for end, run in runs.items():
        output, error = run.communicate(timeout=90)
        assert output == "ready\n"
        assert run.returncode == (1 if end == "raise" else 0)
        assert ("as planned" in error) == (end == "raise")
