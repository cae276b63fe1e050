"""A row of a study of ``convergence.py``, and the settings that were found best."""

from dataclasses import dataclass, field
from typing import Any

from convergence_agreement import Agreement


@dataclass(frozen=True)
class Variant:
    """One row of a study.

    Attributes:
        recipe: of the library. overrides: its settings that differ.
        misaligned: whether the visible branch is compared with targets in the published order, see
            ``MisalignedBranch``.
        scale_rule: whether the learning rate is scaled by p / c.
        blr_of: the variant whose base learning rate it uses; None = its own is searched.
        teacher: the variant whose first run is its teacher; the time of that run is not counted.
        share: fraction of the study's time, for a shorter schedule.
        blr_factor: factor on the base learning rate.
        agreement: a loss on the pooled features of the views.
        color_weight: factor on the colors of the target hog.
        instance_mean: whether the target ema averages blocks that are normalized over the image.
        windows: whether the visible tokens are one window of the image, see ``Windows``.
    """

    recipe: str
    overrides: dict[str, Any] = field(default_factory=dict)
    misaligned: bool = False
    scale_rule: bool = True
    blr_of: str | None = None
    teacher: str | None = None
    share: float = 1.0
    blr_factor: float = 1.0
    agreement: Agreement | None = None
    color_weight: float = 1.0
    instance_mean: bool = False
    windows: bool = False


# What was found best for CIFAR-10.
SMALL_IMAGES: dict[str, Any] = {"mim_target": "pixel", "vis_target": "hog", "mask_ratio": 0.75, "block_size": 1}
SMALL_IMAGES |= {"hog_cell": 4, "optimizer": "muon"}

# What a search around them found best for minutes, and by how much its base learning rate is higher.
BEST: dict[str, Any] = SMALL_IMAGES | {"batch_size": 32, "mask_ratio": 0.85, "projector_depth": 1}
BEST |= {"crop_scale": (0.8, 1.0)}
BEST_FACTOR = 8 / 3
