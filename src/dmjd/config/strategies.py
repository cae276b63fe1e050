"""How the processes of a run share its model, and the settings that go with it. Imports no torch."""

DDP, FSDP = "ddp", "fsdp"

STRATEGIES = (DDP, FSDP)

STRATEGY_HELP = (
    f"of several processes: {DDP}, each has the whole model; {FSDP} (experimental), each has a part, if it does not fit"
)


def check_strategy(strategy: str, optimizer: str, precision: str, compile: bool) -> None:
    """Check that settings can be used if every process holds a part of each weight only.

    Raises:
        ValueError: for a setting that cannot be, with what can.
    """
    if strategy != FSDP:
        return
    if optimizer != "adamw":
        raise ValueError(f"--strategy {FSDP} needs --optimizer adamw: {optimizer} works on whole weight matrices")
    if precision == "fp16":
        raise ValueError(f"--strategy {FSDP} needs --precision bf16 or fp32: the loss scale of fp16 is not supported")
    if compile:
        raise ValueError(f"--strategy {FSDP} cannot be used with --compile: leave one of them out")
