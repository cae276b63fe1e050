"""The command line that all parts share."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Options:
    """Options of a part.

    Attributes:
        seconds: time limit.
        out: folder for the results.
        device: device to run on.
        pack: folder made by ``pack.py``.
        toy: run everything in small.
        case: the only case to run, of those that can run one.
    """

    seconds: float
    out: Path
    device: torch.device
    pack: Path
    toy: bool
    case: str | None


def part_options(description: str | None) -> Options:
    """Parse the command line of a part."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--pack", type=Path, required=True)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--case")
    given = parser.parse_args()
    return Options(given.seconds, given.out, torch.device(given.device), given.pack, given.toy, given.case)
