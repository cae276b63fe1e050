"""Study: MAE and HOG with colors on ViT-tiny with 4-pixel tokens, CIFAR-10, equal time, three seeds.

It is ``benchmarks/convergence/convergence.py`` with settings for a card: runs of several seeds and learning rates share
it, because one small model does not fill it. The time of a step is measured alone, and gives each run the same time,
which follows from the seconds of the part. One visit is enough. The images are JPEG-coded.

What the test set says comes last, if there is time. ``study_jobs.json`` holds the finished runs if there was not enough
time for all.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from options import Options, part_options
from record import Clock

SCRIPT = Path(__file__).parents[1] / "convergence" / "convergence.py"

VARIANTS = ("mae", "mae_best", "hog_color")

BLRS = ("4e-4", "1.2e-3", "3.6e-3")

SEEDS, SEARCH_SHARE, PARALLEL = 3, 0.25, 6

# Beside the steps: a start of the program for the split and the calibration, and for each of two waves of processes.
FIRST_SECONDS, WAVE_SECONDS = 45, 35

GAIN = 1.6  # of all runs at a time over one alone; on an H200 six runs of 49 s, each alone, took 150 s

SPARE = 25  # seconds to end

TEST_SECONDS = 60


def minutes_of(seconds: float) -> float:
    """Minutes of a run, alone, so that search and training fit into the seconds of this part."""
    runs = len(VARIANTS) * (SEEDS + len(BLRS) * SEARCH_SHARE)
    left = seconds - FIRST_SECONDS - 2 * WAVE_SECONDS - SPARE
    return max(0.1, round(left * GAIN / runs / 60, 2))


def command(options: Options, out: Path) -> list[str]:
    """The study without the test set."""
    words = [sys.executable, str(SCRIPT), "card", "--clock", "calibrated", "--device", options.device.type]
    words += ["--data", str(options.pack / "cifar10"), "--out", str(out), "--json", str(options.out / "study.json")]
    words += ["--variants", *VARIANTS, "--parallel", str(PARALLEL), "--seeds", str(SEEDS), "--probes", "4"]
    words += ["--blrs", *BLRS, "--search-share", str(SEARCH_SHARE)]
    if options.toy:
        words += ["--minutes", "0.05", "--encoder", "vit_lite", "--batch-size", "32"]
        return [*words, "--probe-train", "200", "--probe-test", "100"]
    words += ["--minutes", str(minutes_of(options.seconds)), "--encoder", "vit", "--batch-size", "512"]
    return [*words, "--probe-train", "10000", "--probe-test", "5000"]


def within(seconds: float, words: list[str]) -> bool:
    """Run a command; whether it ended well in time."""
    process = subprocess.Popen(words, start_new_session=True)
    try:
        return process.wait(timeout=max(1.0, seconds)) == 0
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return False


def run(options: Options) -> int:
    """The study, then its test; returns the exit code."""
    clock = Clock(options.seconds)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        if not within(clock.left - 5, [*command(options, out), "--skip-test"]):
            jobs = {file.name: file.read_text(encoding="utf-8") for file in sorted(out.glob("jobs/*.json*"))}
            (options.out / "study_jobs.json").write_text(json.dumps(jobs, indent=1) + "\n", encoding="utf-8")
            return 1
        if options.toy or clock.left > TEST_SECONDS:
            within(clock.left, command(options, out))
    file = options.out / "study.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    head = {"date": date.today().isoformat(), "complete": all("test" in run for run in content["runs"])}
    file.write_text(json.dumps(head | content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run(part_options(__doc__)))
