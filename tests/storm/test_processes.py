"""A storm of signals, kills and machines with too little of everything: nothing is lost, nothing hangs, no traceback.

Minutes long. Each test adds a line to the table in the file that the environment variable DMJD_STORM_TABLE names.
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from storm.table import record
from support import TINY, assert_same_bits, metrics

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="uses /proc and namespaces")]

SEED = 13

FLAGS = [*TINY, "--batch-size", "8", "--num-workers", "2", "--checkpoint-every", "20"]

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def judge(part: str, tried: int, survived: int) -> None:
    """Add a line to the table of the storm, and require that nothing was lost."""
    record(part, tried=tried, lost=tried - survived)
    assert survived == tried


def pretrain(data: Path, out: Path, *flags: object) -> list[str]:
    """The command line of a training that ends after 60 steps if ``flags`` do not say otherwise."""
    command = [sys.executable, "-m", "dmjd", "pretrain", "folder", "--data", data, "--out", out, *FLAGS, "--steps", 60]
    return [*map(str, command), *map(str, flags)]


def start(command: list[str], **variables: str) -> subprocess.Popen:
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT | variables)


def end(process: subprocess.Popen, timeout: float = 120) -> str:
    """Wait for the end of a process; returns its stderr. A hang is an error."""
    try:
        _, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"it hangs: {process.communicate()[1]}") from None
    return stderr


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if len(metrics_so_far(run)) > step:
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step} in time: {end(process, 1)}")


def metrics_so_far(run: Path) -> list[str]:
    file = run / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def children(pid: int) -> list[int]:
    """Process ids of the Python children of a process."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    return [int(p) for p in listed if is_running(int(p)) and b"dmjd" in Path(f"/proc/{p}/cmdline").read_bytes()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture(scope="module")
def straight(tmp_path_factory, storm_folder):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    process = start(pretrain(storm_folder, out))
    stderr = end(process)
    assert process.returncode == 0, stderr
    return out


@pytest.fixture(scope="module")
def storm_folder(tmp_path_factory):
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("data") / "images"
    folder.mkdir()
    rng = np.random.default_rng(SEED)
    for i in range(30):
        image = rng.integers(0, 255, (40 + i % 5, 44, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / f"{i}.png")
    return folder


# What a signal to the main process or a worker may end with; 0: finished or saved.
SIGNALS = {
    signal.SIGTERM: {0, 143, -15},
    signal.SIGINT: {0, 130, -2},
    signal.SIGHUP: {0, 129, -1},
    signal.SIGKILL: {0, -9},
}


def test_twenty_signals_at_random_moments(tmp_path, storm_folder, straight):
    """Of any kind, to the main process or a worker, from the first moment on; the same command finishes the run."""
    rng, run, survived = random.Random(SEED), tmp_path / "run", 0
    command = pretrain(storm_folder, run)
    for i in range(20):
        if (run / "checkpoints" / "final.safetensors").exists():
            shutil.rmtree(run)
        number, worker = rng.choice(list(SIGNALS)), rng.random() < 0.3
        process = start(command)
        time.sleep(rng.uniform(0.0, 12.0))
        targets = children(process.pid) if worker else []
        if process.poll() is None:
            os.kill(rng.choice(targets) if targets else process.pid, number)
            if i % 4 == 0 and number != signal.SIGKILL and not targets:
                process.send_signal(number)  # some launchers and terminals send it twice
        stderr = end(process)
        expected = {0, 2} if targets else SIGNALS[number]  # 2: a worker is lost, and the state is saved
        survived += process.returncode in expected and "Traceback" not in stderr
        assert process.returncode in expected, (number, stderr)
        assert "Traceback" not in stderr, stderr
    process = start(command)
    stderr = end(process)
    assert process.returncode == 0, stderr
    assert [m["step"] for m in metrics(run)] == list(range(1, 61))
    assert_same_bits(run, straight)
    judge("signals at random moments, to the main process and to workers", 20, survived)


def test_killed_workers_save_first(tmp_path, storm_folder, straight):
    survived = 0
    for i, number in enumerate((signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS)):
        run = tmp_path / f"run{i}"
        process = start(pretrain(storm_folder, run))
        wait_for_step(run, 5, process)
        os.kill(children(process.pid)[0], number)
        stderr = end(process)
        assert process.returncode == 2, stderr
        assert "whose state is saved" in stderr
        assert f"(signal {number.name})" in stderr.splitlines()[-1]
        process = start(pretrain(storm_folder, run))
        assert "resumed at step" in end(process)
        assert_same_bits(run, straight)
        survived += 1
    judge("loader processes killed", 3, survived)


HANG = """
import os, sys
import dmjd.data.train_loader as loader
from dmjd.cli.main import main
read, calls = loader.CroppedImages.__call__, []
def hang(self, drawn):
    calls.append(1)
    if len(calls) > 3:
        os.read(os.pipe()[0], 1)
    return read(self, drawn)
loader.CroppedImages.__call__ = hang
sys.exit(main())
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_reads_that_hang(tmp_path, storm_folder, workers):
    """As on a network folder that is gone: a signal saves what there is, and workers end with their parent."""
    survived = 0
    for number in SIGNALS:
        run = tmp_path / number.name
        flags = pretrain(storm_folder, run, "--num-workers", workers)[3:]
        process = start([sys.executable, "-c", HANG, *flags])
        wait_for_step(run, 2, process)
        time.sleep(0.5)
        pids = children(process.pid)
        process.send_signal(number)
        stderr = end(process, 40)
        assert process.returncode in SIGNALS[number], stderr
        if number != signal.SIGKILL:
            assert "checkpoint saved" in stderr
            assert list((run / "checkpoints").iterdir())
        deadline = time.monotonic() + 10
        while any(map(is_running, pids)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(map(is_running, pids))
        survived += 1
    judge(f"signals while reads hang, {workers} workers", len(SIGNALS), survived)


def in_namespace(setup: str, command: list[str]) -> list[str]:
    """The command with another /dev/shm, if this process may make one."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs the permission to make a mount namespace")
    return ["unshare", "-m", "sh", "-c", f'{setup} && exec "$0" "$@"', *command]


def test_little_shared_memory(tmp_path, storm_folder, straight):
    """As in a container: room for one batch, for nothing, or not writable."""
    mounts = {
        "small": "mount -t tmpfs -o size=128k tmpfs /dev/shm",
        "full": "mount -t tmpfs -o size=4k tmpfs /dev/shm && head -c 4096 /dev/zero > /dev/shm/x",
        "read-only": "mount -t tmpfs -o ro tmpfs /dev/shm",
    }
    for name, setup in mounts.items():
        process = start(in_namespace(setup, pretrain(storm_folder, tmp_path / name)))
        stderr = end(process)
        assert process.returncode == 0, stderr
        lines = [line for line in stderr.splitlines() if "shared memory" in line or "cannot start" in line]
        assert len(lines) == 1
        assert lines[0].startswith("warning: ")
        assert_same_bits(tmp_path / name, straight)
    judge("small, full and read-only shared memory", len(mounts), len(mounts))


def test_low_limits(tmp_path, storm_folder):
    """Of open files and of memory: it runs, or ends with one line; never a traceback or a hang."""
    limits = ["ulimit -n 64", "ulimit -n 32", "ulimit -n 16", *(f"ulimit -v {n}000000" for n in (1, 2, 3, 4))]
    for i, limit in enumerate(limits):
        command = pretrain(storm_folder, tmp_path / str(i), "--num-workers", 8, "--steps", 3)
        process = start(["sh", "-c", f'{limit} && exec "$0" "$@"', *command])
        stderr = end(process)
        assert "Traceback" not in stderr, (limit, stderr)
        if limit.startswith("ulimit -n"):
            assert process.returncode in (0, 2), (limit, stderr)
            assert "ulimit -n" in stderr
    judge("low limits of open files and memory", len(limits), len(limits))


def test_broken_output(tmp_path, storm_folder, straight):
    """A full disk under the log, a pipe whose reader left, closed streams."""
    endings = ["2>/dev/full", ">/dev/full 2>/dev/full", "2>&1 | head -1", "2>&1 | true", "2>&-", ">&- 2>&- <&-"]
    for i, ending in enumerate(endings):
        command = pretrain(storm_folder, tmp_path / str(i))
        done = subprocess.run(
            ["sh", "-c", f'"$0" "$@" {ending}', *command], capture_output=True, text=True, env=ENVIRONMENT
        )
        assert done.returncode == 0, ending
        assert "Traceback" not in done.stdout + done.stderr
        assert_same_bits(tmp_path / str(i), straight)
    judge("output that cannot be written", len(endings), len(endings))


def torchrun(*arguments: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        f"--master-port={free_port()}",
        *arguments,
    ]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def ours(stderr: str) -> list[str]:
    """Lines of stderr that neither torchrun nor Lightning wrote."""
    return [
        line for line in stderr.splitlines() if line.startswith(("error", "warning", "process ", "stopped", "an error"))
    ]


def test_two_processes(tmp_path, storm_folder):
    """One is killed, or both are stopped: the state is saved, with few lines of ours and no traceback of ours."""
    faults = {"rank 0": signal.SIGKILL, "rank 1": signal.SIGKILL, "TERM": signal.SIGTERM, "INT": signal.SIGINT}
    for name, number in faults.items():
        run = tmp_path / name
        process = start(torchrun(*pretrain(storm_folder, run, "--steps", 100000)[1:]))
        wait_for_step(run, 25, process)
        ranks = sorted(children(process.pid), key=lambda pid: int(environment_of(pid)["RANK"]))
        os.kill(ranks[int(name[-1])] if name.startswith("rank") else process.pid, number)
        stderr = end(process)
        assert "site-packages/lightning" not in stderr, stderr  # a traceback of ours would show it
        assert "src/dmjd" not in stderr, stderr
        assert len(ours(stderr)) <= 4, stderr
        assert not any(map(is_running, ranks))
        saved = max(int(file.stem[5:]) for file in (run / "checkpoints").glob("step-*"))
        assert saved >= (20 if name == "rank 0" else 25)  # the first process can save nothing after it was killed
    judge("two processes: one killed, both stopped", len(faults), len(faults))


def environment_of(pid: int) -> dict[str, str]:
    text = Path(f"/proc/{pid}/environ").read_text()
    return dict(entry.split("=", 1) for entry in text.split("\0") if "=" in entry)


def test_too_many_unreadable_images_on_two_processes(tmp_path, storm_folder):
    data = tmp_path / "data"
    shutil.copytree(storm_folder, data)
    for i in range(30, 90):
        (data / f"{i}.png").write_text("no image")
    process = start(torchrun(*pretrain(data, tmp_path / "run")[1:]))
    stderr = end(process)
    assert "can't be read" in stderr
    assert "src/dmjd" not in stderr
    assert len(ours(stderr)) - stderr.count("warning: ") <= 4, stderr
    assert sum(line.startswith("  /") for line in stderr.splitlines()) <= 10, stderr
    assert list((tmp_path / "run" / "checkpoints").iterdir())
    judge("too many unreadable images on two processes", 1, 1)


def test_schedulers(tmp_path, storm_folder):
    """An allocation of two tasks without ``srun`` is one process; a step of two is two."""
    job = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_NODELIST": "127.0.0.1"}
    job |= {"SLURM_JOB_NAME": "train", "MASTER_PORT": str(free_port())}
    batch = job | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    for i, variables in enumerate((job, batch, {"WORLD_SIZE": "2", "RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"})):
        process = start(pretrain(storm_folder, tmp_path / str(i), "--steps", 2), **variables)
        stderr = end(process, 60)
        assert process.returncode == 0, stderr
        assert stderr.count("it trains alone") == 1
        assert "1 process(es)" in stderr
    step = [batch | {"SLURM_STEP_ID": "0", "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
    tasks = [start(pretrain(storm_folder, tmp_path / "step", "--steps", 2), **variables) for variables in step]
    assert "2 process(es)" in "".join(end(task, 90) for task in tasks)
    assert [task.returncode for task in tasks] == [0, 0]
    judge("variables of schedulers", 4, 4)


def test_a_process_that_does_not_start(tmp_path, storm_folder):
    variables = {"SLURM_JOB_ID": "78", "SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_NODELIST": "127.0.0.1"}
    variables |= {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    variables |= {"MASTER_PORT": str(free_port()), "DMJD_TIMEOUT": "0.1"}
    process = start(pretrain(storm_folder, tmp_path / "run"), **variables)
    stderr = end(process, 60)
    assert process.returncode == 2
    assert "not all 2 processes started" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr


def test_other_commands_at_random_moments(tmp_path, straight):
    """Fine-tuning, a frozen evaluation and embedding are interrupted, then finished by the same command."""
    rng, survived = random.Random(SEED), 0
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    finetune = ["evaluate", "finetune", run, "--steps", 30, "--batch-size", 16, "--checkpoint-every", 5]
    for words in (finetune, ["evaluate", "knn", run], ["embed", run, "--out", tmp_path / "a.npy"]):
        command = [sys.executable, "-m", "dmjd", *words, "--data", "digits", "--device", "cpu"]
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            process = start([str(word) for word in command])
            time.sleep(rng.uniform(0.0, 12.0))
            process.send_signal(number)
            stderr = end(process)
            assert process.returncode in SIGNALS[number], stderr
            assert "Traceback" not in stderr, stderr
            survived += 1
        process = start([str(word) for word in command])
        stderr = end(process, 400)
        assert process.returncode == 0, stderr
    judge("signals to evaluations and embedding", 9, survived)
