"""``dmjd ...``: a thin skin over the public functions, with the same names. Imports no torch before a command runs."""

import difflib
import os
import sys
from collections.abc import Callable, Sequence

from dmjd import __version__
from dmjd.cli.encoder import _show, run_compare, run_embed, run_export
from dmjd.cli.evaluate import _evaluate
from dmjd.cli.pretrain import _bench, _pretrain

MAX_ERROR_LINES = 10


def _short(message: str) -> str:
    lines = message.splitlines()
    if len(lines) > MAX_ERROR_LINES:
        lines = [*lines[: MAX_ERROR_LINES - 1], f"... and {len(lines) - MAX_ERROR_LINES + 1} more lines"]
    return "\n".join(lines)


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "pretrain": (_pretrain, "train an encoder on unlabeled images"),
    "evaluate": (_evaluate, "kNN, linear probe, fine-tuning, segmentation, detection"),
    "show": (_show, "images of masks, targets, reconstructions, attention, neighbors"),
    "embed": (run_embed, "features of every image as a table"),
    "export": (run_export, "the encoder for timm, ONNX or as one file"),
    "compare": (run_compare, "evaluations of several runs side by side"),
    "bench": (_bench, "speed, memory and share of this machine's own limit"),
}


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0; 2 for a mistake the user can mend (one short message on stderr, no traceback); 130 after Ctrl-C outside
        of training, which saves and returns 0.
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
        if given[0] not in COMMANDS:
            near = difflib.get_close_matches(given[0], COMMANDS, n=1, cutoff=0.0)
            raise ValueError(f"unknown command '{given[0]}'; did you mean '{near[0]}'? Commands: {', '.join(COMMANDS)}")
        COMMANDS[given[0]][0](given[1:])
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except (ValueError, FloatingPointError) as error:  # the latter: training diverged
        print(_short(f"error: {error}"), file=sys.stderr)
        return 2
    return 0
