"""The settings of an inspection: a set of images, and how a run would read it. Imports no torch."""

from dataclasses import dataclass
from typing import ClassVar

from dmjd.config.checks import MAX_CHANNELS, MAX_COUNT, MAX_SIDE, MAX_WORKERS
from dmjd.config.fields import LABELS, Config, option
from dmjd.config.invalid import ALPHA_HELP, ALPHAS, BLENDED, NODATA_HELP, nodata_text
from dmjd.config.remote import cache_dir_option, cache_gb_option

DATA, READING = "data", "how a run would read it"


@dataclass(frozen=True, kw_only=True)
class InspectConfig(Config):
    """What ``dmjd inspect`` is asked."""

    task: ClassVar[str] = "inspect"

    data: str | tuple[str, ...] | None = option(None, "images, as for dmjd pretrain", DATA)
    labels: str = option("none", "source of the class labels, whose counts are shown", DATA, choices=LABELS)
    label_column: str | None = option(None, "column of the labels in a table or list, instead of label", DATA)
    root: str | None = option(None, "folder that the paths in a list are relative to; default its own", DATA)
    path_column: str | None = option(None, "column of the paths in a list, instead of path", DATA)
    max_unreadable: float | None = option(
        None, "how many files of a list may be missing, or a share below 1; default none", DATA, ge=0, most=MAX_COUNT
    )
    cache_dir: str | None = cache_dir_option(DATA)
    cache_gb: float | None = cache_gb_option(DATA)
    sample: int = option(2000, "images to read, evenly spaced; 0: all", DATA, ge=0, most=MAX_COUNT)
    img_size: tuple[int, ...] = option(
        (224,), "side of the crops in pixels, or height and width", READING, ge=1, most=MAX_SIDE, length=(1, 2)
    )
    in_chans: int = option(3, "input channels of the encoder", READING, ge=1, most=MAX_CHANNELS)
    value_range: tuple[float, ...] | None = option(
        None, "LOW HIGH mapped to 0..255, as for dmjd pretrain", READING, length=(2,), ge=-1e30, le=1e30
    )
    nodata: str | None = option(None, NODATA_HELP, READING)
    alpha: str = option(BLENDED, ALPHA_HELP, READING, choices=ALPHAS)
    num_workers: int | None = option(
        None, "data loading processes; default by the number of cores", READING, ge=0, most=MAX_WORKERS
    )
    seed: int = option(0, "seed of the crops", READING, ge=0, most=MAX_COUNT)

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodata", nodata_text(self.nodata))
        super().__post_init__()

    def check_complete(self) -> None:
        """Raise ValueError if the images are missing."""
        if self.data is None:
            raise ValueError("say what to inspect: dmjd inspect FOLDER (or a .parquet file, a set name, digits)")
