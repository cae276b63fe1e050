"""How the processes of a run share its model, and the settings that go with it. Imports no torch."""

from typing import Any

from dmjd.config.fields import option

DDP, FSDP = "ddp", "fsdp"

FULL, SHARDED = "full", "sharded"


def strategy_option(group: str) -> Any:
    """What each process holds of the model."""
    return option(
        DDP,
        f"of several processes: {DDP}, each has the whole model; {FSDP} (experimental), each has a part, if it does "
        "not fit",
        group,
        resume=True,
        choices=(DDP, FSDP),
    )


def checkpoint_type_option(group: str) -> Any:
    """What each process writes of a checkpoint."""
    return option(
        FULL,
        f"strategy {FSDP}: checkpoints are {FULL}, in one file that the first process writes; or {SHARDED}, each "
        "process writes a part",
        group,
        resume=True,
        choices=(FULL, SHARDED),
    )


def check_strategy(strategy: str, checkpoint_type: str, precision: str) -> None:
    """Check that settings can be used if every process holds a part of each weight only, or only then.

    Raises:
        ValueError: for a setting that cannot be, with what can.
    """
    if strategy != FSDP:
        if checkpoint_type == SHARDED:
            raise ValueError(f"--checkpoint-type {SHARDED} needs --strategy {FSDP}, with which processes have parts")
        return
    if precision == "fp16":
        raise ValueError(f"--strategy {FSDP} needs --precision bf16 or fp32: the loss scale of fp16 is not supported")
