"""Gain of pre-training for segmentation and detection: an encoder pre-trained on the same images without labels.

    OMP_NUM_THREADS=1 python benchmarks/transfer/transfer_dense.py camvid --data DATA/camvid --out runs/transfer
    OMP_NUM_THREADS=1 python benchmarks/transfer/transfer_dense.py bccd --data DATA/bccd --out runs/transfer

CamVid at 240 x 180 (mean IoU on the 233 test images), BCCD at 320 x 240 (AP50 on the 72 test images). One encoder
is pre-trained on the training images: with the settings of ``folder``, with ``--recipe mae`` as MAE with those of them
that it has, too, with ``--recipe dmjd`` as in the paper. Then, for each seed, one model is trained from it and one from
random weights, by the same schedule. Lengths are in steps, so a busy machine changes no result. The script can be
resumed. It writes ``benchmarks/results/transfer_SET_RECIPE.json`` and prints a table.
"""

import argparse
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transfer_record import portable, training_seconds, write_record

import dmjd
from dmjd.engine.device import pick_device
from dmjd.pretraining.bench import machine

PRETRAIN: dict[str, Any] = {
    "encoder": "vit_tiny_patch16",
    "depth": (6,),
    "decoder_dim": 64,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "clip_grad": 3.0,
    "eval_every": 0,
    "final_eval": False,
}
# MAE with the settings of ``folder`` that do not belong to its targets.
MAE: dict[str, Any] = {"optimizer": "muon", "mask_ratio": 0.85, "crop_scale": (0.8, 1.0), "class_token": False}
SETS: dict[str, dict[str, Any]] = {
    "camvid": {
        "task": "segmentation",
        "score": "miou",
        "images": "train/images",
        "pretrain": {"img_size": (192, 240), "batch_size": 8},
        "of_recipe": {"dmjd": {"blr": 1.2e-2, "theta": 4.0}, "folder": {}, "mae": MAE},
        "pretrain_steps": 1000,
        "steps": 300,
        "options": {"img_size": (180, 240), "ignore_index": 11, "batch_size": 8, "blr": 1.6e-2, "decoder_dim": 64},
    },
    "bccd": {
        "task": "detection",
        "score": "ap50",
        "images": "train",
        "pretrain": {"img_size": (256, 320), "batch_size": 4},
        "of_recipe": {"dmjd": {"blr": 2.4e-2, "theta": 4.0}, "folder": {}, "mae": MAE},
        "pretrain_steps": 1000,
        "steps": 150,
        "options": {"img_size": (240, 320), "batch_size": 4, "blr": 2.6e-2, "decoder_dim": 64},
    },
}
STARTS = ("result", "random_init")


def main() -> None:
    """Pre-train once, compare for every seed, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--recipe", choices=("folder", "mae", "dmjd"), default="folder")
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pretrain-steps", type=int, help="default the set's own")
    parser.add_argument("--steps", type=int, help="of each training on the task; default the set's own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    config = SETS[given.set]
    settings = PRETRAIN | config["pretrain"] | config["of_recipe"][given.recipe]
    run = given.out / f"{given.set}_{given.recipe}"
    shared = {"precision": given.precision, "device": given.device}
    pretrained = dmjd.pretrain(
        dmjd.recipes.get_recipe(given.recipe)(
            data=str(given.data / config["images"]),
            out=str(run),
            steps=given.pretrain_steps or config["pretrain_steps"],
            **shared,
            **settings,
        )
    )
    if not pretrained.finished:
        return
    task = {"data": given.data, "steps": given.steps or config["steps"], "num_evals": 0, "num_images": 3}
    try:
        results = [
            dmjd.evaluate(config["task"], run, seed=seed, **task, **shared, **config["options"]) for seed in given.seeds
        ]
    except dmjd.evaluation.Stopped:
        return
    content = summary(config, given, {"steps": pretrained.step} | settings, run, results)
    write_record(given.json or Path("benchmarks/results") / f"transfer_{given.set}_{given.recipe}.json", content)
    print_table(given.set, config["score"], content)


def summary(
    config: Mapping[str, Any],
    given: argparse.Namespace,
    pretraining: dict[str, Any],
    run: Path,
    results: list[dict[str, Any]],
) -> dict[str, Any]:
    """Scores of every seed, their mean and standard deviation, and their provenance."""
    score = config["score"]
    scores = {start: [result[start][score] for result in results] for start in STARTS}
    gains = [a - b for a, b in zip(*scores.values(), strict=True)]
    mean_std = {
        name: {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else None}
        for name, values in (scores | {"gain": gains}).items()
    }
    training = [training_seconds(run / result[start]["folder"]) for result in results for start in STARTS]
    return {
        "task": config["task"],
        "score": score,
        "seeds": given.seeds,
        "scores": scores,
        "spread": mean_std,
        "pretraining": {"recipe": given.recipe, "seconds": training_seconds(run)} | pretraining,
        "training_seconds": sum(training),
        "configuration": results[0]["configuration"],
        "data": {k: portable(results[0]["data"])[k] for k in ("fingerprint", "num_train", "num_test", "classes")},
        "machine": machine(pick_device(given.device)),
        "versions": results[0]["versions"],
        "results": [{start: result[start] for start in STARTS} for result in results],
    }


def print_table(name: str, score: str, content: Mapping[str, Any]) -> None:
    """One row per initialization, in percent."""
    print(f"{name}, {score} in percent, seeds {content['seeds']}")
    for start, label in (*zip(STARTS, ("pre-trained", "from scratch"), strict=True), ("gain", "gain")):
        mean, std = content["spread"][start]["mean"], content["spread"][start]["std"]
        print(f"  {label:<13} {100 * mean:6.1f}" + (f" +- {100 * std:.1f}" if std is not None else ""))


if __name__ == "__main__":
    main()
