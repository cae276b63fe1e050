"""What pre-training is worth for segmentation and detection: an encoder pre-trained on a set's own pictures, no labels.

    python benchmarks/transfer_dense.py camvid --data DATA/camvid --out runs/transfer
    python benchmarks/transfer_dense.py bccd --data DATA/bccd --out runs/transfer

CamVid at 240 x 180 (mean IoU on the 233 test pictures), BCCD at 320 x 240 (AP50 on the 72 test pictures). One encoder
is pre-trained on the training pictures; then, for each seed, a model is trained from it and one from random weights by
the same schedule. Run again, it goes on where it stopped. Writes ``benchmarks/results/transfer_SET.json`` and prints a
table.
"""

import argparse
import json
import os
import platform
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import dmjd

ENCODER: dict[str, Any] = {"encoder": "conv_vit_tiny_patch16", "embed_dim": (32, 64, 128), "depth": (1, 1, 6)}
SETS: dict[str, dict[str, Any]] = {
    "camvid": {
        "task": "segmentation",
        "score": "miou",
        "pictures": "train/images",
        "img_size": (180, 240),
        "frame": (192, 240),  # what the patch divides
        "options": {"ignore_index": 11, "batch_size": 8, "decoder_dim": 64},
    },
    "bccd": {
        "task": "detection",
        "score": "ap50",
        "pictures": "train",
        "img_size": (240, 320),
        "frame": (240, 320),
        "options": {"batch_size": 4, "decoder_dim": 64},
    },
}
STARTS = ("result", "random_init")


def main() -> None:
    """Pre-train once, compare for every seed, write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pretrain-minutes", type=float, default=10.0)
    parser.add_argument("--steps", type=int, default=300, help="of each training on the task")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--img-size", type=int, nargs=2, metavar=("H", "W"), help="instead of the set's own")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    config = SETS[given.set]
    run = given.out / given.set
    pretrained = dmjd.pretrain(pretraining(config, given, run))
    if not pretrained.finished:
        return
    size = tuple(given.img_size or config["img_size"])
    results = []
    for seed in given.seeds:
        options = {"data": given.data, "steps": given.steps, "img_size": size, "seed": seed, "device": given.device}
        results.append(dmjd.evaluate(config["task"], run, **options, **config["options"]))
    content = summary(config, given, pretrained.step, results)
    file = given.json or Path("benchmarks/results") / f"transfer_{given.set}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n")
    print_table(given.set, config["score"], content)


def pretraining(config: Mapping[str, Any], given: argparse.Namespace, run: Path) -> dmjd.PretrainConfig:
    """The run on the set's training pictures."""
    frame = config["frame"]
    if given.img_size:
        frame = tuple(-(-side // 16) * 16 for side in given.img_size)
    return dmjd.recipes.folder(
        data=str(given.data / config["pictures"]),
        out=str(run),
        img_size=frame,
        minutes=given.pretrain_minutes,
        batch_size=16,
        blr=3e-3,
        eval_every=0,
        final_eval=False,
        device=given.device,
        **ENCODER,
    )


def summary(
    config: Mapping[str, Any], given: argparse.Namespace, steps: int, results: list[dict[str, Any]]
) -> dict[str, Any]:
    """Scores of every seed, their mean and spread, and where they come from."""
    score = config["score"]
    scores = {start: [result[start][score] for result in results] for start in STARTS}
    gains = [a - b for a, b in zip(*scores.values(), strict=True)]
    spread = {
        name: {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else None}
        for name, values in (scores | {"gain": gains}).items()
    }
    return {
        "task": config["task"],
        "score": score,
        "seeds": given.seeds,
        "scores": scores,
        "spread": spread,
        "pretraining": {"minutes": given.pretrain_minutes, "steps": steps, **{k: str(v) for k, v in ENCODER.items()}},
        "configuration": results[0]["configuration"],
        "data": {k: results[0]["data"][k] for k in ("fingerprint", "num_train", "num_test", "classes")},
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() and given.device != "cpu" else None,
        },
        "versions": results[0]["versions"],
        "results": results,
    }


def print_table(name: str, score: str, content: Mapping[str, Any]) -> None:
    """One row for each start, in percent."""
    print(f"{name}, {score} in percent, seeds {content['seeds']}")
    for start, label in (*zip(STARTS, ("pre-trained", "from scratch"), strict=True), ("gain", "gain")):
        mean, std = content["spread"][start]["mean"], content["spread"][start]["std"]
        print(f"  {label:<13} {100 * mean:6.1f}" + (f" +- {100 * std:.1f}" if std is not None else ""))


if __name__ == "__main__":
    main()
