"""How cost scales with the number of images, the number of views, and the number of steps.

    python benchmarks/speed/scaling.py --json benchmarks/results/scaling_cpu.json --figure docs/figures/scaling.png

``--only images`` (or views, or memory) measures one part and keeps the others in the JSON file.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

import dmjd
from dmjd.data.sources.base import Source
from dmjd.data.train_loader import TrainLoader
from dmjd.engine.device import keep_freed_memory
from dmjd.pretraining.bench import bench, machine

SIZES = (1_000, 10_000, 100_000, 1_000_000)
VIEWS = (1, 2, 3, 4)
PARTS = ("images", "views", "memory")
ENCODER = {"encoder": "vit_tiny_patch4", "img_size": (32,), "batch_size": 16}


class Generated(Source):
    """Small images generated on access. They have two sizes, so that the loader does not cache them all."""

    def __init__(self, count: int) -> None:
        self.name, self.count = f"generated {count}", count

    def __len__(self) -> int:
        return self.count

    def stored(self, index: int) -> np.ndarray:
        """One of 256 images, as an array."""
        return np.full((40 + index % 2, 40, 3), index % 256, np.uint8)

    def describe(self, index: int) -> str:
        """Its number."""
        return str(index)


def loader_sizes(turns: int = 5, batches: int = 30) -> list[dict[str, float]]:
    """The loader alone, for each data set size: seconds to the first batch, and images/s.

    Sizes alternate over several rounds; the best round counts.
    """
    sizes: list[dict[str, float]] = []
    streams = []
    for count in SIZES:
        started = time.perf_counter()
        loader = TrainLoader(Generated(count), img_size=(32, 32), batch_size=64, num_workers=0)
        streams.append(loader.batches(0))
        next(streams[-1])
        sizes.append({"count": count, "first_batch_s": time.perf_counter() - started, "images_per_s": 0.0})
    for _ in range(turns):
        for size, stream in zip(sizes, streams, strict=True):
            next(stream)  # draws the epoch order again: the loader caches two orders, and four sets alternate
            started = time.perf_counter()
            for _ in range(batches):
                next(stream)
            rate = 64 * batches / (time.perf_counter() - started)
            size["images_per_s"] = max(size["images_per_s"], rate)
    return sizes


def step_views(device: torch.device, turns: int = 2) -> list[dict[str, float]]:
    """Images/s of a training step for each number of views, the best of alternating rounds."""
    keep_freed_memory(device)
    best = dict.fromkeys(VIEWS, 0.0)
    for _ in range(turns):
        for k in VIEWS:
            config = dmjd.recipes.dmjd(num_views=k, mask_ratio=0.75, block_size=1, **ENCODER)
            best[k] = max(best[k], bench(config, steps=2)["images_per_s"]["step"])
    return [{"num_views": k, "images_per_s": rate} for k, rate in best.items()]


def memory_over_steps(steps: int) -> list[tuple[int, float]]:
    """(step, resident MB) samples of a digits run with checkpoints, taken from another process."""
    samples: list[tuple[int, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "dmjd", "pretrain", "digits", "--out", f"{folder}/run", "--steps", str(steps)]
        command += ["--no-final-eval", "--eval-every", "0", "--checkpoint-every", "250"]
        run = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while run.poll() is None:
            pages = Path(f"/proc/{run.pid}/statm").read_text().split()
            if step := last_step(Path(folder, "run", "metrics.jsonl")):
                samples.append((step, int(pages[1]) * resource.getpagesize() / 1e6))
            time.sleep(0.5)
    if run.returncode:
        sys.exit(f"the run ended with {run.returncode}")
    return samples[:-1]


def last_step(metrics: Path) -> int:
    """The last logged step of a run; 0 if there is none yet."""
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    return json.loads(whole[-1]).get("step", 0) if whole else 0


def draw(result: dict[str, Any], file: Path) -> None:
    """Draw one panel per part."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    sizes = result["images"]
    axes[0].semilogx([s["count"] for s in sizes], [1e3 / s["images_per_s"] for s in sizes], "o-")
    axes[0].set(xlabel="images in the set", ylabel="loader, ms per image")
    views = result["views"]
    axes[1].plot([v["num_views"] for v in views], [1e3 / v["images_per_s"] for v in views], "o-")
    axes[1].set(xlabel="views per image", ylabel="step, ms per image", xticks=VIEWS)
    axes[2].plot(*zip(*result["memory"], strict=True))
    axes[2].set(xlabel="training steps", ylabel="resident memory, MB")
    for axis in axes:
        axis.set_ylim(0, 1.15 * axis.get_ylim()[1])
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--steps", type=int, default=2000, help="steps of the run whose memory is measured")
    parser.add_argument("--only", choices=PARTS, help="measure this part only")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    for part in (args.only,) if args.only else PARTS:
        if part == "images":
            result[part] = loader_sizes()
        elif part == "views":
            result[part] = step_views(device)
        else:
            result[part], result["steps"] = memory_over_steps(args.steps), args.steps
    result["machine"] = machine(device)
    result["versions"] = {"dmjd": dmjd.__version__, "torch": torch.__version__}
    print(json.dumps({name: value for name, value in result.items() if name != "memory"}, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.figure and set(PARTS) <= set(result):
        draw(result, args.figure)


if __name__ == "__main__":
    main()
