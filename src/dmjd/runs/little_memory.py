"""A training whose batch does not fit into the memory of its device goes on with more, smaller micro-batches."""

from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any

from dmjd.engine.console import Console
from dmjd.engine.device import free_memory, is_out_of_memory
from dmjd.engine.loop import Engine

Batches = Generator[Any, None, None]

MOST_MICRO_BATCHES = 64  # of a step

FIRST_STEPS = 3  # by then all that a step needs has been allocated


def run_within_memory(
    engine: Engine,
    batches: Batches,
    run: Callable[[Batches], bool],
    console: Console,
    again: Callable[[int], Batches] | None,
) -> bool:
    """Run a training, with at least twice as many micro-batches whenever one of its first steps does not fit.

    Args:
        engine: the loop.
        batches: micro-batches from the current step on; closed at the end.
        run: trains on them; returns whether the training is finished.
        console: for messages.
        again: start step -> micro-batches, ``engine.accumulate`` for a step; None: they cannot be divided.

    Returns:
        What ``run`` returns.

    Raises:
        ValueError: if a step does not fit although it was divided as far as possible.
    """
    began = engine.state.step
    while True:
        try:
            with closing(batches):
                return run(batches)
        except Exception as error:
            is_first = engine.state.step - began < FIRST_STEPS and engine.computing
            if again is None or not is_first or engine.fabric.world_size > 1 or not is_out_of_memory(error):
                raise
            _divide(engine, error)
        free_memory(engine.fabric.device)  # without the error, which holds the tensors of the step
        console.warn(
            f"out of memory: going on with --accumulate {engine.accumulate}, "
            f"{engine.batch_size // engine.accumulate} image(s) at a time; the result is the same but for rounding"
        )
        batches = again(engine.state.step)


def _divide(engine: Engine, error: Exception) -> None:
    """Twice as many micro-batches, or the next number that divides the batch; the step has to be repeated."""
    size, now = engine.batch_size, engine.accumulate
    possible = [parts for parts in range(now + 1, min(size, MOST_MICRO_BATCHES) + 1) if size % parts == 0]
    if not possible:
        raise ValueError(
            f"out of memory with {engine.batch_size // engine.accumulate} image(s) at a time (--accumulate "
            f"{engine.accumulate}); use a smaller encoder or image size, or --grad-checkpointing"
        ) from error
    engine.accumulate = next((parts for parts in possible if parts >= 2 * now), possible[-1])
    engine.optimizer.zero_grad(set_to_none=True)
