"""Worker processes: number, errors, signals and termination."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import torch

from dmjd.data import workers
from dmjd.data.train_loader import TrainLoader
from dmjd.data.workers import LoaderError, auto_workers, auto_workers_once, read_batches, wait_limit
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


STARTING = """
import multiprocessing, os, signal
multiprocessing.set_start_method("fork", force=True)
from dmjd.data.workers import read_batches
from dmjd.system import STOP_SIGNALS

def send():
    for number in STOP_SIGNALS:
        os.kill(os.getpid(), number)

target = "child"
os.register_at_fork(after_in_child=lambda: target == "child" and send())
assert list(read_batches(abs, range(8), 2)) == list(range(8))

heard, heard_while_starting = set(), []
for number in STOP_SIGNALS:
    signal.signal(number, lambda number, _: heard.add(number))
target = "parent"
os.register_at_fork(before=lambda: heard_while_starting.extend(heard), after_in_parent=send)
assert list(read_batches(abs, range(8), 2)) == list(range(8))
assert heard == set(STOP_SIGNALS) and not heard_while_starting
assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_signals_while_workers_start_reach_the_training_process_and_end_no_worker(tmp_path):
    """They come right after the fork, before a worker has handlers. test_system.py does so with a new program."""
    code = forked.run(forked.execute, STARTING, log=tmp_path / "log", seconds=60)
    assert code == 0, (tmp_path / "log").read_text()


NO_SERVER = """
import multiprocessing
multiprocessing.set_start_method("forkserver", force=True)
from dmjd.data.workers import read_batches
assert list(read_batches(abs, range(3), 1)) == [0, 1, 2]
from multiprocessing import forkserver
assert forkserver._forkserver._forkserver_pid is None
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork server")
def test_workers_are_not_children_of_a_fork_server(tmp_path):
    """It would die of a signal to the process group, and the run with it. From Python 3.14 on it is the default."""
    code = forked.run(forked.execute, NO_SERVER, log=tmp_path / "log", seconds=60)
    assert code == 0, (tmp_path / "log").read_text()


SCRIPT = """
import sys
from dmjd.data.workers import read_batches
batches = read_batches(abs, range(1000), 2)
next(batches)
print("ready", flush=True)
if sys.argv[1] == "raise":
    raise RuntimeError("as planned")
"""


def test_a_process_ends_with_a_live_iterator():
    """A process must not hang on workers that ignore signals, whether it ends normally or by an exception."""
    runs = {
        end: subprocess.Popen(
            [sys.executable, "-c", SCRIPT, end],
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


def test_a_single_process_of_a_large_slurm_job_uses_all_cores(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(workers, "available_cores", lambda: 8)
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "8")
    assert auto_workers() == 8
    assert auto_workers(8) == 1


def misbehave(request):
    """Read what the request names."""
    if request == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if request == "hang":
        reader, _ = os.pipe()
        os.read(reader, 1)
    if isinstance(request, Exception):
        raise request
    return torch.full((2, 3), float(request)), ["text"]


def test_a_killed_worker_is_named_with_the_likely_cause():
    batches = read_batches(misbehave, [0.0, 1.0, "kill", 3.0], 2)
    with pytest.raises(LoaderError, match=r"\(pid \d+\) was killed, probably because memory ran out; lower --num-work"):
        list(batches)


@pytest.mark.parametrize("error", [MemoryError("all used"), OSError(5, "Input/output error", "a.png")])
def test_errors_of_the_machine_keep_their_type_and_are_short(error):
    with pytest.raises(type(error)) as raised:
        list(read_batches(misbehave, [error], 1))
    assert str(raised.value) == str(error)


def test_a_wait_without_progress_ends_and_so_do_workers_that_hang(monkeypatch):
    monkeypatch.setenv("DMJD_TIMEOUT", "0.01")
    before = children()
    started = time.monotonic()
    with pytest.raises(LoaderError, match=r"none of 2 data loading process\(es\) delivered a batch for 0.01 minute"):
        list(read_batches(misbehave, ["hang", "hang"], 2))
    assert time.monotonic() - started < 10
    assert not children() - before


@pytest.mark.parametrize("text", ["x", "0", "-1", "nan", "inf"])
def test_the_timeout_must_be_a_number_of_minutes(monkeypatch, text):
    monkeypatch.setenv("DMJD_TIMEOUT", text)
    with pytest.raises(ValueError, match=f"DMJD_TIMEOUT must be a number of minutes greater than 0, got '{text}'"):
        wait_limit()


@pytest.mark.parametrize("number", [-1, 513, 100000])
def test_the_number_of_workers_is_bounded(number):
    with pytest.raises(ValueError, match=f"num_workers must lie between 0 and 512, got {number}"):
        list(read_batches(misbehave, [0.0], number))


FEW_FILES = """
import os, resource
from tests_of_workers import limited
from dmjd.data.workers import read_batches
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
batches = list(read_batches(limited, range(40), 8))
assert [int(x[0]) for x, _ in batches] == list(range(40))
print(len({pid for _, pid in batches} - {os.getpid()}))
"""


def test_few_open_files_mean_few_workers_and_a_warning(tmp_path):
    (tmp_path / "tests_of_workers.py").write_text(
        "import os, torch\ndef limited(i):\n    return torch.full((1000,), i), os.getpid()\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", FEW_FILES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, env=environment)
    assert done.returncode == 0, done.stderr
    assert 1 <= int(done.stdout) < 8
    assert "the limit of 64 open files allows" in done.stderr
    assert "Traceback" not in done.stderr


ORPHANS = """
import multiprocessing, os
multiprocessing.set_start_method("fork", force=True)  # whatever an earlier test of the process has set
from dmjd.data.workers import read_batches
def read(request):
    os.write(2, f"{os.getpid()}\\n".encode())
    reader, _ = os.pipe()
    os.read(reader, 1)
list(read_batches(read, range(4), 2))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_that_hang_do_not_outlive_a_killed_process(number, tmp_path):
    process = forked.start(forked.execute, ORPHANS, log=tmp_path / "log")
    deadline = time.monotonic() + 60
    while len(pids := pids_in(tmp_path / "log")) < 2:
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == -number
    deadline = time.monotonic() + 10
    while (alive := [pid for pid in pids if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive


def pids_in(log: Path) -> list[int]:
    lines = log.read_text().splitlines() if log.exists() else []
    return [int(line) for line in lines if line.isdecimal()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
