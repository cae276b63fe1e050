"""``bench(config)``: how fast a recipe trains on this machine, against the machine's own limit, and where time goes."""

import os
import platform
import resource
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any, cast

import torch
from rich.table import Table

from dmjd import __version__
from dmjd.config.pretrain import PretrainConfig
from dmjd.data.train_loader import Batch
from dmjd.data.workers import available_cores
from dmjd.engine.device import make_fabric
from dmjd.engine.loop import Engine, Report, StopSignal
from dmjd.images.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from dmjd.model import MaskedImageModel
from dmjd.pretraining.run import make_engine, make_loader, resolve_batch_size
from dmjd.rng import image_keys
from dmjd.runs.build import build_model, open_data

BATCH_SIZE = {"cpu": 16, "cuda": 128}  # where the configuration leaves it open

WARMUP_STEPS = 3

PARTS = ("data", "masks and targets", "encoder", "branches", "backward", "optimizer")


def bench(config: PretrainConfig, steps: int = 10) -> dict[str, Any]:
    """Measure training steps of a configuration; nothing is written.

    Args:
        config: from a recipe. Its ``data`` is optional: without it only the step is measured, on made-up images.
            A batch size left open is 16 on a CPU and 128 on a GPU. steps: measured ones, after 3 to warm up.

    Returns:
        ``images_per_s`` {"step", "with_loader" (None without data)}; ``gflop_per_image`` of forward and backward pass;
        ``matmul_tflops``, the machine's own rate in the same precision, and ``share_of_matmul``, what the step makes
        of it; ``peak_memory_gb`` (GPU: of tensors; CPU: of the process); ``parts``, share of the time of each of
        :data:`PARTS`, measured one by one and not compiled; ``settings``, ``machine``, ``versions``.

    Raises:
        ValueError: for settings that cannot be.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    model = build_model(config)
    fabric = make_fabric(config.device, config.precision)
    source = open_data(config, config.data, "train") if config.data is not None else None
    batch_size = config.batch_size or BATCH_SIZE[fabric.device.type]
    if source is not None:
        batch_size = resolve_batch_size(config.replace(batch_size=batch_size), len(source), 1)
    config = config.replace(batch_size=batch_size, steps=WARMUP_STEPS + steps, log_every=1 << 30)
    statistics = (IMAGENET_MEAN, IMAGENET_STD) if config.in_chans == 3 else ((0.5,) * config.in_chans,) * 2
    model.encoder.preprocess = Preprocess(config.size, config.in_chans, *statistics)
    engine = make_engine(config, model, fabric, batch_size, num_images=batch_size)
    batches = _made_up_batches(config, batch_size // config.accumulate, fabric.device)
    step_rate, loader_rate = _rate(engine, batches, steps), None
    memory = peak_memory(fabric.device)
    if source is not None:
        batches = cast(Generator[Batch, None, None], make_loader(config, source, fabric, batch_size).batches(0))
        engine.state.step = 0
        loader_rate = _rate(engine, batches, steps)
    with closing(batches):  # ends the loader's processes
        parts = _parts(engine, model, batches, steps)
    dtype = torch.float32 if fabric._precision.precision == "32-true" else torch.bfloat16
    matmul = matmul_rate(fabric.device, dtype)
    flops = 3 * model.flops()
    return {
        "images_per_s": {"step": step_rate, "with_loader": loader_rate},
        "gflop_per_image": flops / 1e9,
        "matmul_tflops": matmul / 1e12,
        "share_of_matmul": step_rate * flops / matmul,
        "peak_memory_gb": memory / 1e9,
        "parts": parts,
        "settings": {
            name: getattr(config, name) for name in ("recipe", "encoder", "img_size", "batch_size", "compile", "data")
        }
        | {"precision": fabric._precision.precision, "steps": steps},
        "machine": machine(fabric.device),
        "versions": {"dmjd": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def _made_up_batches(config: PretrainConfig, size: int, device: torch.device) -> Generator[Batch, None, None]:
    """Noise images on the device, masked anew in every batch."""
    images = torch.randint(0, 256, (size, config.in_chans, *config.size), dtype=torch.uint8, device=device)
    index = torch.arange(size)
    number = 0
    while True:
        yield Batch(images, image_keys(config.seed, torch.full_like(index, number), index).to(device))
        number += 1


def _rate(engine: Engine, batches: Iterator[Batch], steps: int) -> float:
    """Images/s over ``steps`` steps of the real loop, after warming up."""
    stamps: list[float] = []

    def stamp(report: Report) -> None:
        if report.state.step in (WARMUP_STEPS, WARMUP_STEPS + steps):
            wait(engine.fabric.device)
            stamps.append(time.perf_counter())

    engine.run(batches, [stamp], StopSignal())
    return steps * engine.batch_size / (stamps[1] - stamps[0])


def _parts(engine: Engine, model: MaskedImageModel, batches: Iterator[Batch], steps: int) -> dict[str, float]:
    """Share of the time of each part of a step, the device waited for after each."""
    fabric, seconds = engine.fabric, dict.fromkeys(PARTS, 0.0)
    preprocess = model.encoder.preprocess
    assert preprocess is not None

    @contextmanager
    def timed(part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        wait(fabric.device)
        seconds[part] += time.perf_counter() - started

    for _ in range(steps):
        with timed("data"):
            batch = next(batches)
        with fabric.autocast():
            with timed("masks and targets"):
                raw = batch.images
                normalized = preprocess.normalize(raw)
                masks = model.draw_masks(batch.keys)
                targets = model.targets(normalized, raw)
            with timed("encoder"):
                latent = model.encode(normalized, masks.visible)
            with timed("branches"):
                loss = model.losses(latent, targets, masks)["loss"]
        with timed("backward"):
            fabric.backward(loss)
        with timed("optimizer"):
            engine.update(loss.detach())
    total = sum(seconds.values())
    return {part: value / total for part, value in seconds.items()}


def matmul_rate(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """Floating-point operations a second of the machine's own matrix product, the best of a few.

    [4096, 1024] x [1024, 4096] on a CPU, [8192, 8192] x [8192, 8192] on a GPU; float32 without TF32. The result is
    written to memory that is there already, so that only arithmetic is timed.
    """
    m, k, n = (4096, 1024, 4096) if device.type == "cpu" else (8192, 8192, 8192)
    a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((m, k), (k, n)))
    out = a @ b
    best = 0.0
    for _ in range(repeats):
        wait(device)
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        wait(device)
        best = max(best, 2 * m * k * n / (time.perf_counter() - started))
    return best


def wait(device: torch.device) -> None:
    """Until the device has done all it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: of tensors on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def machine(device: torch.device) -> dict[str, Any]:
    """What the measurement ran on."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), model)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"cpu": model, "cores": available_cores(), "threads": torch.get_num_threads(), "gpu": gpu}


def bench_table(result: dict[str, Any]) -> Table:
    """The result of :func:`bench` for people."""
    settings, rates = result["settings"], result["images_per_s"]
    table = Table(f"{settings['encoder']}, {settings['precision']}, {settings['batch_size']} images a step", "")
    table.add_row("step alone", f"{rates['step']:.2f} images/s")
    if rates["with_loader"] is not None:
        table.add_row("with the loader", f"{rates['with_loader']:.2f} images/s")
    table.add_row("arithmetic", f"{result['gflop_per_image']:.1f} GFLOP an image, forward and backward")
    table.add_row("matrix products here", f"{result['matmul_tflops']:.3g} TFLOP/s")
    table.add_row("share of that", f"{100 * result['share_of_matmul']:.0f} %")
    table.add_row("peak memory", f"{result['peak_memory_gb']:.1f} GB")
    for part, share in result["parts"].items():
        table.add_row(f"  {part}", f"{100 * share:.1f} %")
    return table
