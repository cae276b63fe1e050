"""Training speed and memory of this library and of others, on this machine.

    pip install -r benchmarks/requirements.txt
    python benchmarks/speed/throughput.py --json benchmarks/results/throughput_cpu.json
    python benchmarks/speed/throughput.py --json benchmarks/results/throughput_cpu.json --rounds 0 \
      --figure docs/figures/throughput.png                # only draws the results in the file

Each measurement runs in its own process, in shuffled order, over several rounds. The same process also measures the
machine's matrix-multiply throughput. ``+ kept`` means that the other library runs with our memory allocator setting
(:func:`dmjd.engine.device.keep_freed_memory`), which it does not use by default. Measurements already in the JSON file
are not repeated, so an interrupted comparison can be resumed. With ``--minutes 8`` no measurement starts after eight
minutes.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["THP_MEM_ALLOC_ENABLE"] = "1" if "--kept" in sys.argv else "0"  # read when torch starts

import torch
from peers import IMG_SIZE, DenseReference, LightlyMAE, dmjd_model, hugging_face_mae, mae_model

from dmjd.engine.device import SMALL_BLOCK, keep_freed_memory
from dmjd.engine.optim import reserve_state
from dmjd.pretraining.bench import machine, matmul_rate, peak_memory, wait
from dmjd.rng import image_keys

# side: (comparison, batch on a CPU, ours)
SIDES = {
    "dmjd": ("ConvViT-B, DMJD", 8, True),
    "dmjd, activation checkpointing": ("ConvViT-B, DMJD", 8, True),
    "dense reference": ("ConvViT-B, DMJD", 8, False),
    "dmjd's mae": ("ViT-B, MAE", 16, True),
    "transformers ViTMAE": ("ViT-B, MAE", 16, False),
    "lightly MAE": ("ViT-B, MAE", 16, False),
}
COLORS = {"dmjd": "tab:blue", "other": "tab:gray", "kept": "lightgray"}
# Necessary GFLOP per image and step: visible cells in the convolution stages, all tokens in every decoder block
USEFUL_GFLOP = {"ConvViT-B, DMJD": 237.0, "ViT-B, MAE": 58.7}


def make_step(side: str, batch: int, device: torch.device, precision: str, compiled: bool) -> Callable[[], None]:
    """A training step of a side: random images, new masks in every step."""
    torch.manual_seed(0)
    raw = torch.randint(0, 256, (batch, 3, IMG_SIZE, IMG_SIZE), device=device).float()
    images = (raw / 255 - 0.45) / 0.225
    index, count = torch.arange(batch), iter(range(10**9))
    if side == "transformers ViTMAE":
        module, inputs = hugging_face_mae(), lambda: (images,)
    elif side == "lightly MAE":
        module, inputs = LightlyMAE(), lambda: (images,)
    else:
        module = mae_model() if side == "dmjd's mae" else dmjd_model()
        if side.endswith("checkpointing"):
            module.set_grad_checkpointing()
            keep_freed_memory(device, up_to=SMALL_BLOCK)  # as a training run does
        dense = side == "dense reference"
        model = DenseReference(module) if dense else module

        def inputs() -> tuple[Any, ...]:
            keys = image_keys(0, torch.full_like(index, next(count)), index).to(device)
            return (images, raw, keys) if dense else (images, raw, None, keys)

        module = model
    module = module.to(device).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
    if SIDES[side][2]:
        reserve_state(optimizer)  # as our engine does
    run = torch.compile(module) if compiled else module

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            out = run(*inputs())
        loss = out["loss"] if isinstance(out, dict) else out
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(side: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one side in this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.kept:
        keep_freed_memory(device)
    batch = args.batch_size or SIDES[side][1]
    step = make_step(side, batch, device, args.precision, args.compile)
    for _ in range(args.warmup):
        step()
    seconds = []
    for _ in range(args.steps):
        wait(device)
        started = time.perf_counter()
        step()
        wait(device)
        seconds.append(time.perf_counter() - started)
    memory = peak_memory(device)
    rate = matmul_rate(device, torch.bfloat16 if args.precision == "bf16" else torch.float32)
    return {
        "images_per_s": batch / statistics.median(seconds),
        "seconds": seconds,
        "peak_memory_gb": memory / 1e9,
        "matmul_gflops": rate / 1e9,
        "batch_size": batch,
    }


def versions() -> dict[str, str]:
    """Versions of the compared packages."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for name in ("dmjd", "torch", "timm", "transformers", "lightly"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def rows_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per side and precision: medians over the rounds, and images/s of every round."""
    rows = []
    for name, rounds in sorted(result["measurements"].items()):
        if not rounds:
            continue
        precision, side, kept = name.split(" | ")
        comparison, _, ours = SIDES[side]
        median = {key: statistics.median(r[key] for r in rounds) for key in ("images_per_s", "matmul_gflops")}
        rows.append(
            {
                "comparison": comparison,
                "label": side if ours or kept != "kept" else f"{side} + kept",
                "kind": "dmjd" if ours else "kept" if kept == "kept" else "other",
                "precision": precision,
                "rates": [r["images_per_s"] for r in rounds],
                "mfu": statistics.median(
                    r["images_per_s"] * USEFUL_GFLOP[comparison] / r["matmul_gflops"] for r in rounds
                ),
                "memory": statistics.median(r["peak_memory_gb"] for r in rounds),
                **median,
            }
        )
    return rows


def summarize(rows: list[dict[str, Any]]) -> list[str]:
    """The table, in Markdown."""
    lines = [
        "| comparison | side | precision | images/s (lowest to highest) | matmul throughput | MFU | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        speed = f"{row['images_per_s']:.2f} ({min(row['rates']):.2f} to {max(row['rates']):.2f})"
        cells = (row["comparison"], row["label"], row["precision"], speed, f"{row['matmul_gflops']:.0f} GFLOP/s")
        lines.append(f"| {' | '.join(cells)} | {100 * row['mfu']:.0f} % | {row['memory']:.1f} GB |")
    return lines


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Bar charts of images/s (rounds as dots) and of memory, one row of panels per comparison."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(USEFUL_GFLOP), 4, figsize=(12, 5.2), layout="constrained", sharey="row")
    for line, comparison in zip(axes, USEFUL_GFLOP, strict=True):
        for start, precision in ((0, "fp32"), (2, "bf16")):
            shown = [r for r in rows if (r["comparison"], r["precision"]) == (comparison, precision)]
            shown.sort(key=lambda row: (row["kind"] == "dmjd", row["label"]))
            colors, labels = [COLORS[row["kind"]] for row in shown], [row["label"] for row in shown]
            for axis, key in ((line[start], "images_per_s"), (line[start + 1], "memory")):
                bars = axis.barh(labels, [row[key] for row in shown], color=colors)
                axis.bar_label(bars, fmt="%.2f" if key == "images_per_s" else "%.1f", padding=4, fontsize=8)
                axis.margins(x=0.22)
                axis.tick_params(labelsize=8)
                axis.set_xlabel("images/s" if key == "images_per_s" else "peak memory, GB", fontsize=8)
                axis.set_title(f"{comparison}, {precision}", fontsize=9)
            for y, row in enumerate(shown):
                line[start].plot(row["rates"], [y] * len(row["rates"]), "k.", markersize=4)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="results; written after each measurement")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--minutes", type=float, help="start no measurement after this; repeat to continue")
    parser.add_argument("--figure", type=Path, help="draw the results in --json into this file")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--batch-size", type=int, help="default 8 for ConvViT-B and 16 for ViT-B")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16"))
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--precision", help=argparse.SUPPRESS)
    parser.add_argument("--kept", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.side, args)))
        return
    file = args.json
    result: dict[str, Any] = {"measurements": {}}
    if file is not None and file.exists():
        result = json.loads(file.read_text())
    if args.rounds:
        result |= {
            "machine": machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
            "versions": versions(),
        }
    jobs = [
        (precision, side, kept)
        for precision in args.precisions
        for side in args.sides
        for kept in (("kept",) if SIDES[side][2] else ("as it comes", "kept"))
    ]
    until = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
    for number in range(args.rounds):
        random.Random(number).shuffle(jobs)
        for precision, side, kept in jobs:
            done = result["measurements"].setdefault(f"{precision} | {side} | {kept}", [])
            if len(done) > number:
                continue
            if time.monotonic() > until:
                print("time is up; repeat the command to continue")
                return
            done.append(measure_apart(side, precision, kept, args))
            print(f"round {number}: {precision} {side}, {kept}: {done[-1]['images_per_s']:.2f} images/s", flush=True)
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(result, indent=1) + "\n")
    rows = rows_of(result)
    print("\n".join(summarize(rows)))
    if args.figure:
        draw(rows, args.figure)


def measure_apart(side: str, precision: str, kept: str, args: argparse.Namespace) -> dict[str, Any]:
    """:func:`measure` in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--precision", precision]
    command += ["--kept"] if kept == "kept" else []
    command += ["--compile"] if args.compile else []
    command += ["--steps", str(args.steps), "--warmup", str(args.warmup)]
    command += ["--batch-size", str(args.batch_size)] if args.batch_size else []
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        sys.exit(f"{side}: {process.stderr[-2000:]}")
    return json.loads(process.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
