"""The batch size of a run."""

import torch

from dmjd.config.pretrain import PretrainConfig

DEFAULT, CPU_DEFAULT, SHORT_CPU_DEFAULT = 256, 64, 32  # images per step; the last one for few minutes on a CPU

SHORT_MINUTES = 10

LEAST_DEFAULT = 16  # of small sets

MOST_SHOWN = 64  # processes, in a message

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


def resolve_batch_size(
    config: PretrainConfig, num_images: int, world_size: int, device: torch.device
) -> tuple[PretrainConfig, int]:
    """B: the configured or the default batch size, at most the size of the set, a multiple of processes times
    accumulation.

    Returns:
        The configuration, with a default batch size filled in, and B.

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
        return config.replace(batch_size=batch_size), batch_size
    batch_size = config.batch_size
    if batch_size > num_images:
        batch_size = num_images // parts * parts
    if batch_size == 0 or batch_size % parts:
        raise ValueError(
            f"batch size {batch_size} (the recipe's unless you gave one) cannot be divided among {shares}: "
            f"give a new run a --batch-size that is a multiple of {parts}; a run that is resumed keeps its own: "
            f"start it on {_processes_for(batch_size, config.accumulate)} process(es)"
        )
    return config, batch_size


def _processes_for(batch_size: int, accumulate: int) -> str:
    """The numbers of processes that divide a batch, which the accumulation divides: "1, 2 or 4"."""
    counts = [str(n) for n in range(1, MOST_SHOWN + 1) if batch_size % (n * accumulate) == 0]
    return " or ".join(filter(None, (", ".join(counts[:-1]), counts[-1])))
