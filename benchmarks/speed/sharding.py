"""Memory of each of two processes with --strategy ddp and fsdp: a ViT-huge of a few blocks, three steps on a CPU.

OMP_NUM_THREADS=1 python benchmarks/speed/sharding.py --json benchmarks/results/sharding_cpu.json
"""

import argparse
import itertools
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

import dmjd
from dmjd.config import recipes
from dmjd.data.train_loader import Batch
from dmjd.engine.device import machine, make_fabric, peak_memory
from dmjd.engine.processes import gather
from dmjd.engine.stop_signal import StopSignal
from dmjd.images.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from dmjd.pretraining.run import make_engine
from dmjd.rng import image_keys
from dmjd.runs.build import build_model

PROCESSES, IMAGES, STEPS = 2, 4, 3


def measure(strategy: str, depth: int) -> dict[str, Any]:
    """Train in one of the processes; the first one returns MB for each of them."""
    config = recipes.dmjd(
        encoder="vit_huge_patch14",
        depth=depth,
        decoder_depth=1,
        strategy=strategy,
        optimizer="adamw",
        device="cpu",
        batch_size=IMAGES,
        steps=STEPS,
    )
    fabric = make_fabric(config.device, config.precision, strategy=strategy)
    libraries = resident()
    model = build_model(config)
    model.encoder.preprocess = Preprocess(config.size, 3, IMAGENET_MEAN, IMAGENET_STD)
    engine = make_engine(config, model, fabric, IMAGES, num_images=IMAGES)
    if engine.whole is not None:
        engine.whole.release()  # as between evaluations
    own = IMAGES // PROCESSES
    images = torch.randint(0, 256, (own, 3, *config.size), dtype=torch.uint8)
    batch = Batch(images, image_keys(0, 0, torch.arange(own)))
    assert engine.run(itertools.repeat(batch), [], StopSignal())
    state = (value for entry in engine.optimizer.state.values() for value in entry.values())
    held = {"weights": sum(map(num_bytes, model.parameters())), "optimizer": sum(map(num_bytes, state))}
    each = gather(held | {"libraries": libraries, "peak": peak_memory(fabric.device)})
    parameters = sum(parameter.numel() for parameter in model.parameters())
    millions = [{name: round(value / 1e6) for name, value in one.items()} for one in each]
    return {"parameters_m": round(parameters / 1e6, 1), "processes_mb": millions}


def resident() -> int:
    """Memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def num_bytes(value: torch.Tensor) -> int:
    """Bytes that this process holds of a tensor."""
    local = value.to_local() if isinstance(value, DTensor) else value
    return local.numel() * local.element_size()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--depth", type=int, default=4, help="blocks of the encoder")
    parser.add_argument("--strategy", help=argparse.SUPPRESS)  # in one of the processes
    args = parser.parse_args()
    if args.strategy:
        result = measure(args.strategy, args.depth)
        if torch.distributed.get_rank() == 0:
            print(json.dumps(result))
        return
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}", __file__]
    found: dict[str, Any] = {"encoder": "vit_huge_patch14", "depth": args.depth}
    for strategy in ("ddp", "fsdp"):
        command = [*launch, "--strategy", strategy, "--depth", str(args.depth)]
        found[strategy] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    found["machine"] = machine(torch.device("cpu"))
    found["versions"] = {"dmjd": dmjd.__version__, "torch": torch.__version__}
    print(text := json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
