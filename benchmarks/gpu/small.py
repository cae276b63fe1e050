"""ViT-tiny with 4-pixel tokens on 32-pixel images in memory: the whole training loop with its loader."""

import copy
import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

import dmjd
from dmjd.config.pretrain import PretrainConfig
from dmjd.data.sources.registry import open_source
from dmjd.data.sources.subset import SubsetSource
from dmjd.data.train_loader import Stream, TrainLoader
from dmjd.engine.device import make_fabric
from dmjd.engine.loop import Duration, Engine
from dmjd.engine.stop_signal import StopSignal
from dmjd.images.preprocess import Preprocess
from dmjd.pretraining.bench import wait
from dmjd.pretraining.run import make_engine
from dmjd.runs.build import build_model

WARMUP, STEPS, PROFILED, ROWS = 10, 60, 10, 25

TOY_IMAGES = 128


def small_config(recipe: str, batch: int, compiled: bool, device: torch.device, toy: bool) -> PretrainConfig:
    """A recipe on ViT-tiny with 4-pixel tokens, in bf16."""
    config = getattr(dmjd.recipes, recipe)(
        encoder="vit_tiny_patch4",
        img_size=(32,),
        class_token=False,
        batch_size=batch,
        precision="bf16",
        compile=compiled,
        device=device.type,
    )
    return config.replace(embed_dim=(32,), depth=(2,), num_heads=2) if toy else config


def small_loader(pack: Path, device: torch.device, toy: bool, images: int | None = None) -> TrainLoader:
    """CIFAR-10 in the device's memory; its first ``images``, or a few if ``toy``."""
    source = open_source(str(pack / "cifar10" / "train.parquet"), split="train")
    if toy or images is not None:
        source = SubsetSource(source, np.arange(min(images or TOY_IMAGES, len(source))))
    return TrainLoader(source, img_size=(32, 32), batch_size=8, device=device)


def small_engine(recipe: str, batch: int, compiled: bool, device: torch.device, toy: bool) -> Engine:
    """The engine of ``dmjd pretrain``."""
    config = small_config(recipe, batch, compiled, device, toy)
    model = build_model(config)
    model.encoder.preprocess = Preprocess(config.size)
    return make_engine(config, model, make_fabric(device.type, "bf16"), batch, num_images=50_000)


def with_batch(loader: TrainLoader, batch: int) -> TrainLoader:
    """The same images in batches of another size, without reading them again."""
    other = copy.copy(loader)
    other.stream = Stream(loader.stream.length, batch)
    return other


def measure_small(
    recipe: str, loader: TrainLoader, batch: int, compiled: bool, device: torch.device, toy: bool
) -> dict[str, Any]:
    """Images/s of the training loop with its loader, and on one prepared batch."""
    engine, warmup, steps = small_engine(recipe, batch, compiled, device, toy), WARMUP, STEPS
    if toy:
        warmup, steps = 1, 2
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    loaded = with_batch(loader, batch).batches()
    started = time.perf_counter()
    run_steps(engine, loaded, 1)
    wait(device)
    first = time.perf_counter() - started
    run_steps(engine, loaded, warmup)
    rates = {"images_per_s": steps_per_s(engine, loaded, steps, device) * batch}
    rates["images_per_s_prepared"] = steps_per_s(engine, itertools.repeat(next(loaded)), steps, device) * batch
    rates["images_per_s_loader_alone"] = steps * batch / seconds_of(lambda: take(loaded, steps), device)
    memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    return rates | {"compile_s": first, "memory_gb": memory, "batch": batch, "model": engine.task.model}


def profile_small(
    recipe: str, loader: TrainLoader, batch: int, compiled: bool, device: torch.device, toy: bool
) -> dict[str, Any]:
    """Where the time of the training loop goes: kernels by device time, operators by host time, share of idle time."""
    engine, loaded, steps = small_engine(recipe, batch, compiled, device, toy), with_batch(loader, batch).batches(), 2
    if not toy:
        run_steps(engine, loaded, WARMUP)
        steps = PROFILED
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        seconds = seconds_of(lambda: run_steps(engine, loaded, steps), device)
    rows = profiler.key_averages()
    kernels = [row for row in rows if row.self_device_time_total > 0 and row.device_type.name != "CPU"]
    busy = sum(row.self_device_time_total for row in kernels) / 1e6
    return {
        "images_per_s": steps * batch / seconds,
        "device_busy": busy / seconds,
        "launches_per_step": sum(row.count for row in kernels) / steps,
        "kernels_ms_per_step": top(kernels, "self_device_time_total", steps),
        "host_ms_per_step": top(list(rows), "self_cpu_time_total", steps),
        "batch": batch,
        "model": engine.task.model,
    }


def top(rows: list[Any], attribute: str, steps: int) -> dict[str, list[float]]:
    """Name -> [milliseconds, calls] per step of the largest rows."""
    largest = sorted(rows, key=lambda row: getattr(row, attribute), reverse=True)[:ROWS]
    return {row.key[:120]: [round(getattr(row, attribute) / 1e3 / steps, 4), row.count / steps] for row in largest}


def steps_per_s(engine: Engine, batches: Any, steps: int, device: torch.device) -> float:
    """Steps per second over ``steps`` steps."""
    return steps / seconds_of(lambda: run_steps(engine, batches, steps), device)


def seconds_of(function: Any, device: torch.device) -> float:
    """Seconds of a call, waiting for the device before and after."""
    wait(device)
    started = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - started


def take(batches: Any, count: int) -> None:
    """Draw batches."""
    for _ in range(count):
        next(batches)


def run_steps(engine: Engine, batches: Any, steps: int) -> None:
    """Run ``steps`` more steps; the last one is logged."""
    engine.duration = Duration(steps=engine.state.step + steps)
    engine.log_every = 1 << 30
    engine.run(batches, [], StopSignal())
