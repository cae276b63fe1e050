"""``dmjd ...``: the public functions as commands of the same names. Torch is not imported before a command runs."""

import errno
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TextIO

from dmjd import __version__
from dmjd.cli.encoder import run_compare, run_embed, run_export, run_report, run_show
from dmjd.cli.evaluate import run_evaluate
from dmjd.cli.failures import report_failure
from dmjd.cli.inspection import run_inspect
from dmjd.cli.interruption import Interruption
from dmjd.cli.pretrain import run_bench, run_plan, run_pretrain
from dmjd.config.checks import shown
from dmjd.streams import unfailing_standard_streams
from dmjd.suggest import did_you_mean
from dmjd.text import printable
from dmjd.warning import DMJDWarning

COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "pretrain": (run_pretrain, "train an encoder on unlabeled images"),
    "evaluate": (run_evaluate, "kNN, linear probe, fine-tuning, segmentation, detection"),
    "show": (run_show, "figures of a run: masks, attention, neighbors, duplicates, clusters, ..."),
    "embed": (run_embed, "features of every image as a table"),
    "export": (run_export, "the encoder for timm, transformers, PyTorch, ONNX or the hub"),
    "compare": (run_compare, "evaluations of several runs side by side"),
    "report": (run_report, "runs as one HTML file: curves, scores, figures, a map of the images"),
    "inspect": (run_inspect, "what your images are: formats, sizes, unreadable ones, classes, reading speed"),
    "plan": (run_plan, "what to run on your images in a given time, and what to expect"),
    "bench": (run_bench, "training speed, memory and MFU on this machine"),
}

_RESUMED = (["pretrain"], ["evaluate"], ["embed"])  # commands that keep what they have done


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0; 2 for an error that the user or the machine can fix (a short message on stderr, no traceback); 1 for a bug,
        whose traceback is written to a file; 128 plus the number of the signal after Ctrl-C, SIGTERM or SIGHUP outside
        of training (130 for Ctrl-C). Training saves its state and returns 0.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what MPS lacks runs on the CPU, with a warning
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages for tensors; PyTorch reads it when it starts
    with (
        Interruption(ends_process=arguments is None) as interruption,
        unfailing_standard_streams() as (stdout, stderr),
        warnings.catch_warnings(),
    ):
        warnings.showwarning = _show_warning
        try:
            try:
                _run(*given)
                code = 0
            finally:
                interruption.end()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 2
        except BaseException as error:
            # After a signal any error may be its consequence: an import that was interrupted, for example.
            if interruption.number or isinstance(error, KeyboardInterrupt):
                resumes = "; the same command resumes from the last checkpoint" if given[:1] in _RESUMED else ""
                print(f"interrupted{resumes}", file=stderr)
                code = interruption.exit_code
            else:
                message, code = report_failure(error, given)
                print(message, file=stderr)
        stdout.flush()
        if (failed := stdout.error) is not None and failed.errno not in (errno.EPIPE, errno.EBADF):
            print(f"error: standard output cannot be written: {failed.strerror}", file=stderr)
            code = code or 2
        stdout.give_up()
        stderr.give_up()
    return code


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning of ours without its place in the code, once a machine."""
    if not issubclass(category, DMJDWarning):
        text = warnings.formatwarning(message, category, filename, lineno, line)
        print(text, end="", file=sys.stderr if file is None else file)
    elif os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"warning: {printable(message)}", file=sys.stderr)


def _run(command: str = "--help", *arguments: str) -> None:
    if command in ("-h", "--help", "help"):
        print(_overview())
        return
    if command == "--version":
        print(__version__)
        return
    if command not in COMMANDS:
        hint = did_you_mean(command, COMMANDS)
        raise ValueError(f"unknown command {shown(command)}{hint} Commands: {', '.join(COMMANDS)}")
    COMMANDS[command][0](arguments)


def _overview() -> str:
    lines = [f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            f"dmjd {__version__}: pre-train vision encoders on your own unlabeled images",
            "",
            "usage: dmjd COMMAND [flags]",
            "",
            *lines,
            "",
            "dmjd COMMAND --help lists its flags; dmjd --version prints the version.",
            "dmjd pretrain folder --help has the defaults for your own images.",
            "",
            "examples:",
            "  dmjd pretrain folder --data ~/images --out runs/mine",
            "  dmjd pretrain digits --out runs/first",
        ]
    )
