"""``dmjd ...``: the public functions as commands of the same names. Torch is not imported before a command runs."""

import os
import sys
from collections.abc import Callable, Sequence

from dmjd import __version__
from dmjd.cli.encoder import run_compare, run_embed, run_export, run_show
from dmjd.cli.evaluate import run_evaluate
from dmjd.cli.pretrain import run_bench, run_pretrain
from dmjd.config.checks import shown
from dmjd.suggest import did_you_mean
from dmjd.text import printable

MAX_ERROR_LINES = 10

COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "pretrain": (run_pretrain, "train an encoder on unlabeled images"),
    "evaluate": (run_evaluate, "kNN, linear probe, fine-tuning, segmentation, detection"),
    "show": (run_show, "figures of masks, targets, reconstructions, attention, neighbors"),
    "embed": (run_embed, "features of every image as a table"),
    "export": (run_export, "the encoder for timm, for ONNX or as one file"),
    "compare": (run_compare, "evaluations of several runs side by side"),
    "bench": (run_bench, "training speed, memory and MFU on this machine"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0; 2 for a user error (a short message on stderr, no traceback); 130 after Ctrl-C outside of training. Training
        saves its state and returns 0.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if given[0] == "--version":
        print(__version__)
        return 0
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages for tensors; PyTorch reads it when it starts
    try:
        _run(*given)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        return 130
    except (ValueError, FloatingPointError) as error:  # the latter: training diverged
        print(printable(_shortened(f"error: {error}"), keep="\n"), file=sys.stderr)
        return 2
    return 0


def _run(command: str, *arguments: str) -> None:
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
            "dmjd COMMAND --help lists its flags; dmjd --version prints the version",
            "",
            "example:",
            "  dmjd pretrain digits --out runs/first",
        ]
    )


def _shortened(message: str) -> str:
    lines = message.splitlines()
    if len(lines) > MAX_ERROR_LINES:
        lines = [*lines[: MAX_ERROR_LINES - 1], f"... and {len(lines) - MAX_ERROR_LINES + 1} more lines"]
    return "\n".join(lines)
