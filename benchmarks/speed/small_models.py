"""Small models: our training loop and a plain PyTorch loop with the same model, on 32-pixel images.

    python benchmarks/speed/small_models.py --json benchmarks/results/small_models_cpu.json
    python benchmarks/speed/small_models.py --data cifar10_train.parquet

The plain loop is what a careful person would write: fused AdamW, autocast, gradients set to None, the loss read every
20 steps. Its images come from a DataLoader with torchvision's transforms, one image at a time. The same loop on
prepared batches separates the cost of the loader from that of the step.

"kept" means that the plain loop runs with our memory allocator setting
(:func:`dmjd.engine.device.keep_freed_memory`). It cannot be undone within a process, so the sides with and without it
run in two processes. The sides within a process alternate.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import dmjd
from dmjd.data.sources.base import Source
from dmjd.data.train_loader import Batch, TrainLoader
from dmjd.engine.device import keep_freed_memory, make_fabric
from dmjd.engine.loop import Duration, Engine
from dmjd.engine.stop_signal import StopSignal
from dmjd.images.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from dmjd.pretraining.bench import machine, wait
from dmjd.pretraining.run import make_engine
from dmjd.runs.build import build_model, open_data

Side = Callable[[int], None]

WARMUP = 2
LOG_EVERY = 20
READY = 8  # batches prepared in advance


class PlainImages(Dataset):
    """The usual dataset class: one PIL image at a time through torchvision's transforms."""

    def __init__(self, source: Source) -> None:
        self._images = [Image.fromarray(source.read(i)) for i in range(min(len(source), 12_000))]
        crop = transforms.RandomResizedCrop(32, scale=(0.5, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
        self._transform = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.PILToTensor()])

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Tensor:
        return self._transform(self._images[index])


class PlainLoop:
    """Model, optimizer and step written out without a training library."""

    def __init__(self, config: Any, device: torch.device) -> None:
        torch.manual_seed(0)
        self.model = build_model(config).to(device).train()
        self.forward = torch.compile(self.model) if config.compile else self.model
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True
        )
        self.mean, self.std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
        self.device, self.bf16 = device, config.precision == "bf16"
        self.step = 0

    def run(self, batches: Iterator[Tensor], steps: int) -> None:
        """Run ``steps`` steps."""
        for images in itertools.islice(batches, steps):
            raw = images.to(self.device, non_blocking=True).float()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                loss = self.forward((raw / 255 - self.mean) / self.std, raw)["loss"]
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            if self.step % LOG_EVERY == 0:
                loss.item()


def plain_batches(source: Source, batch_size: int, workers: int) -> Iterator[Tensor]:
    """Endless batches of a shuffled DataLoader."""
    loader = DataLoader(
        PlainImages(source),
        batch_size,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        persistent_workers=workers > 0,
    )
    while True:
        yield from loader


def our_engine(config: Any) -> Engine:
    """The engine of `dmjd pretrain`."""
    torch.manual_seed(0)
    model = build_model(config)
    model.encoder.preprocess = Preprocess((32, 32), 3, IMAGENET_MEAN, IMAGENET_STD)
    fabric = make_fabric(config.device, config.precision)
    return make_engine(config, model, fabric, config.batch_size, num_images=config.batch_size)


def run_engine(engine: Engine, batches: Iterator[Batch], steps: int) -> None:
    """Run ``steps`` steps of the library's loop."""
    engine.duration = Duration(steps=engine.state.step + steps)
    engine.run(batches, [], StopSignal())


def make_sides(config: Any, source: Source, kept: bool, workers: int, device: torch.device) -> dict[str, Side]:
    """Name -> function that runs n steps. Ours run only with kept memory, which the engine sets up itself."""
    loader = TrainLoader(source, img_size=(32, 32), batch_size=config.batch_size, device=device)
    ready = list(itertools.islice(loader.batches(0), READY))
    loop, given = PlainLoop(config, device), itertools.cycle([batch.images for batch in ready])
    loaded = plain_batches(source, config.batch_size, workers)
    suffix = ", kept" if kept else ""
    sides: dict[str, Side] = {
        f"plain loop and DataLoader{suffix}": lambda n: loop.run(loaded, n),
        f"plain loop, ready batches{suffix}": lambda n: loop.run(given, n),
    }
    if kept:
        engine, stream, cycle = our_engine(config), loader.batches(0), itertools.cycle(ready)
        sides["dmjd and its loader"] = lambda n: run_engine(engine, stream, n)
        sides["dmjd, ready batches"] = lambda n: run_engine(engine, cycle, n)
    return sides


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    """Images/s of every side in this process, one number per round."""
    if args.kept:
        keep_freed_memory(device)
    config = dmjd.recipes.dmjd(
        encoder="vit_tiny_patch4", img_size=(32,), batch_size=args.batch, precision=args.precision, compile=args.compile
    )
    source = open_data(config, args.data, "train")
    sides = make_sides(config, source, args.kept, args.workers, device)
    for run in sides.values():
        run(WARMUP)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(args.turns):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            wait(device)
            started = time.perf_counter()
            sides[name](args.steps)
            wait(device)
            rates[name].append(args.batch * args.steps / (time.perf_counter() - started))
    return rates


def measure_apart(args: argparse.Namespace, batch: int, precision: str, kept: bool) -> dict[str, list[float]]:
    """:func:`measure` in its own process."""
    command = [sys.executable, __file__, "--batch", str(batch), "--precision", precision, "--data", args.data]
    command += ["--steps", str(max(1, args.steps * 64 // batch)), "--turns", str(args.turns)]
    command += ["--workers", str(args.workers)] + ["--kept"] * kept + ["--compile"] * args.compile
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(process.stdout.splitlines()[-1])


def summary(turns: dict[str, list[float]]) -> dict[str, Any]:
    """Best round of each side, and the speed of ours relative to it."""
    best = {name: max(rates) for name, rates in turns.items()}
    ours = best["dmjd and its loader"]
    return {"images_per_s": best, "times": {name: ours / rate for name, rate in best.items()}, "turns": turns}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="result; measurements already in the file are not repeated")
    parser.add_argument("--data", default="digits", help="the generated digits, or a set of 32-pixel images")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="per round, at 64 images per step")
    parser.add_argument("--workers", type=int, default=2, help="of the plain DataLoader")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--compile", action="store_true", help="torch.compile both loops' models")
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--precision", help=argparse.SUPPRESS)
    parser.add_argument("--kept", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.batch:
        print(json.dumps(measure(args, device)))
        return
    result = json.loads(args.json.read_text()) if args.json and args.json.exists() else {"cases": {}}
    for precision, batch in itertools.product(args.precisions, args.batches):
        case = f"{precision}, {batch} images a step" + ", compiled" * args.compile
        if case not in result["cases"]:
            turns = {n: r for kept in (False, True) for n, r in measure_apart(args, batch, precision, kept).items()}
            result["cases"][case] = summary(turns)
            result["machine"] = machine(device)
            result["versions"] = {"dmjd": dmjd.__version__, "torch": torch.__version__}
            result["data"] = Path(args.data).name
            if args.json:
                args.json.write_text(json.dumps(result, indent=1) + "\n")
        print(case, json.dumps({k: result["cases"][case][k] for k in ("images_per_s", "times")}, indent=1), flush=True)


if __name__ == "__main__":
    main()
