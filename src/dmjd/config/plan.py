"""The settings of a plan: what is to be trained on, how long, and what is already decided. Imports no torch."""

from dataclasses import dataclass
from typing import ClassVar

from dmjd.config.checks import MAX_BATCH_SIZE, MAX_CHANNELS, MAX_COUNT, MAX_MINUTES, MAX_SIDE, MAX_WORKERS
from dmjd.config.fields import DEVICES, Config, option
from dmjd.config.invalid import ALPHA_HELP, ALPHAS, BLENDED, NODATA_HELP, nodata_text
from dmjd.config.remote import cache_dir_option, cache_gb_option

DATA, DECIDED, MACHINE = "data and time", "what is already decided; the plan chooses the rest", "machine"


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Config):
    """What ``dmjd plan`` is asked. Settings of a run that are given are kept; the others are chosen."""

    task: ClassVar[str] = "plan"

    data: str | tuple[str, ...] | None = option(None, "what to train on, as for dmjd pretrain", DATA)
    root: str | None = option(None, "folder that the paths in a list are relative to; default its own", DATA)
    path_column: str | None = option(None, "column of the paths in a list, instead of path", DATA)
    max_unreadable: float | None = option(
        None, "how many files of a list may be missing, or a share below 1; default none", DATA, ge=0, most=MAX_COUNT
    )
    cache_dir: str | None = cache_dir_option(DATA)
    cache_gb: float | None = cache_gb_option(DATA)
    hours: float | None = option(None, "hours that the run may take, also 0.5", DATA, gt=0, most=MAX_MINUTES / 60)
    out: str = option("runs/mine", "run folder in the command of the plan", DATA)
    teacher: str | None = option(None, "a trained model to learn from, a run or timm/NAME: the recipe distill", DECIDED)
    teacher_size: tuple[int, ...] | None = option(
        None,
        "side, or height and width, of the teacher's images, as for dmjd pretrain",
        DECIDED,
        ge=0,
        most=MAX_SIDE,
        length=(1, 2),
    )
    init: str | None = option(None, "trained weights to start from, a run or timm/NAME: the recipe adapt", DECIDED)
    encoder: str | None = option(None, "encoder, as for dmjd pretrain", DECIDED)
    img_size: tuple[int, ...] | None = option(
        None, "image side in pixels, or height and width", DECIDED, ge=1, most=MAX_SIDE, length=(1, 2)
    )
    in_chans: int | None = option(
        None,
        "input channels of the encoder; default 3, with --init those of the weights",
        DECIDED,
        ge=1,
        most=MAX_CHANNELS,
    )
    value_range: tuple[float, ...] | None = option(
        None, "LOW HIGH mapped to 0..255, as for dmjd pretrain", DECIDED, length=(2,), ge=-1e30, le=1e30
    )
    nodata: str | None = option(None, NODATA_HELP, DECIDED)
    alpha: str = option(BLENDED, ALPHA_HELP, DECIDED, choices=ALPHAS)
    batch_size: int | None = option(None, "images per step", DECIDED, ge=1, most=MAX_BATCH_SIZE)
    device: str = option("auto", "device to train on", MACHINE, choices=DEVICES)
    num_workers: int | None = option(
        None, "data loading processes; default by the number of cores", MACHINE, ge=0, most=MAX_WORKERS
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodata", nodata_text(self.nodata))
        super().__post_init__()
        if self.teacher is not None and self.init is not None:
            raise ValueError("give --teacher for a new encoder, or --init to go on from weights, not both")
        if self.teacher_size is not None and self.teacher is None:
            raise ValueError("--teacher-size has no use without --teacher")

    def check_complete(self) -> None:
        """Raise ValueError if the images or the time are missing."""
        if self.data is None:
            raise ValueError("say what to train on: --data FOLDER (or a .parquet file, a set name, digits)")
        if self.hours is None:
            raise ValueError("say how long the run may take: --hours 2")
