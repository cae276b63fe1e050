"""What targets and masks cost: HOG beside a histogram by one-hot bins, masks, and both as a share of a training step.

    python benchmarks/targets_masks.py --json benchmarks/results/targets_masks_cpu.json

Each side of the HOG comparison runs in a process of its own, since memory is the highest the process ever held.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dmjd
from dmjd.devices import keep_freed_memory
from dmjd.speed import bench, machine, matmul_rate, wait

BATCH, SIZE = 64, 224


def one_hot_hog(images: Tensor, cell_size: int = 8, num_bins: int = 9) -> Tensor:
    """The same histogram by a plane for every bin: [B, C, H, W] -> [B, C, H/cell, W/cell, bins] float32.

    Gradients by a fixed convolution, each pixel's magnitude scattered into its bin's plane, planes averaged by cells:
    the way HOG is usually written in PyTorch.
    """
    C = images.shape[1]
    kernel = torch.tensor([[0.0, 0, 0], [-1, 0, 1], [0, 0, 0]], device=images.device)
    weight = torch.stack([kernel, kernel.T]).unsqueeze(1).repeat(C, 1, 1, 1)  # 2C, 1, 3, 3
    gradient = F.conv2d(F.pad(images.float(), (1, 1, 1, 1), mode="replicate"), weight, groups=C)
    column, row = gradient.unflatten(1, (C, 2)).unbind(2)  # B, C, H, W each
    bins = (torch.atan2(row, column).remainder(math.pi) / math.pi * num_bins).long().clamp(max=num_bins - 1)
    magnitude = torch.hypot(row, column)
    planes = magnitude.new_zeros(*magnitude.shape, num_bins).scatter_(-1, bins.unsqueeze(-1), magnitude.unsqueeze(-1))
    planes = planes.permute(0, 1, 4, 2, 3).flatten(0, 1)  # B * C, bins, H, W
    return F.avg_pool2d(planes, cell_size).unflatten(0, images.shape[:2]).permute(0, 1, 3, 4, 2)


SIDES = {"dmjd.hog": dmjd.hog, "one-hot": one_hot_hog}


def pictures(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    smooth = torch.rand(BATCH, 3, SIZE // 8, SIZE // 8, generator=generator) * 255
    return F.interpolate(smooth, size=(SIZE, SIZE), mode="bicubic").clamp(0, 255).round().to(device)


def seconds_of(run: Callable[[], Any], device: torch.device, repeats: int = 10) -> float:
    """Median of some repeats, after warming up."""
    times = []
    for _ in range(repeats + 2):
        wait(device)
        started = time.perf_counter()
        run()
        wait(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def measure_side(side: str, device: torch.device) -> dict[str, float]:
    """Time and extra memory of one HOG side in this process."""
    images = pictures(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        SIDES[side](images)
        memory = torch.cuda.max_memory_allocated(device) - before
    else:
        SIDES[side](images[:1])  # libraries loaded
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        SIDES[side](images)
        memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        keep_freed_memory(device)  # for both sides alike
    return {"seconds": seconds_of(lambda: SIDES[side](images), device), "extra_memory_mb": memory / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.side:
        print(json.dumps(measure_side(args.side, device)))
        return
    images = pictures(device)[:8]
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))  # borders are treated differently
    difference = (dmjd.hog(images)[inner] - one_hot_hog(images)[inner]).abs()
    rounds: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(args.rounds):
        for side in SIDES:
            command = [sys.executable, __file__, "--side", side]
            answer = subprocess.run(command, capture_output=True, text=True, check=True)
            rounds[side].append(json.loads(answer.stdout))
    middle = {
        side: {key: statistics.median(r[key] for r in found) for key in found[0]} for side, found in rounds.items()
    }
    ours, theirs = middle["dmjd.hog"], middle["one-hot"]
    keys = torch.arange(1024, device=device)
    keep_freed_memory(device)
    masks = seconds_of(lambda: dmjd.disjoint_masks(1024, (14, 14), 2, 0.6, keys=keys), device)
    share = {
        precision: bench(
            dmjd.recipes.dmjd(encoder="vit_tiny_patch16", batch_size=BATCH, precision=precision), steps=10
        )["parts"]["masks and targets"]
        for precision in ("fp32", "bf16")
    }
    result = {
        "hog": {
            **middle,
            "times_faster": theirs["seconds"] / ours["seconds"],
            "share_of_memory": ours["extra_memory_mb"] / theirs["extra_memory_mb"],
            "share_of_equal_values": (difference < 1e-3).float().mean().item(),
            "batch": [BATCH, 3, SIZE, SIZE],
        },
        "masks_1024x196_k2_seconds": masks,
        "share_of_vit_tiny_step": share,
        "matmul_gflops": matmul_rate(device, torch.float32) / 1e9,
        "machine": machine(device),
        "versions": {"dmjd": dmjd.__version__, "torch": torch.__version__},
    }
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
