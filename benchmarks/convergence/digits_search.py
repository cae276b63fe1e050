"""Compare settings of the digits recipe at equal wall-clock time.

    python benchmarks/convergence/digits_search.py --minutes 1 --out runs/search \
      --json benchmarks/results/digits_search.json

Variants run one after the other in shuffled order, so a drifting machine favors none. Finished ones are not repeated.
Each ends with kNN and a linear probe on the 2,000 test images.
"""

import argparse
import json
import os
import platform
import random
from pathlib import Path
from typing import Any

import torch

import dmjd

VARIANTS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "theta 1": {"theta": 1.0},
    "batch 256, same learning rate": {"batch_size": 256, "blr": 1.5e-3},
    "one view": {"num_views": 1, "blr": 1.2e-2},
    "no crops": {"crop_scale": (1.0, 1.0)},
    "pixel target": {"target": "pixel"},
    "reconstruction only": {"vis": False},
    "distillation only": {"mim": False, "theta": 1.0},
}


def main() -> None:
    """Run the variants and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=Path("runs/search"))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/digits_search.json"))
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    arguments = parser.parse_args()
    order = list(arguments.variants)
    random.Random(0).shuffle(order)
    rows = {}
    for name in order:
        out = arguments.out / name.replace(" ", "_").replace(",", "")
        config = dmjd.recipes.digits(out=str(out), minutes=arguments.minutes, eval_every=0, **VARIANTS[name])
        result = dmjd.pretrain(config)
        rows[name] = {"overrides": VARIANTS[name], "steps": result.step} | {
            task: {who: scores[who]["top1"] for who in ("result", "random_init", "raw_pixels")}
            for task, scores in result.evaluation.items()
        }
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    versions = {"dmjd": dmjd.__version__, "torch": torch.__version__, "python": platform.python_version()}
    content = {"minutes": arguments.minutes, "machine": machine, "versions": versions, "variants": rows}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["linear"]["result"]):
        scores = f"kNN {100 * row['knn']['result']:5.1f}  linear {100 * row['linear']['result']:5.1f}"
        print(f"{name:32s} {row['steps']:6d} steps  {scores}")


if __name__ == "__main__":
    main()
