"""Fine-tuning with few labels: pre-trained encoders of several recipes and seeds, and random weights.

    python benchmarks/transfer/low_shot.py --data grocery --labels-per-class 10 \\
      distill=runs/distill_0 distill=runs/distill_1 mixed=runs/mixed_0 mixed=runs/mixed_1

Runs of one name are seeds of one recipe; the first has seed 0, and each seed draws other labels, heads and orders. The
base learning rate of each recipe, and of random weights, is the best of the candidates on the val part with seed 0. The
test part is used once per seed. Lengths are in steps, so a busy machine changes no result. Finished parts are read from
their files.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from transfer_record import write_record

import dmjd
from dmjd.engine.device import pick_device
from dmjd.evaluation.results import versions
from dmjd.pretraining.bench import machine

sys.path.insert(0, str(Path(__file__).parents[1]))
from labels import labels_of

# Too few images and steps for mixup and heavy augmentation.
FINETUNE: dict[str, Any] = {"rand_augment": 5.0, "erase": 0.0, "mixup": 0.0, "cutmix": 0.0, "eval_every": 0.0}

RANDOM = "random weights"


class LowShotStudy:
    """The study.

    Args:
        given: the command line.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.runs: dict[str, list[Path]] = {}
        for text in given.runs:
            name, _, run = text.partition("=")
            self.runs.setdefault(name, []).append(Path(run))

    def accuracies(self, name: str, seed: int, blr: float, split: str) -> dict[str, float]:
        """Top-1 accuracy of a recipe's encoder and of random weights after fine-tuning, 0 to 1."""
        given = self.given
        out = given.out / f"{name}_seed{seed}_{blr:g}_{split}"
        file = out / "accuracy.json"
        if not file.exists():
            result = dmjd.evaluate(
                "finetune",
                self.runs[name][seed],
                data=given.data,
                labels=labels_of(given.data),
                labels_per_class=given.labels_per_class,
                split=split,
                out=str(out),
                steps=given.steps,
                batch_size=given.batch_size,
                blr=blr,
                layer_decay=given.layer_decay,
                seed=seed,
                seeds=1,
                precision=given.precision,
                device=given.device,
                **FINETUNE,
            )
            write_record(file, {name: result["result"]["top1"], RANDOM: result["random_init"]["top1"]})
        return json.loads(file.read_text(encoding="utf-8"))

    def run(self) -> dict[str, Any]:
        """Base learning rate and accuracies of each row; random weights are tested beside the first recipe."""
        chosen: dict[str, tuple[float, float]] = {}  # row -> (accuracy on val, base learning rate)
        for name in self.runs:
            for blr in self.given.blrs:
                for row, accuracy in self.accuracies(name, 0, blr, "val").items():
                    chosen[row] = max(chosen.get(row, (0.0, blr)), (accuracy, blr))
        tested = {}
        for row, (_, blr) in chosen.items():
            name = row if row in self.runs else next(iter(self.runs))
            seeds = range(len(self.runs[name]))
            tested[row] = {"blr": blr, "top1": [self.accuracies(name, seed, blr, "test")[row] for seed in seeds]}
        return tested


def table(tested: dict[str, dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds, in percent."""
    lines = ["| start | blr | seeds | fine-tuned, test |", "|---|---|---|---|"]
    for row, one in tested.items():
        values = [100 * value for value in one["top1"]]
        deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        lines.append(f"| {row} | {one['blr']:g} | {len(values)} | {statistics.mean(values):.1f}{deviation} |")
    return "\n".join(lines)


def main() -> None:
    """Run the study, write the JSON file, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN", help="a name and a run folder or encoder file")
    parser.add_argument("--data", required=True, help="images with labels, and parts val and test")
    parser.add_argument("--out", type=Path, default=Path("runs/low_shot"))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/low_shot.json"))
    parser.add_argument("--labels-per-class", type=int, default=10)
    parser.add_argument("--steps", type=int, default=400, help="of each fine-tuning")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--blrs", type=float, nargs="+", default=[2e-3, 8e-3], help="candidates")
    parser.add_argument("--layer-decay", type=float, default=0.75)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    study = LowShotStudy(given)
    try:
        tested = study.run()
    except dmjd.evaluation.Stopped:
        raise SystemExit(0) from None
    names = ("labels_per_class", "steps", "batch_size", "blrs", "layer_decay", "precision")
    content = {
        "settings": {name: getattr(given, name) for name in names} | FINETUNE,
        "data": Path(given.data).name,
        "runs": {name: len(runs) for name, runs in study.runs.items()},
        "tested": tested,
        "machine": machine(pick_device(given.device)),
        "versions": versions(),
    }
    write_record(given.json, content)
    print(table(tested))


if __name__ == "__main__":
    main()
