"""The settings of segmentation and detection: frozen dataclasses, from which flags are made. Imports no torch."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from dmjd.config.fields import check_types, option

DECODERS = ("upernet", "linear")

INFERENCE = ("whole", "slide")


@dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """What both tasks are told: how long and how to train, and in which frame images are seen.

    Raises:
        ValueError: for values that cannot be, naming the field.
    """

    epochs: float | None = option(None, "length of each training; default 50", "dense")
    steps: int | None = option(None, "length, instead of epochs", "dense")
    img_size: tuple[int, ...] | None = option(
        None, "side or height and width that an image is resized to; default the encoder's", "dense"
    )
    batch_size: int = option(16, "images per step", "dense")
    accumulate: int = option(1, "parts a step's batch is computed in: less memory", "dense")
    blr: float | None = option(None, "base rate, lr = blr * batch / 256; default 1e-3 times sqrt(256 / batch)", "dense")
    min_lr: float = option(1e-6, "rate at the end", "dense")
    warmup: float = option(0.1, "share of the run with a rising rate", "dense")
    weight_decay: float = option(0.05, "of AdamW, not on biases and norms", "dense")
    layer_decay: float = option(0.75, "rate of an encoder layer over that of the next; random start: 1", "dense")
    drop_path: float = option(0.1, "stochastic depth of the encoder's last block", "dense")
    clip_grad: float | None = option(3.0, "largest gradient norm", "dense")
    freeze: bool = option(False, "train the decoder alone, on the encoder as it is", "dense")
    decoder_dim: int = option(256, "width of decoder or pyramid", "dense")
    flip: bool = option(True, "random left-right flips", "dense")
    num_images: int = option(6, "test images drawn with what is found in them", "dense")
    num_evals: int = option(4, "tests on some images while training", "dense")
    checkpoint_every: int = option(200, "steps between checkpoints", "dense")
    log_every: int = option(20, "steps between lines of metrics.jsonl", "dense")

    def __post_init__(self) -> None:
        check_types(self)
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name, None)
            for v in value if isinstance(value, tuple) else (value,) if value is not None else ():
                if not (low <= v <= high and math.isfinite(v)):
                    words = f"be at least {low:g}" if math.isinf(high) else f"lie between {low:g} and {high:g}"
                    raise ValueError(f"{name} must {words}, got {v}")
        for name in ("epochs", "blr", "clip_grad", "layer_decay"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name} must be greater than 0")
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give --epochs or --steps, not both")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not divisible by accumulate {self.accumulate}")
        for name, counts in (("img_size", (1, 2)), ("resize", (1, 2)), ("scale", (2,))):
            value = getattr(self, name, None)
            if value is not None and len(value) not in counts:
                raise ValueError(f"{name} takes {' or '.join(map(str, counts))} numbers, got {len(value)}")

    @classmethod
    def of(cls, task: str, options: Mapping[str, Any]) -> Self:
        """The configuration of a caller's settings; ValueError for one that the task does not have."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(options) - known):
            raise ValueError(f"'{task}' does not take {', '.join(unknown)}; it takes {', '.join(sorted(known))}")
        return cls(**options)

    def resolve(self, img_size: tuple[int, int], num_images: int) -> Self:
        """All settings for an encoder of ``img_size`` and a training set: what was given, the rest by the help texts.

        The rate follows the root of the batch, because AdamW's steps do not shrink with the gradient: 2.5e-4 at 16.
        A batch is never larger than the set.
        """
        batch = min(self.batch_size, num_images // self.accumulate * self.accumulate)
        if batch == 0:
            raise ValueError(f"{num_images} training image(s) are too few for --accumulate {self.accumulate}")
        size = self.img_size or img_size
        return dataclasses.replace(
            self,
            epochs=50.0 if self.epochs is None and self.steps is None else self.epochs,
            img_size=(size[0], size[-1]),
            batch_size=batch,
            blr=self.blr or 1e-3 * math.sqrt(256 / batch),
        )

    @property
    def lr(self) -> float:
        """Peak learning rate; of a resolved configuration."""
        assert self.blr is not None
        return self.blr * self.batch_size / 256

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) that images are resized to; of a resolved configuration."""
        assert self.img_size is not None
        return self.img_size[0], self.img_size[-1]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig(DenseConfig):
    """Semantic segmentation. Images cover ``resize``; training crops and sliding windows are ``img_size``."""

    decoder: str = option("upernet", "upernet, or linear: one layer on the last map", "dense", choices=DECODERS)
    resize: tuple[int, ...] | None = option(
        None, "side or height and width that images cover before they are cropped; default --img-size", "dense"
    )
    scale: tuple[float, ...] = option((0.5, 2.0), "range of the random scale in training", "dense")
    color_jitter: bool = option(True, "random brightness, contrast, saturation and hue", "dense")
    inference: str = option("whole", "whole image at once, or slide: windows of --img-size", "dense", choices=INFERENCE)
    num_classes: int | None = option(None, "default: lines of classes.txt, else by the training masks", "dense")
    ignore_index: tuple[int, ...] = option((255,), "numbers in the masks that mean no label", "dense")

    @property
    def covered(self) -> tuple[int, int]:
        """(height, width) that images cover; of a resolved configuration."""
        return (self.resize[0], self.resize[-1]) if self.resize is not None else self.size


@dataclass(frozen=True, kw_only=True)
class DetectionConfig(DenseConfig):
    """Detection by Faster R-CNN, or Mask R-CNN where every object has its outline. Images fit into ``img_size``."""

    batch_size: int = option(8, "images per step", "dense")
    scale: tuple[float, ...] = option((0.5, 1.5), "range of the random scale in training", "dense")
    instance_masks: bool = option(True, "learn masks where the data has them (Mask R-CNN)", "dense")


_RANGES: dict[str, tuple[float, float]] = {
    "epochs": (0, math.inf),
    "steps": (1, math.inf),
    "img_size": (8, math.inf),
    "resize": (8, math.inf),
    "batch_size": (1, math.inf),
    "accumulate": (1, math.inf),
    "blr": (0, math.inf),
    "min_lr": (0, math.inf),
    "warmup": (0, 1),
    "weight_decay": (0, math.inf),
    "layer_decay": (0, 1),
    "drop_path": (0, 0.99),
    "clip_grad": (0, math.inf),
    "decoder_dim": (16, math.inf),
    "scale": (0.05, 20),
    "num_classes": (2, 30_000),
    "ignore_index": (0, 65_535),
    "num_images": (0, 1000),
    "num_evals": (0, 1000),
    "checkpoint_every": (1, math.inf),
    "log_every": (1, math.inf),
}
