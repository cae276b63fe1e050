"""Jobs of ``convergence.py``: their names, processes that do several at a time, and the time of a step."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from dmjd.config.pretrain import PretrainConfig
from dmjd.data.sources.base import Source
from dmjd.engine.device import make_fabric
from dmjd.engine.loop import Duration
from dmjd.engine.stop_signal import StopSignal
from dmjd.model import MaskedImageModel
from dmjd.pretraining.bench import wait
from dmjd.pretraining.run import make_engine, training_batches

WARMUP_STEPS, TIMED_STEPS = 3, 10


class Job(NamedTuple):
    """A run, or the test of one."""

    kind: str
    name: str
    blr: float
    seed: int

    def __str__(self) -> str:
        """As ``--job`` takes it."""
        return ",".join(map(str, self))

    @classmethod
    def parse(cls, text: str) -> "Job":
        """The job of ``str(job)``."""
        kind, name, blr, seed = text.split(",")
        return cls(kind, name, float(blr), int(seed))


def do_in_processes(jobs: list[Job], number: int) -> None:
    """Repeat the command line for each job, ``number`` at a time, each with its share of the cores."""
    threads = max(1, (os.cpu_count() or 1) // number)
    variables = os.environ | {"OMP_NUM_THREADS": str(threads)}

    def do(job: Job) -> None:
        started = time.monotonic()
        command = [sys.executable, *sys.argv, "--job", str(job)]
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
        ended = "" if done.returncode == 0 else f": exit code {done.returncode}\n{done.stderr[-2000:]}"
        print(f"{job} after {time.monotonic() - started:.0f} s{ended}", flush=True)

    with ThreadPoolExecutor(number) as pool:
        list(pool.map(do, jobs))


class TimedSteps:
    """Measures steps of a run with its loader, again and again.

    Args:
        config: of the run; its length does not matter. model: to train. source: images.
    """

    def __init__(self, config: PretrainConfig, model: MaskedImageModel, source: Source) -> None:
        fabric = make_fabric(config.device, config.precision)
        self._engine = make_engine(config, model, fabric, config.batch_size, len(source))
        self._batches = training_batches(config, source, fabric, config.batch_size)
        self._device = fabric.device

    def __call__(self) -> float:
        """Seconds per step, after some steps of warm-up."""
        self._run(WARMUP_STEPS)
        wait(self._device)
        started = time.perf_counter()
        self._run(TIMED_STEPS)
        wait(self._device)
        return (time.perf_counter() - started) / TIMED_STEPS

    def _run(self, steps: int) -> None:
        self._engine.duration = Duration(steps=self._engine.state.step + steps)
        self._engine.run(self._batches, [], StopSignal())


def with_once(seconds: dict[str, float], baseline: str, share: float, images: dict[str, int]) -> dict[str, float]:
    """Seconds per step if reading an image, or its target, takes ``share`` of the baseline's step, once for all views.

    The steps need not take that long: runs with a calibrated clock have the number of steps that would fit.

    Args:
        seconds: per step, by variant. baseline: the variant. share: of its step. images: per step, by variant.
    """
    once = seconds[baseline] * share / (1 - share) / images[baseline] if share else 0.0
    return {name: own + once * images[name] for name, own in seconds.items()}
