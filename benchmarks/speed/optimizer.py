"""Time of an optimizer step: AdamW, timm's Muon, and ours, which takes all matrices of one shape together.

    OMP_NUM_THREADS=1 python benchmarks/speed/optimizer.py --json benchmarks/results/optimizer.json

Encoders with their branches, random gradients; the best of several alternating rounds counts.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm.optim
import torch

import dmjd
from dmjd.engine.muon import Muon
from dmjd.engine.optim import adamw, parameter_groups
from dmjd.pretraining.bench import machine, wait

ENCODERS = {
    "5 blocks of width 128": {"name": "vit_tiny_patch4", "embed_dim": 128, "depth": 5, "num_heads": 4},
    "vit_tiny_patch4": {"name": "vit_tiny_patch4"},
    "conv_vit_tiny_patch4": {"name": "conv_vit_tiny_patch4"},
    "vit_base_patch16": {"name": "vit_base_patch16"},
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": adamw,
    "timm's Muon": lambda groups: timm.optim.Muon(groups, lr=0.0),
    "Muon": Muon,
}


def milliseconds(settings: dict[str, Any], device: torch.device, rounds: int) -> dict[str, float]:
    """Time of a step of each optimizer for one encoder."""
    side = 32 if settings["name"].endswith("patch4") else 224
    model = dmjd.MaskedImageModel(dmjd.create_encoder(**settings, img_size=side)).to(device)
    for p in model.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None
    steps = {name: make(parameter_groups(model, 0.05)).step for name, make in OPTIMIZERS.items()}
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(rounds + 1):  # the first creates the state
        for name, step in steps.items():
            wait(device)
            began = time.perf_counter()
            step()
            wait(device)
            best[name] = min(best[name], 1000 * (time.perf_counter() - began))
    return best


def main() -> None:
    """Measure, print a Markdown table, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    device = torch.device(given.device)
    print(f"| ms per step | {' | '.join(OPTIMIZERS)} |\n|---|{'---|' * len(OPTIMIZERS)}")
    rows = {}
    for name, settings in ENCODERS.items():
        rows[name] = milliseconds(settings, device, given.rounds)
        print(f"| {name} | {' | '.join(f'{ms:.1f}' for ms in rows[name].values())} |", flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps({"milliseconds": rows, "machine": machine(device)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
