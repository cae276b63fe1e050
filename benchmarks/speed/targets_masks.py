"""Cost of targets and masks: HOG and a one-hot implementation of it, masks, and both as a fraction of a training step.

    python benchmarks/speed/targets_masks.py --json benchmarks/results/targets_masks_cpu.json

Each side of the HOG comparison runs in its own process, several times in alternation, on the same bytes mapped from a
file. Its memory is the rise of the process's peak above its current use; the peak is reset first, so that earlier
allocations do not hide it. "kept" is the allocator setting of a training run (``keep_freed_memory``).
``--only`` measures one part and keeps the others in the JSON file.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dmjd
from dmjd.engine.device import keep_freed_memory
from dmjd.pretraining.bench import bench, machine, wait

BATCH, SIZE = 64, 224
PARTS = ("hog", "masks", "fp32", "bf16")  # the last two: fraction of a ViT-tiny step


def one_hot_hog(images: Tensor, cell_size: int = 8, num_bins: int = 9) -> Tensor:
    """The same histogram with one plane per bin: [B, C, H, W] -> [B, C, H/cell, W/cell, bins] float32.

    The usual way to write HOG in PyTorch: gradients by a fixed convolution, each pixel's magnitude scattered into the
    plane of its bin, planes averaged over cells.
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


# name: (histogram, of bytes or of float32, memory kept)
SIDES: dict[str, tuple[Callable[[Tensor], Tensor], torch.dtype, bool]] = {
    "dmjd.hog": (dmjd.hog, torch.uint8, True),
    "one-hot, kept": (one_hot_hog, torch.uint8, True),
    "dmjd.hog, not kept": (dmjd.hog, torch.uint8, False),
    "one-hot": (one_hot_hog, torch.uint8, False),
    "dmjd.hog of float32": (dmjd.hog, torch.float32, True),
}


def make_images() -> Tensor:
    """[64, 3, 224, 224] uint8: smooth noise."""
    generator = torch.Generator().manual_seed(0)
    smooth = torch.rand(BATCH, 3, SIZE // 8, SIZE // 8, generator=generator) * 255
    return F.interpolate(smooth, size=(SIZE, SIZE), mode="bicubic").clamp(0, 255).round().to(torch.uint8)


def seconds_of(run: Callable[[], Any], device: torch.device, repeats: int = 10) -> float:
    """Median of several repeats, after a warm-up."""
    times = []
    for _ in range(repeats + 2):
        wait(device)
        started = time.perf_counter()
        run()
        wait(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def measure_side(side: str, file: str, device: torch.device) -> dict[str, float]:
    """Time and extra memory of one HOG side in this process."""
    histogram, dtype, kept = SIDES[side]
    if kept:
        keep_freed_memory(device)
    images = torch.from_file(file, shared=False, size=BATCH * 3 * SIZE * SIZE, dtype=torch.uint8)
    images = images.view(BATCH, 3, SIZE, SIZE).to(device, dtype)
    histogram(images[:1, :, :32, :32].float())  # loads libraries; our table for uint8 is not built yet
    for image in images:
        image.amax()  # the file's pages are in memory
    memory = extra_memory(lambda: histogram(images), device)
    return {"seconds": seconds_of(lambda: histogram(images), device), "extra_memory_mb": memory / 1e6}


def extra_memory(run: Callable[[], Any], device: torch.device) -> int:
    """Bytes by which peak memory rises while it runs: of tensors on a GPU, of the process on a CPU (Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to current use
    before = _status("VmHWM")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def draw_masks(keys: Tensor) -> None:
    """Masks of 196 tokens, two views."""
    dmjd.disjoint_masks(len(keys), (14, 14), 2, 0.6, keys=keys)


def compare_hog(rounds: int, device: torch.device) -> dict[str, Any]:
    """Medians of all sides, measured in alternation; fails if their values differ."""
    images = make_images()
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))  # borders are treated differently
    ours, theirs = (hog(images[:8].to(device))[inner] for hog in (dmjd.hog, one_hot_hog))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    measured: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.NamedTemporaryFile(suffix=".bytes") as file:
        images.numpy().tofile(file.name)
        for _ in range(rounds):
            for side in SIDES:
                command = [sys.executable, __file__, "--side", side, "--file", file.name]
                process = subprocess.run(command, capture_output=True, text=True, check=True)
                measured[side].append(json.loads(process.stdout))
    sides = {side: {key: statistics.median(r[key] for r in runs) for key in runs[0]} for side, runs in measured.items()}
    best = sides["dmjd.hog"]
    return {
        "sides": sides,
        "times_faster": {s: sides[s]["seconds"] / best["seconds"] for s in ("one-hot, kept", "one-hot")},
        "share_of_memory": best["extra_memory_mb"] / sides["one-hot, kept"]["extra_memory_mb"],
        "share_of_memory_not_kept": sides["dmjd.hog, not kept"]["extra_memory_mb"]
        / sides["one-hot"]["extra_memory_mb"],
        "batch": [BATCH, 3, SIZE, SIZE],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="measured ViT-tiny steps")
    parser.add_argument("--only", choices=PARTS, help="measure this part only")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.side:
        print(json.dumps(measure_side(args.side, args.file, device)))
        return
    result = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    for part in (args.only,) if args.only else PARTS:
        if part == "hog":
            result[part] = compare_hog(args.rounds, device)
            continue
        keep_freed_memory(device)
        if part == "masks":
            result["masks_1024x196_k2_seconds"] = seconds_of(
                partial(draw_masks, torch.arange(1024, device=device)), device
            )
        else:
            config = dmjd.recipes.dmjd(encoder="vit_tiny_patch16", batch_size=BATCH, precision=part)
            parts = bench(config, steps=args.steps)["parts"]
            result.setdefault("share_of_vit_tiny_step", {})[part] = parts["masks and targets"]
    result["machine"] = machine(device)
    result["versions"] = {"dmjd": dmjd.__version__, "torch": torch.__version__}
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
