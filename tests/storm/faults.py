"""Run a command once for each of its writes, end it there, run it again, and compare with an undisturbed run.

``python faults.py kill|full SETUP.json`` prints one JSON line for each case. A write is a file opened for writing,
renamed or deleted, or a folder made, below the work folder; the interpreter's audit events name each of them, so no
code of the package is replaced. "kill" sends SIGKILL before the write. "full" lets no file grow from the write on
(RLIMIT_FSIZE), as on a full disk: files are still made, renamed and deleted, but writing into them fails.

Each case is a fork of this process, which has imported everything, so that a case takes a second.
"""

import contextlib
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from dmjd.cli.main import main

# Imported before the forks; the command line imports them when it needs them.
SLOW_IMPORTS = [
    "dmjd.evaluation.supervised.finetune",
    "dmjd.evaluation.supervised.segmentation",
    "dmjd.figures.show",
    "dmjd.interop.embed",
    "dmjd.interop.export",
    "dmjd.pretraining.run",
    "matplotlib.pyplot",
    "torch.utils.tensorboard",
]

VOLATILE = {"seconds", "images_per_s", "data_wait", "cost", "peak_memory", "memory_gb"}  # differ between equal runs


class WriteCounter:
    """An audit hook that counts the writes below a folder and acts before the n-th."""

    def __init__(self, folder: Path, number: int | None, act: Callable[[], None]) -> None:
        self._folder, self._number, self._act = str(folder), number, act
        self.seen: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            path = arguments[0]
        else:
            return
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str | os.PathLike) or not str(path).startswith(self._folder):
            return
        self.seen.append(f"{event} {str(path)[len(self._folder) + 1 :]}")
        if len(self.seen) == self._number:
            self._act()


def kill() -> None:
    """End this process as the kernel's out-of-memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk() -> None:
    """Let no file grow any more."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def run(
    command: Sequence[str], folder: Path, number: int | None, act: Callable[[], None]
) -> tuple[int, str, list[str]]:
    """Run a command in a fork, disturbed before its ``number``-th write; returns exit code, stderr, the writes."""
    reading, writing = os.pipe()  # not files: a full disk must not silence the messages
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.dup2(writing, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        counter = WriteCounter(folder, number, act)
        sys.addaudithook(counter)
        code = 1
        try:
            code = main(list(command))
        except BaseException:
            traceback.print_exc()
        finally:
            os.write(2, b"\n\0" + json.dumps(counter.seen).encode())
            os._exit(code)
    os.close(writing)
    with open(reading, "rb") as pipe:
        output, _, seen = pipe.read().partition(b"\0")
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, output.decode(errors="replace").strip(), json.loads(seen) if seen else []


def content(folder: Path) -> dict[str, Any]:
    """What the files below a folder hold, without times; figures and logs count by their presence."""
    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.is_dir() or "events.out" in name or name.endswith(".lock"):
            continue
        if file.suffix == ".safetensors":
            found[name] = {key: value.tolist() for key, value in load_file(file).items()}
        elif file.suffix in (".json", ".jsonl"):
            found[name] = [without_times(json.loads(line)) for line in _texts(file)]
        elif file.suffix in (".parquet", ".npy"):
            found[name] = file.read_bytes()
        else:
            found[name] = file.stat().st_size > 0
    return found


def _texts(file: Path) -> Iterator[str]:
    text = file.read_text()
    yield from text.splitlines() if file.suffix == ".jsonl" else [text]


def without_times(value: Any) -> Any:
    """A copy of decoded JSON without the entries that differ between equal runs."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in VOLATILE}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def differences(expected: dict[str, Any], got: dict[str, Any]) -> list[str]:
    """Names of files that are missing, left over or differ."""
    names = expected.keys() | got.keys()
    return sorted(n for n in names if n not in got or n not in expected or expected[n] != got[n])


def cases(setup: dict[str, Any], mode: str) -> Iterator[dict[str, Any]]:
    """One record for each disturbed run: where, exit code, messages, and what differs after the second run."""
    work = Path(setup["work"])
    command = [str(a) for a in setup["command"]]
    start = work.with_name(work.name + "_start")
    shutil.rmtree(start, ignore_errors=True)
    shutil.copytree(work, start)

    def reset() -> None:
        shutil.rmtree(work)
        shutil.copytree(start, work)

    code, messages, writes = run(command, work, None, kill)
    assert code == 0, messages
    expected = content(work)
    # TensorBoard opens its file again for every flush: one of these writes stands for all.
    chosen = [n for n, write in enumerate(writes, 1) if "events.out" not in write or write not in writes[: n - 1]]
    for number in chosen[:: setup.get("every", 1)]:
        reset()
        code, messages, _ = run(command, work, number, kill if mode == "kill" else fill_disk)
        again, later, _ = run(command, work, None, kill)
        got: dict[str, Any] = {}
        with contextlib.suppress(Exception):  # a damaged file: everything differs
            got = content(work)
        yield {
            "number": number,
            "write": writes[number - 1],
            "code": code,
            "messages": messages,
            "again": again,
            "later": later,
            "differ": differences(expected, got) if got else ["unreadable"],
        }


if __name__ == "__main__":
    for module in SLOW_IMPORTS:
        importlib.import_module(module)
    for case in cases(json.loads(Path(sys.argv[2]).read_text()), sys.argv[1]):
        print(json.dumps(case), flush=True)
