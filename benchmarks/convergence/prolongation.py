"""Runs that are prolonged twice (``--schedule wsd``) against runs that had their length from the beginning.

    python benchmarks/convergence/prolongation.py --data cifar10 --minutes 2 --seeds 3

Lengths are one, two and four times the minutes. The seconds of a step are measured first; runs then have as many steps
as fit into the minutes, so other load on the machine changes no result. Each seed trains one run with wsd, prolonged
twice, and a run with a cosine for each length. One run with wsd (of the first seed) has the greatest length from the
beginning: its encoder must be equal bit for bit. kNN and linear probe on the test images. Steps in parentheses are all
that were trained up to that length, with the cooldowns that were left. Finished runs are not repeated.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from convergence_sets import ENCODERS, shuffled
from convergence_variant import SMALL_IMAGES
from resolution import spread

import dmjd
from dmjd.config.pretrain import PretrainConfig
from dmjd.pretraining.bench import machine

sys.path.insert(0, str(Path(__file__).parents[1]))
from labels import labels_of

LENGTHS = (1, 2, 4)  # times the minutes

ROUNDS, TIMED_STEPS = 3, 20

SETTINGS = (
    "encoder",
    "minutes",
    "seeds",
    "blr",
    "batch_size",
    "precision",
    "cooldown",
    "warmup_steps",
    "labels_per_class",
)


class Prolongation:
    """The study; every result is one JSON file.

    Args:
        given: the command line.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.out = given, given.out.resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.seconds = self.calibrate()

    def config(self, schedule: str, seed: int) -> PretrainConfig:
        """Settings of the runs of a schedule, without their length."""
        given = self.given
        path = Path(given.data)
        own = {"cooldown": given.cooldown, "warmup_steps": given.warmup_steps} if schedule == "wsd" else {}
        return dmjd.recipes.dmjd(
            data=str(path.resolve()) if path.exists() else given.data,
            **{"img_size": 32, "clip_grad": 3.0} | ENCODERS[given.encoder] | SMALL_IMAGES | own,
            schedule=schedule,
            blr=given.blr,
            batch_size=given.batch_size,
            precision=given.precision,
            device=given.device,
            seed=seed,
            eval_every=0,
            final_eval=False,
        )

    def calibrate(self) -> float:
        """Seconds of a step with its loader, the fastest of several rounds; measured once and saved."""
        file = self.out / "calibration.json"
        if not file.exists():
            config = self.config("cosine", 0)
            rates = [dmjd.bench(config, TIMED_STEPS)["images_per_s"]["with_loader"] for _ in range(ROUNDS)]
            file.write_text(json.dumps(self.given.batch_size / max(rates)) + "\n", encoding="utf-8")
        return json.loads(file.read_text(encoding="utf-8"))

    def steps(self, length: int) -> int:
        """The steps that fit into a length."""
        return round(60 * self.given.minutes * length / self.seconds)

    def measure(self, way: str, schedule: str, seed: int, length: int, run: Path) -> dict[str, Any]:
        """Train a run, or prolong it, to a length, and test its encoder."""
        file = self.out / f"{way}_seed{seed}_{length}.json"
        if file.exists():
            return json.loads(file.read_text(encoding="utf-8"))
        steps = self.steps(length)
        if not dmjd.pretrain(self.config(schedule, seed).replace(out=str(run), steps=steps)).finished:
            raise SystemExit("stopped; the same command goes on")
        tested = dmjd.evaluation.evaluate_all(
            {"knn": {}, "linear": {}},
            run,
            data=self.given.data,
            labels=labels_of(self.given.data),
            precision="bf16" if self.given.precision == "bf16" else "fp32",
            labels_per_class=self.given.labels_per_class,
            seeds=1,
        )
        scores = {task: {who: r[who]["top1"] for who in ("result", "random_init")} for task, r in tested.items()}
        left = [json.loads((b / "config.json").read_text("utf-8"))["steps"] for b in run.glob("branches/step-*")]
        began = [int(b.name.removeprefix("step-")) for b in run.glob("branches/step-*")]
        record = {"way": way, "seed": seed, "length": length, "steps": steps, **scores}
        record["trained"] = steps + sum(left) - sum(began)
        file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        return record

    def job(self, way: str, seed: int, length: int | None) -> list[dict[str, Any]]:
        """The results of a run at a length, or at each of them if it is prolonged."""
        name = f"{way}_seed{seed}" + (f"_{length}" if length is not None else "")
        schedule = "cosine" if way == "cosine" else "wsd"
        lengths = LENGTHS if length is None else (length,)
        return [self.measure(way, schedule, seed, each, self.out / name) for each in lengths]

    def run(self) -> None:
        """All runs in shuffled order; JSON and table."""
        given, last = self.given, LENGTHS[-1]
        jobs: list[tuple[str, int, int | None]] = [("wsd", seed, None) for seed in range(given.seeds)]
        jobs += [("cosine", seed, length) for seed in range(given.seeds) for length in LENGTHS]
        jobs.append(("straight", 0, last))
        results = [one for job in shuffled(jobs) for one in self.job(*job)]
        results.sort(key=lambda r: (r["length"], r["way"], r["seed"]))
        files = [self.out / name / "encoder.safetensors" for name in ("wsd_seed0", f"straight_seed0_{last}")]
        content = {
            "settings": {name: getattr(given, name) for name in SETTINGS},
            "data": Path(given.data).name,
            "seconds_per_step": self.seconds,
            "prolonged_equals_straight": files[0].read_bytes() == files[1].read_bytes(),
            "results": results,
            "machine": machine(torch.device("cpu")),
            "versions": {"dmjd": dmjd.__version__, "torch": torch.__version__},
        }
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(table(results))
        print(f"\nprolonged twice, equal to the straight run bit for bit: {content['prolonged_equals_straight']}")


def table(results: list[dict[str, Any]]) -> str:
    """Means and standard deviations over the seeds, in percent."""
    lines = ["| run | steps (trained) | kNN | linear | random weights: kNN, linear |", "|---|---|---|---|---|"]
    names = {"wsd": "wsd, prolonged", "straight": "wsd, straight", "cosine": "cosine, straight"}
    for length, way in dict.fromkeys((one["length"], one["way"]) for one in results):
        own = [one for one in results if (one["length"], one["way"]) == (length, way)]
        cells = [f"{names[way]}, {length} x", f"{own[0]['steps']} ({own[0]['trained']})"]
        cells += [spread([one[task]["result"] for one in own]) for task in ("knn", "linear")]
        cells.append(", ".join(spread([one[task]["random_init"] for one in own]) for task in ("knn", "linear")))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10", help="images with labels and a test part")
    parser.add_argument("--out", type=Path, default=Path("runs/prolongation"))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/prolongation.json"))
    parser.add_argument("--encoder", default="vit_lite", choices=("vit_lite", "conv_lite", "vit", "conv"))
    parser.add_argument("--minutes", type=float, default=2.0, help="the shortest length")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--blr", type=float, default=3e-3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--cooldown", type=float, default=0.2)
    parser.add_argument("--warmup-steps", type=int, default=200)
    parser.add_argument("--labels-per-class", type=int, help="training images with labels; default all")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--device", default="auto")
    Prolongation(parser.parse_args()).run()
