"""Errors of commands as one line with a cure; a real bug as a request to report it. Imports no torch."""

import errno
import itertools
import os
import platform
import re
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from dmjd import __version__
from dmjd.text import printable, without_secrets

MAX_ERROR_LINES = 10

ISSUES = "https://github.com/dmjd/dmjd/issues"

# Names of exceptions of torch and our own modules, which are not imported here.
_EXPLAINED = {"LoaderError", "LostProcessError"}

_NETWORK = {"requests", "urllib3", "httpx", "httpcore", "huggingface_hub", "aiohttp", "urllib", "socket", "ssl"}

_GPU_MEMORY = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")

_MEMORY = (
    "not enough memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "can't start new thread",
    "std::bad_alloc",
    "Caught MemoryError",
)

_OUTSIDE = r"(?<![\w./'\"-])(?<!: )"  # a word that is no part of a path or quotation, nor of what "FILE: ..." says

_OPEN_FILES = ("Too many open files", "items of ancdata")


def report_failure(error: BaseException, arguments: Sequence[str]) -> tuple[str, int]:
    """The message of an error that ended a command, and the exit code.

    Args:
        error: the error.
        arguments: those of the command, for the place of the traceback file.

    Returns:
        At most ten lines and 2; for a bug, which is what nothing here expects, two lines and 1.
    """
    explained = explain(error)
    if explained is None:
        return _shortened(_bug(error, arguments)), 1
    return _shortened(f"error: {_with_flags(explained, arguments)}"), 2


def _with_flags(message: str, arguments: Sequence[str]) -> str:
    """Name the settings that were given as flags by their flags: ``--batch-size`` for ``batch_size``."""
    for at, argument in enumerate(arguments):
        flag, _, value = argument.partition("=")
        if flag.startswith("--"):
            value = value or next(iter(arguments[at + 1 :]), "")
            name = re.escape(flag[2:].replace("-", "_"))
            # A plain word such as "epochs" is the setting where the value that was given follows, or a demand on it.
            word = rf"{_OUTSIDE}{name}(?= {re.escape(value)}(?!\S))|^{name}(?= must\b| takes\b)"
            full = rf"{_OUTSIDE}{name}(?![\w/'\"=-])(?: \({re.escape(flag)}\))?"
            message = re.sub(full if "_" in name else word, flag, message)
    return message


def explain(error: BaseException) -> str | None:
    """What an expected error means and what to do about it; None for an unexpected one."""
    names = {kind.__name__ for kind in type(error).__mro__}
    text = str(error)
    if isinstance(error, ValueError | FloatingPointError) or names & _EXPLAINED:  # the second: training diverged
        return text or type(error).__name__
    if "OutOfMemoryError" in names or any(words in text for words in _GPU_MEMORY):
        return (
            f"out of GPU memory; use a smaller --batch-size or encoder, or for pretrain --accumulate or "
            f"--grad-checkpointing ({_first_line(text)})"
        )
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in text for w in _MEMORY)):
        return "out of memory; use a smaller --batch-size, --num-workers or encoder, or for pretrain --accumulate"
    if isinstance(error, RuntimeError) and any(words in text for words in _OPEN_FILES):
        return _explain_errno(OSError(errno.EMFILE, ""))
    if "AcceleratorError" in names or text.startswith("CUDA error"):
        return f"the GPU reports an error: {_first_line(text)}"
    if type(error).__module__.split(".")[0] in _NETWORK or isinstance(error, ConnectionError | TimeoutError):
        return f"the network does not answer as it should: {_first_line(text)}; check the connection and try again"
    if isinstance(error, OSError):
        return _explain_errno(error)
    if isinstance(error, ImportError) and ("failed to map segment" in text or any(w in text for w in _MEMORY)):
        return "out of memory while a library was loaded; raise the limit (ulimit -v, or the memory of the job)"
    if isinstance(error, ImportError):
        return f"a package is missing or broken: {_first_line(text)}; install dmjd again, in a fresh environment"
    return None


def _explain_errno(error: OSError) -> str:
    path = f"{error.filename}: " if error.filename not in (None, "") else ""
    cures = {
        errno.ENOSPC: "no space left on the disk; free some and repeat the command. What was saved is untouched",
        errno.EDQUOT: "the disk quota is used up; free some and repeat the command. What was saved is untouched",
        errno.EMFILE: "too many open files; raise the limit with ulimit -n, or lower --num-workers",
        errno.ENFILE: "the system has too many open files; lower --num-workers",
        errno.ENOMEM: "out of memory; use a smaller --batch-size or --num-workers",
        errno.EAGAIN: "the system cannot start another process; lower --num-workers, or raise ulimit -u",
        errno.EACCES: "permission denied; change its permissions, or give another path",
        errno.EPERM: "permission denied; change its permissions, or give another path",
        errno.EROFS: "the file system is read-only; give another path",
        errno.EIO: "the disk or terminal reports an input/output error; what was saved is untouched",
        errno.ESTALE: "the network folder is gone; mount it again and repeat the command",
        errno.ENAMETOOLONG: "the name is too long; give a shorter one",
        errno.ELOOP: "a symbolic link leads to itself; remove it, or give another path",
    }
    text = cures.get(error.errno or 0) or error.strerror or _first_line(str(error)) or type(error).__name__
    return path + text


def _bug(error: BaseException, arguments: Sequence[str]) -> str:
    """Write the traceback to a file; returns what to print."""
    kind = type(error).__name__
    what = f"error: {kind}: {_first_line(str(error))}\nThis is a bug in dmjd; please report it at {ISSUES}"
    name = f"error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    lines = [
        f"dmjd {__version__}, Python {platform.python_version()}, {platform.platform()}",
        f"dmjd {' '.join(arguments)}",
        "",
        *traceback.format_exception(error),
    ]
    lines = [without_secrets(line) for line in lines]
    for folder in (_run_folder(arguments), Path(tempfile.gettempdir())):
        if folder is not None:
            try:
                (folder / name).write_text("\n".join(lines), encoding="utf-8", errors="backslashreplace")
            except OSError:
                continue
            return f"{what} with the file {folder / name}"
    return f"{what}\n{lines[-1]}"


def _run_folder(arguments: Sequence[str]) -> Path | None:
    """The run folder that a command names, if it exists."""
    named = [value for flag, value in itertools.pairwise(arguments) if flag == "--out"]
    named += [a.removeprefix("--out=") for a in arguments if a.startswith("--out=")]
    for text in [*named, *(a for a in arguments if not a.startswith("-"))]:
        try:
            folder = Path(text).expanduser()
            if (folder / "config.json").is_file():
                return folder
        except (OSError, ValueError, RuntimeError):  # not a path at all
            continue
    return None


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no message")[:300]


def _shortened(message: str) -> str:
    """At most ten lines, printable. Of several processes all but the first give one line, with their number."""
    lines = printable(message, keep="\n").splitlines()
    rank, processes = _rank()
    if rank > 0:
        return f"process {rank + 1} of {processes}: {lines[0]}"
    if len(lines) > MAX_ERROR_LINES:
        lines = [*lines[: MAX_ERROR_LINES - 1], f"... and {len(lines) - MAX_ERROR_LINES + 1} more lines"]
    return "\n".join(lines)


def _rank() -> tuple[int, int]:
    """Rank of this process and number of processes, as set by torchrun or srun."""
    for rank, processes, marker in (
        ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"),
        ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID"),
    ):
        values = [os.environ.get(name, "") for name in (rank, processes)]
        if marker in os.environ and all(value.isdecimal() for value in values):
            return int(values[0]), int(values[1])
    return 0, 1
