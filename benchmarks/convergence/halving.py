"""Search settings by successive halving: many in short runs, the best of them in longer ones.

    OMP_NUM_THREADS=1 python benchmarks/convergence/halving.py mixed --data cifar10 --minutes 1.5 --factor 4 \
      --rounds 2 --json benchmarks/results/halving_mixed.json

The candidates are in the set ``space`` of ``convergence.py``: the mixed targets, or MAE, and random settings around
them. In every round each trains for the round's minutes with a schedule of its own, and those with the best linear
probe on held-out images go into the next, which is longer by the factor by which they become fewer. The test set is not
used: the last ones are to be compared again, with several seeds. All other options are those of ``convergence.py``.
Finished runs stay.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from convergence_sets import POINTS, variants_of

SCRIPT = Path(__file__).with_name("convergence.py")


def survivors(summary: dict[str, dict[str, Any]], keep: int) -> list[str]:
    """The names with the best linear probe on held-out images, the best first; without runs that diverged."""
    scores = {name: row["held_out"]["linear"]["mean"] for name, row in summary.items() if row["seeds"]}
    return sorted(scores, key=lambda name: -scores[name])[:keep]


def main() -> None:
    """Run the rounds, print what is left, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start", choices=("mixed", "mae"), help="what the candidates vary")
    parser.add_argument("--candidates", type=int, default=24, help=f"2 to {POINTS}")
    parser.add_argument("--minutes", type=float, default=1.5, help="training time per run in the first round")
    parser.add_argument("--factor", type=int, default=3, help="by which they become fewer, and runs longer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--blr", default="6e-3", help="base learning rate; a candidate has a factor on it")
    parser.add_argument("--out", type=Path, default=Path("runs/halving"))
    parser.add_argument("--json", type=Path, required=True)
    given, options = parser.parse_known_args()
    if not 2 <= given.candidates <= POINTS:
        parser.error(f"--candidates must be 2 to {POINTS}, got {given.candidates}")
    available = variants_of("space", False)
    names, rounds = [name for name in available if name.startswith(given.start)][: given.candidates], []
    for number in range(given.rounds):
        minutes = given.minutes * given.factor**number
        file = given.out / f"{given.start}_round{number}.json"
        words = ["space", "--clock", "calibrated", "--skip-test", "--blrs", given.blr, "--probes", "2", *options]
        words += ["--minutes", f"{minutes:g}", "--out", str(given.out), "--json", str(file), "--variants", *names]
        if subprocess.run([sys.executable, str(SCRIPT), *words]).returncode or not file.exists():
            raise SystemExit("stopped; the same command goes on")
        result = json.loads(file.read_text(encoding="utf-8"))
        rounds.append({"minutes": minutes, "summary": result["summary"]})
        names = survivors(result["summary"], max(1, len(names) // given.factor))
        print(f"after {minutes:g} minutes: {', '.join(names)}", flush=True)
    settings = {name: available[name].overrides | {"blr_factor": available[name].blr_factor} for name in names}
    content = {"rounds": rounds, "best": settings, "blr": float(given.blr)}
    content |= {"machine": result["machine"], "versions": result["versions"], "settings": result["settings"]}
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(settings, indent=1))


if __name__ == "__main__":
    main()
