"""``bench(config)``: training speed of a recipe on this machine, its MFU, and the time of each part of a step."""

import itertools
import platform
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch
from rich.table import Column, Table

from dmjd import __version__
from dmjd.config.checks import MAX_COUNT, Bounds, check_int
from dmjd.config.pretrain import PretrainConfig
from dmjd.data.train_loader import Batch
from dmjd.engine.busy_cores import warn_of_busy_cores
from dmjd.engine.console import Console, literal
from dmjd.engine.device import machine, make_fabric, peak_memory, precision_name
from dmjd.engine.loop import Engine, Report
from dmjd.engine.stop_signal import StopSignal
from dmjd.images.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from dmjd.model import MaskedImageModel
from dmjd.nn.modes import own_defaults
from dmjd.pretraining.batch_size import resolve_batch_size
from dmjd.pretraining.images import preprocess_with
from dmjd.pretraining.run import make_engine, training_batches
from dmjd.rng import image_keys
from dmjd.runs.build import build_model, open_data
from dmjd.runs.start import begin_from

CPU_BATCH_SIZE, BATCH_SIZE = 16, 128  # on a CPU, and elsewhere, without a configured one and without images

WARMUP_STEPS = 3

PARTS = ("data", "masks and targets", "encoder", "branches", "backward", "optimizer")


@own_defaults()
def bench(config: PretrainConfig, steps: int = 10) -> dict[str, Any]:
    """Measure training steps of a configuration. Nothing is written.

    Args:
        config: configuration, e.g. from a recipe. Without ``data`` only the step is measured, on synthetic images. The
            default batch size is 16 on a CPU and 128 on a GPU.
        steps: number of measured steps, after 3 for warm-up.

    Returns:
        ``images_per_s`` {"step", "with_loader" (None without data)}; ``gflop_per_image`` of forward and backward pass;
        ``matmul_tflops``, the machine's matrix-multiply speed in the same precision; ``mfu``, model FLOPs utilization:
        the fraction of that speed which the step reaches; ``peak_memory_gb`` (GPU: of tensors; CPU: of the process);
        ``parts``, fraction of the time in each of :data:`PARTS`, measured one by one and not compiled; ``settings``,
        ``machine``, ``versions``.

    Raises:
        ValueError: if the settings are invalid.
    """
    steps = check_int("steps", steps, Bounds(ge=1, most=MAX_COUNT - WARMUP_STEPS))
    config, start = begin_from(config)
    model = build_model(config, start)
    fabric = make_fabric(config.device, config.precision)
    warn_of_busy_cores(fabric.device, Console())
    source = open_data(config, config.data, "train", fetch_ahead=True) if config.data is not None else None
    batch_size = config.batch_size or batch_size_without_images(fabric.device)
    if source is not None:  # the batch of a run
        _, batch_size = resolve_batch_size(config, len(source), 1, fabric.device)
    config = config.replace(batch_size=batch_size, steps=WARMUP_STEPS + steps, log_every=MAX_COUNT)
    model.encoder.preprocess = preprocess_to_measure(config)
    engine = make_engine(config, model, fabric, batch_size, num_images=batch_size)
    batches = _synthetic_batches(config, batch_size // config.accumulate, fabric.device)
    images_per_s: dict[str, float | None] = {"step": _images_per_s(engine, batches, steps), "with_loader": None}
    memory = peak_memory(fabric.device)
    if source is not None:
        batches = training_batches(config, source, fabric, batch_size)
        engine.state.step = 0
        images_per_s["with_loader"] = _images_per_s(engine, batches, steps)
    with closing(batches):  # ends the worker processes
        parts = _parts(engine, model, batches, steps)
    return _result(config, engine, model, images_per_s, memory, parts) | {"machine": machine(fabric.device)}


def batch_size_without_images(device: torch.device) -> int:
    """The batch size if the configuration has none, and no images whose number decides."""
    return CPU_BATCH_SIZE if device.type == "cpu" else BATCH_SIZE


def preprocess_to_measure(config: PretrainConfig) -> Preprocess:
    """Preprocessing with all that changes the speed of a run. Mean and std do not, so no image is read for them."""
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if config.in_chans == 3 else ((0.5,) * config.in_chans,) * 2
    return preprocess_with(config, mean, std)


def _result(
    config: PretrainConfig,
    engine: Engine,
    model: MaskedImageModel,
    images_per_s: dict[str, float | None],
    memory: int,
    parts: dict[str, float],
) -> dict[str, Any]:
    """The result of :func:`bench` without the machine."""
    precision = precision_name(engine.fabric)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    matmul, flops = matmul_rate(engine.fabric.device, dtype), 3 * model.flops()
    assert images_per_s["step"] is not None
    assert config.steps is not None
    names = ("recipe", "encoder", "img_size", "batch_size", "compile", "data")
    return {
        "images_per_s": images_per_s,
        "gflop_per_image": flops / 1e9,
        "matmul_tflops": matmul / 1e12,
        "mfu": images_per_s["step"] * flops / matmul,
        "peak_memory_gb": memory / 1e9,
        "parts": parts,
        "settings": {name: getattr(config, name) for name in names}
        | {"precision": precision, "steps": config.steps - WARMUP_STEPS},
        "versions": {"dmjd": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def _synthetic_batches(config: PretrainConfig, size: int, device: torch.device) -> Generator[Batch, None, None]:
    """Noise images on the device, with new masks in every batch."""
    images = torch.randint(0, 256, (size, config.in_chans, *config.size), dtype=torch.uint8, device=device)
    index = torch.arange(size)
    for epoch in itertools.count():
        yield Batch(images, image_keys(config.seed, torch.full_like(index, epoch), index).to(device))


def _images_per_s(engine: Engine, batches: Iterator[Batch], steps: int) -> float:
    """Images/s over ``steps`` steps of the training loop, after warm-up."""
    stamps: list[float] = []

    def stamp(report: Report) -> None:
        if report.state.step in (WARMUP_STEPS, WARMUP_STEPS + steps):
            wait(engine.fabric.device)
            stamps.append(time.perf_counter())

    engine.run(batches, [stamp], StopSignal())
    return steps * engine.batch_size / (stamps[1] - stamps[0])


def _parts(engine: Engine, model: MaskedImageModel, batches: Iterator[Batch], steps: int) -> dict[str, float]:
    """Fraction of the time spent in each part of a step, waiting for the device after each part."""
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
                valid = model.valid_tokens(raw)
            with timed("encoder"):
                latent = model.encode(normalized, masks.visible)
            with timed("branches"):
                loss = model.losses(latent, targets, masks, valid)["loss"]
        with timed("backward"):
            fabric.backward(loss)
        with timed("optimizer"):
            engine.update(loss.detach())
    total = sum(seconds.values())
    return {part: value / total for part, value in seconds.items()}


def matmul_rate(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """Measure the FLOP/s of a matrix product on this machine, the best of ``repeats``.

    [4096, 1024] x [1024, 4096] on a CPU, [8192, 8192] x [8192, 8192] on a GPU; float32 without TF32. The output is
    allocated beforehand, so that only arithmetic is timed.
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
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def bench_table(result: dict[str, Any]) -> Table:
    """The result of :func:`bench` as a table."""
    settings, images_per_s = result["settings"], result["images_per_s"]
    heading = literal(f"{settings['encoder']}, {settings['precision']}, {settings['batch_size']} images a step")
    table = Table(Column(heading), "")
    table.add_row("step alone", f"{images_per_s['step']:.2f} images/s")
    if images_per_s["with_loader"] is not None:
        table.add_row("with the loader", f"{images_per_s['with_loader']:.2f} images/s")
    table.add_row("arithmetic", f"{result['gflop_per_image']:.1f} GFLOP per image, forward and backward")
    table.add_row("matrix multiply", f"{result['matmul_tflops']:.3g} TFLOP/s")
    table.add_row("MFU", f"{100 * result['mfu']:.0f} %")
    table.add_row("peak memory", f"{result['peak_memory_gb']:.1f} GB")
    for part, fraction in result["parts"].items():
        table.add_row(f"  {part}", f"{100 * fraction:.1f} %")
    return table
