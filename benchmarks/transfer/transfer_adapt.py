"""Weights from other images, adapted to CamVid without labels: the recipe ``adapt``, plain continuation, and scratch.

    OMP_NUM_THREADS=1 python benchmarks/transfer/transfer_adapt.py --init runs/student --data camvid --minutes 2

Every way trains on the 367 street images in equal time: the seconds of a step are measured first, the fastest of
alternating rounds, and runs have as many steps as fit into the minutes, so other load changes no result. Then a linear
layer on the frozen features is trained for semantic segmentation; mean IoU on the 233 test images, beside the weights
as they were and random ones. Finished runs are not repeated.
"""

import argparse
import json
import random
import statistics
from pathlib import Path
from typing import Any

import torch

import dmjd
from dmjd.config.pretrain import PretrainConfig
from dmjd.pretraining.bench import machine

SIZE, BATCH = (192, 256), 16

ROUNDS, TIMED_STEPS = 3, 5

NEW = {"mim_target": "pixel", "vis_target": "hog", "mask_ratio": 0.75, "block_size": 1, "optimizer": "muon"}

# name: (recipe, settings)
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "scratch": ("dmjd", NEW | {"blr": 3e-3, "encoder": "vit_tiny_patch16"}),
    "continue": ("dmjd", NEW | {"blr": 3e-3}),
    "adapt": ("adapt", {}),
    "adapt, Muon": ("adapt", {"optimizer": "muon", "blr": 3e-3}),
    "adapt, without the copy": ("adapt", {"vis_target": "hog"}),
}

START = "the weights as they were"

TASK = {"decoder": "linear", "freeze": True, "steps": 100, "batch_size": 8, "blr": 1e-2, "ignore_index": 11}


class Adaptation:
    """The study; every finished way and seed is one JSON file.

    Args:
        given: the command line.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.out = given, given.out.resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.seconds = self.calibrate()

    def config(self, way: str, seed: int) -> PretrainConfig:
        """Settings of a way."""
        recipe, settings = WAYS[way]
        init = {} if way == "scratch" else {"init": str(self.given.init.resolve())}
        return dmjd.recipes.get_recipe(recipe)(
            data=str((self.given.data / "train" / "images").resolve()),
            img_size=SIZE,
            batch_size=BATCH,
            clip_grad=3.0,
            precision=self.given.precision,
            seed=seed,
            eval_every=0,
            final_eval=False,
            **settings | init,
        )

    def calibrate(self) -> dict[str, float]:
        """Way -> seconds of a step with its loader; measured once and saved."""
        file = self.out / "calibration.json"
        if not file.exists():
            rates: dict[str, list[float]] = {way: [] for way in self.given.ways}
            for _ in range(ROUNDS):
                for way, found in rates.items():
                    found.append(dmjd.bench(self.config(way, 0), TIMED_STEPS)["images_per_s"]["with_loader"])
            file.write_text(json.dumps({way: BATCH / max(found) for way, found in rates.items()}) + "\n", "utf-8")
        return json.loads(file.read_text("utf-8"))

    def score(self, way: str, seed: int) -> dict[str, Any]:
        """Train a way to its end and test it; the weights as they were are only tested."""
        name = f"{way.replace(',', '').replace(' ', '_')}_seed{seed}"
        file, run, steps = self.out / f"{name}.json", self.given.init, 0
        if file.exists():
            return json.loads(file.read_text("utf-8"))
        if way != START:
            run, steps = self.out / name, max(1, round(60 * self.given.minutes / self.seconds[way]))
            if not dmjd.pretrain(self.config(way, seed).replace(out=str(run), steps=steps)).finished:
                raise SystemExit("stopped; the same command goes on")
        result = dmjd.evaluate(
            "segmentation",
            run,
            data=self.given.data,
            out=self.out / f"{name}_test",
            img_size=SIZE,
            seed=seed,
            precision=self.given.precision,
            num_evals=0,
            num_images=1,
            **TASK,
        )
        record = {"way": way, "seed": seed, "steps": steps}
        record |= {"miou": result["result"]["miou"], "random": result["random_init"]["miou"]}
        file.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        return record

    def run(self) -> None:
        """All ways and seeds in shuffled order; JSON and table."""
        given = self.given
        order = [(way, seed) for way in (START, *given.ways) for seed in range(given.seeds)]
        runs = {one: self.score(*one) for one in random.Random(0).sample(order, len(order))}
        content = {
            "settings": {name: getattr(given, name) for name in ("minutes", "seeds", "precision")} | {"task": TASK},
            "seconds_per_step": self.seconds,
            "runs": [runs[one] for one in order],
            "machine": machine(torch.device("cpu")),
            "versions": {"dmjd": dmjd.__version__, "torch": torch.__version__},
        }
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        print(table(content["runs"]))


def table(runs: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds, in percent."""
    lines = ["| way | steps | mean IoU |", "|---|---|---|"]
    rows = {way: [r for r in runs if r["way"] == way] for way in dict.fromkeys(run["way"] for run in runs)}
    for way, own in rows.items():
        lines.append(f"| {way} | {own[0]['steps']} | {spread([run['miou'] for run in own])} |")
    lines.append(f"| random weights | 0 | {spread([run['random'] for run in rows[START]])} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean and standard deviation in percent; one value alone."""
    percent = [100 * value for value in values]
    deviation = f" ± {statistics.stdev(percent):.1f}" if len(percent) > 1 else ""
    return f"{statistics.mean(percent):.1f}{deviation}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", type=Path, required=True, help="run folder or encoder file of a ViT-tiny, patch 16")
    parser.add_argument("--data", type=Path, required=True, help="CamVid")
    parser.add_argument("--out", type=Path, default=Path("runs/transfer_adapt"))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/transfer_adapt.json"))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--precision", default="bf16")
    Adaptation(parser.parse_args()).run()
