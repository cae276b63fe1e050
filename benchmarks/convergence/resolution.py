"""Small images first: 128 pixels and then 224 for the last tenth of the time, against 224 throughout, in equal time.

    python benchmarks/convergence/resolution.py --data grocery --minutes 6 --seeds 3 --teacher local-dir:FOLDER

A small ViT with 16-pixel tokens and the recipe ``distill``, whose teacher sees images of the encoder's size; without a
teacher pixels for masked and HOG for visible tokens, Muon. The seconds of a step are measured first, the fastest of
alternating rounds; runs then have as many steps as fit into the minutes, so other load on the machine changes no
result. The second part starts from the first by ``--init RUN --img-size 224 --init-decoder``. kNN and linear probe on
the test images, at the size that a run ended with. Finished runs are not repeated.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from convergence_sets import ENCODERS, shuffled

import dmjd
from dmjd.config.pretrain import PretrainConfig
from dmjd.pretraining.bench import machine

sys.path.insert(0, str(Path(__file__).parents[1]))
from labels import labels_of

SMALL, LARGE, LAST = 128, 224, 0.1

ROUNDS, TIMED_STEPS = 3, 10

# name: (pixels, share of the time) of each part
WAYS = {
    "224 pixels": [(LARGE, 1.0)],
    "128, then 224 pixels": [(SMALL, 1.0 - LAST), (LARGE, LAST)],
    "128 pixels": [(SMALL, 1.0)],
}


SETTINGS = ("encoder", "minutes", "seeds", "blr", "batch_size", "precision")


class Resolution:
    """The study; every finished way and seed is one JSON file.

    Args:
        given: the command line.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.out = given, given.out.resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.seconds = self.calibrate()

    def config(self, size: int, seed: int) -> PretrainConfig:
        """Settings that all parts share."""
        mixed = {"mim_target": "pixel", "vis_target": "hog", "teacher_size": None}
        distilled = {"teacher": self.given.teacher, "teacher_size": (size,)}
        return dmjd.recipes.distill(
            data=str(Path(self.given.data).resolve()),
            img_size=size,
            **ENCODERS[self.given.encoder],
            **distilled if self.given.teacher else mixed,
            blr=self.given.blr,
            batch_size=self.given.batch_size,
            precision=self.given.precision,
            seed=seed,
            eval_every=0,
            final_eval=False,
            report=False,
        )

    def calibrate(self) -> dict[str, float]:
        """Pixels -> seconds of a step with its loader; measured once and saved."""
        file = self.out / "calibration.json"
        if not file.exists():
            rates = {size: [] for size in (SMALL, LARGE)}
            for _ in range(ROUNDS):
                for size, found in rates.items():
                    found.append(dmjd.bench(self.config(size, 0), TIMED_STEPS)["images_per_s"]["with_loader"])
            seconds = {str(size): self.given.batch_size / max(found) for size, found in rates.items()}
            file.write_text(json.dumps(seconds) + "\n", encoding="utf-8")
        return json.loads(file.read_text(encoding="utf-8"))

    def train(self, way: str, seed: int) -> dict[str, Any]:
        """Train a way to its end and test it."""
        name = f"{way.replace(',', '').replace(' ', '_')}_seed{seed}"
        file, start, steps = self.out / f"{name}.json", None, []
        if file.exists():
            return json.loads(file.read_text(encoding="utf-8"))
        for part, (size, share) in enumerate(WAYS[way]):
            run = self.out / f"{name}_{part}"
            count = max(1, round(60 * self.given.minutes * share / self.seconds[str(size)]))
            config = self.config(size, seed).replace(out=str(run), steps=count)
            if start is not None:
                config = config.replace(init=str(start), from_init=None, init_decoder=True)
            if not dmjd.pretrain(config).finished:
                raise SystemExit("stopped; the same command goes on")
            start, steps = run, [*steps, count]
        results = dmjd.evaluation.evaluate_all(
            {"knn": {}, "linear": {}},
            start,
            data=self.given.data,
            labels=labels_of(self.given.data),
            precision="bf16" if self.given.precision == "bf16" else "fp32",
            seeds=1,
        )
        scores = {task: {who: r[who]["top1"] for who in ("result", "random_init")} for task, r in results.items()}
        record = {"way": way, "seed": seed, "steps": steps, **scores}
        file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        return record

    def run(self) -> None:
        """All ways and seeds in shuffled order; JSON and table."""
        given = self.given
        order = shuffled([(way, seed) for way in WAYS for seed in range(given.seeds)])
        runs = sorted((self.train(*one) for one in order), key=lambda run: (list(WAYS).index(run["way"]), run["seed"]))
        content = {
            "settings": {name: getattr(given, name) for name in SETTINGS},
            "data": Path(given.data).name,
            "seconds_per_step": self.seconds,
            "runs": runs,
            "machine": machine(torch.device("cpu")),
            "versions": {"dmjd": dmjd.__version__, "torch": torch.__version__},
        }
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(table(runs))


def table(runs: list[dict[str, Any]]) -> str:
    """Means and standard deviations over the seeds, in percent."""
    lines = ["| way | steps | kNN | linear | random weights: kNN, linear |", "|---|---|---|---|---|"]
    for way in dict.fromkeys(run["way"] for run in runs):
        own = [run for run in runs if run["way"] == way]
        cells = [way, " + ".join(map(str, own[0]["steps"]))]
        cells += [spread([run[task]["result"] for run in own]) for task in ("knn", "linear")]
        cells.append(", ".join(spread([run[task]["random_init"] for run in own]) for task in ("knn", "linear")))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean and standard deviation in percent; one value alone."""
    percent = [100 * value for value in values]
    deviation = f" ± {statistics.stdev(percent):.1f}" if len(percent) > 1 else ""
    return f"{statistics.mean(percent):.1f}{deviation}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train and test images in folders of classes")
    parser.add_argument("--out", type=Path, default=Path("runs/resolution"))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/resolution.json"))
    parser.add_argument("--encoder", default="vit16_lite", choices=("vit16", "vit16_lite"))
    parser.add_argument("--teacher", help="a trained model, timm's name or local-dir:FOLDER")
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--blr", type=float, default=3e-3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", default="bf16")
    Resolution(parser.parse_args()).run()
