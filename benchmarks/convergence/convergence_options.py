"""Command line of ``convergence.py``."""

import argparse
from pathlib import Path

from convergence_jobs import Job
from convergence_sets import ENCODERS, SETS, override

PHASES = ("calibrate", "search", "train", "test", "report")


def parse(description: str | None) -> argparse.Namespace:
    """The options of a study, with ``override`` as a table."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--encoder", choices=list(ENCODERS), default="vit_lite")
    parser.add_argument("--data", default="cifar10", help="images with labels and a test part")
    parser.add_argument("--img-size", type=int, default=32, help="side in pixels")
    parser.add_argument("--teacher", help="trained model for the set distill, as for dmjd pretrain")
    parser.add_argument("--init", help="weights for the set adapt, as for dmjd pretrain")
    parser.add_argument("--out", type=Path, default=Path("runs/convergence"))
    parser.add_argument("--json", type=Path, help="result; figure and table go to the same folder")
    parser.add_argument("--encoders", type=Path, help="folder for the trained encoders in half precision")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=8.0, help="training time per run")
    length.add_argument("--epochs", type=float, help="epochs per run, instead of minutes")
    parser.add_argument("--clock", choices=("wall", "calibrated"), default="wall")
    parser.add_argument(
        "--once-share",
        type=float,
        default=0.0,
        help="part of the baseline's step that is added to the step time of every variant: what an image costs once, "
        "whatever its number of views; needs --clock calibrated",
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--repeat", nargs="+", help="variants run with all seeds, the others with one; default all")
    blrs = [1.5e-3, 3e-3, 6e-3]
    parser.add_argument("--blrs", type=float, nargs="+", default=blrs, help="candidates; one: no search")
    parser.add_argument("--search-share", type=float, default=0.25, help="length of a search run; 1: a full run")
    parser.add_argument("--probes", type=int, default=8, help="probes per run")
    parser.add_argument("--probe-train", type=int, default=5000, help="training images of the probe")
    parser.add_argument("--probe-test", type=int, default=2500, help="held-out images of the probe")
    parser.add_argument("--held-out", type=float, default=0.1, help="fraction of the training images to hold out")
    parser.add_argument("--held-out-data", help="folder of labeled images to hold out instead, e.g. a validation part")
    parser.add_argument("--label-fraction", type=float, help="fraction of the labels in the final evaluation")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--variants", nargs="+", help="from the set, or name@share; default all")
    parser.add_argument("--baseline", help="variant whose final accuracy the others must reach; default the first")
    parser.add_argument(
        "--override", type=override, nargs="+", default=[], help="settings of all runs; a variant's own win"
    )
    parser.add_argument("--slice-minutes", type=float, help="save and stop after this time")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time, each in a process of its own")
    parser.add_argument("--job", type=Job.parse, help=argparse.SUPPRESS)  # what such a process does
    parser.add_argument("--skip-test", action="store_true", help="do not evaluate on the test set")
    parser.add_argument("--until", choices=PHASES, default="report", help="the last phase")
    arguments = parser.parse_args()
    arguments.override = dict(arguments.override)
    if arguments.once_share and arguments.clock != "calibrated":
        parser.error("--once-share needs --clock calibrated")
    if not 0 <= arguments.once_share < 1:
        parser.error(f"--once-share must be at least 0 and below 1, got {arguments.once_share:g}")
    return arguments
