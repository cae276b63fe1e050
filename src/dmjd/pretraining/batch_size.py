"""The batch size of a run, and the base learning rate that follows from it."""

import math

import torch

from dmjd.config.pretrain import PretrainConfig

DEFAULT, CPU_DEFAULT, SHORT_CPU_DEFAULT = 256, 64, 32  # images per step; the last one for few minutes on a CPU

SHORT_MINUTES = 10

LEAST_DEFAULT = 16  # of small sets

MOST_SHOWN = 64  # processes, in a message

ADAMW_BLR, ADAMW_BATCH = 6e-4, 512  # base learning rate of the paper, and its images per step

MUON_BLR, MUON_BATCH = 6e-3, 256

STEPS_PER_EPOCH = 10  # at least, if the set is not smaller than that many batches of LEAST_DEFAULT images


def default_batch_size(num_images: int, *, cpu: bool, minutes: float | None) -> int:
    """The batch size of a run that sets none: 256; on a CPU 64, or 32 if it lasts at most ten minutes.

    Not more than a tenth of the set, so that an epoch has at least ten steps, unless that is below 16 images.

    Args:
        num_images: size of the set.
        cpu: whether the run is on a CPU.
        minutes: length of the run, if it is given in minutes.
    """
    size = DEFAULT
    if cpu:
        size = SHORT_CPU_DEFAULT if minutes is not None and minutes <= SHORT_MINUTES else CPU_DEFAULT
    return min(size, max(LEAST_DEFAULT, num_images // STEPS_PER_EPOCH), num_images)


def base_rate(config: PretrainConfig, batch_size: int) -> float:
    """The base learning rate of a configuration, or the default if it sets none.

    The learning rate of a step follows the square root of the batch, since neither optimizer's steps shrink with the
    gradient. Muon: 6e-3 * sqrt(256 / batch_size), near what was best for 16 to 512 images per step
    (docs/evidence.md). AdamW: the paper's 6e-4, below its batch of 512 times sqrt(512 / batch_size).
    """
    if config.blr is not None:
        return config.blr
    if config.optimizer == "muon":
        return MUON_BLR * math.sqrt(MUON_BATCH / batch_size)
    return ADAMW_BLR * max(1.0, math.sqrt(ADAMW_BATCH / batch_size))


def resolve_batch_size(
    config: PretrainConfig, num_images: int, world_size: int, device: torch.device
) -> tuple[PretrainConfig, int]:
    """B: the configured or the default batch size, at most the size of the set, a multiple of processes times
    accumulation.

    Returns:
        The configuration, with a default batch size and base learning rate filled in, and B.

    Raises:
        ValueError: if there are more processes than images, or the configured size cannot be divided evenly.
    """
    parts = world_size * config.accumulate
    shares = f"{world_size} process(es) x --accumulate {config.accumulate}"
    if num_images < parts:
        raise ValueError(f"{num_images} image(s) cannot be divided among {shares}; use fewer")
    if config.batch_size is None:
        default = default_batch_size(num_images, cpu=device.type == "cpu", minutes=config.minutes)
        batch_size = max(parts, default // parts * parts)
        return config.replace(batch_size=batch_size, blr=base_rate(config, batch_size)), batch_size
    batch_size = config.batch_size
    if batch_size > num_images:
        batch_size = num_images // parts * parts
    if batch_size == 0 or batch_size % parts:
        raise ValueError(
            f"batch size {batch_size} (the recipe's unless you gave one) cannot be divided among {shares}: "
            f"give a new run a --batch-size that is a multiple of {parts}; a run that is resumed keeps its own: "
            f"start it on {_processes_for(batch_size, config.accumulate)} process(es)"
        )
    return config.replace(blr=base_rate(config, batch_size)), batch_size


def _processes_for(batch_size: int, accumulate: int) -> str:
    """The numbers of processes that divide a batch, which the accumulation divides: "1, 2 or 4"."""
    counts = [str(n) for n in range(1, MOST_SHOWN + 1) if batch_size % (n * accumulate) == 0]
    return " or ".join(filter(None, (", ".join(counts[:-1]), counts[-1])))
