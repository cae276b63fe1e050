"""The settings of fine-tuning: one frozen dataclass, from which the command-line flags are made. Imports no torch.

The published recipe (MAE, ConvMAE, DMJD: ImageNet, 224 pixels, 100 epochs) where the set and the run are of that kind,
and a milder one elsewhere; :meth:`FinetuneConfig.resolve` says when and why.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dmjd.config.fields import check_types, option

SMALL_SIDE = 96  # pixels; smaller images lose their objects in crops of 8 % of the area

MANY_IMAGES = 1_000_000  # shown over a run: from here on a network overfits before it underfits strong augmentation

LARGE_WIDTH = 1024  # of the encoders the paper calls large

MAX_BATCH, MIN_BATCH, BATCHES_PER_EPOCH = 1024, 16, 32


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Fine-tuning of an encoder as a classifier. None means "by the rule in the help text".

    Raises:
        ValueError: for values that cannot be, naming the field.
    """

    epochs: float | None = option(None, "length; default 100, or 50 for a large encoder", "finetune")
    steps: int | None = option(None, "length, instead of epochs", "finetune")
    batch_size: int | None = option(None, "images per step; default a 32nd of the set, 16 to 1024", "finetune")
    accumulate: int = option(1, "parts a step's batch is computed in: less memory, same result", "finetune")
    blr: float | None = option(
        None, "base rate, lr = blr * batch / 256; default 5e-4, times sqrt(1024 / batch) below 1024", "finetune"
    )
    min_lr: float = option(1e-6, "rate at the end", "finetune")
    warmup_epochs: float = option(5.0, "with a rising rate; at most a fifth of the run", "finetune")
    weight_decay: float = option(0.05, "of AdamW, not on biases and norms", "finetune")
    layer_decay: float | None = option(
        None, "rate of a layer over that of the next; default 0.65, 0.75 for a large encoder", "finetune"
    )
    drop_path: float | None = option(None, "stochastic depth; default 0.1, 0.2 for a large encoder", "finetune")
    clip_grad: float | None = option(None, "largest gradient norm; default no clipping", "finetune")
    crop_scale: tuple[float, ...] | None = option(
        None, "area of random crops; default 0.08 1, or 0.5 1 below 96 pixels", "finetune"
    )
    flip: bool = option(True, "random left-right flips; default as in pre-training", "finetune")
    rand_augment: float | None = option(
        None, "magnitude of RandAugment, 0 for none; default 9, or 5 in short runs", "finetune"
    )
    erase: float | None = option(None, "chance of random erasing; default 0.25, or 0 in short runs", "finetune")
    mixup: float | None = option(None, "alpha of mixup, 0 for none; default 0.8, or 0 in short runs", "finetune")
    cutmix: float | None = option(None, "alpha of cutmix, 0 for none; default 1, or 0 in short runs", "finetune")
    switch: float = option(0.5, "chance of cutmix where both are on", "finetune")
    label_smoothing: float = option(0.1, "share of the target spread over all classes", "finetune")
    test_crop: float | None = option(
        None, "share of each side kept at test; default 0.875 (256 to 224), or 1 below 96 pixels", "finetune"
    )
    ema: float | None = option(None, "decay of a moving average of the weights; default none", "finetune")
    eval_every: float = option(0.1, "share of the run between looks at the test set", "finetune")
    checkpoint_every: int = option(500, "steps between checkpoints", "finetune")
    log_every: int = option(20, "steps between lines of metrics.jsonl", "finetune")

    def __post_init__(self) -> None:
        check_types(self)
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            for v in value if isinstance(value, tuple) else (value,) if value is not None else ():
                if not (low <= v <= high and math.isfinite(v)):
                    words = f"be at least {low:g}" if math.isinf(high) else f"lie between {low:g} and {high:g}"
                    raise ValueError(f"{name} must {words}, got {v}")
        for name in ("epochs", "steps", "blr", "layer_decay", "test_crop", "ema", "clip_grad"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name} must be greater than 0")
        if self.crop_scale is not None and not (len(self.crop_scale) == 2 and self.crop_scale[0] > 0):
            raise ValueError(f"crop_scale takes two numbers above 0, got {self.crop_scale}")
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give --epochs or --steps, not both")

    def resolve(self, num_images: int, img_size: tuple[int, int], embed_dim: int) -> "FinetuneConfig":
        """All settings for a training set: what was given, the rest by these rules.

        - batch: a 32nd of the set, even (mixing pairs images), 16 to 1024, so that small sets get enough steps;
        - rate: the published one at the published batch of 1024, below with the root of the batch: AdamW's steps do
          not shrink with the gradient, and the linear rule would leave hardly any rate for a batch of 16;
        - images below 96 pixels: crops of at least half the area, and the whole image at test;
        - runs that show fewer than a million images: no mixing and erasing, RandAugment 5 instead of 9. A network
          sees each label too rarely to fit targets that are mixed;
        - large encoders: the paper's 50 epochs, layer decay 0.75, drop path 0.2.

        Args:
            num_images: of the training set. img_size: (H, W) of the encoder. embed_dim: its width.

        Returns:
            a configuration without None but for ``clip_grad``, ``ema``, and one of ``epochs`` and ``steps``.
        """
        large, small = embed_dim >= LARGE_WIDTH, min(img_size) < SMALL_SIDE
        batch = self.batch_size or max(MIN_BATCH, min(MAX_BATCH, num_images // BATCHES_PER_EPOCH // 2 * 2))
        epochs = self.epochs if self.epochs is not None or self.steps is not None else (50.0 if large else 100.0)
        shown = self.steps * batch if self.steps is not None else (epochs or 0.0) * num_images
        strong = shown >= MANY_IMAGES
        defaults: dict[str, Any] = {
            "epochs": epochs,
            "batch_size": batch,
            "blr": 5e-4 * max(1.0, math.sqrt(MAX_BATCH / batch)),
            "layer_decay": 0.75 if large else 0.65,
            "drop_path": 0.2 if large else 0.1,
            "crop_scale": (0.5, 1.0) if small else (0.08, 1.0),
            "test_crop": 1.0 if small else 0.875,
            "rand_augment": 9.0 if strong else 5.0,
            "erase": 0.25 if strong else 0.0,
            "mixup": 0.8 if strong else 0.0,
            "cutmix": 1.0 if strong else 0.0,
        }
        changes = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **changes)

    def identity(self) -> dict[str, Any]:
        """The settings a result depends on, as JSON types."""
        named = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in named.items() if k not in _OF_THE_MACHINE}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "FinetuneConfig":
        """From names and values; ValueError for a name that is none."""
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(options) - set(known)):
            raise ValueError(f"'finetune' does not take {', '.join(unknown)}; it takes {', '.join(known)}")
        return cls(**options)


_OF_THE_MACHINE = ("checkpoint_every", "log_every")

_RANGES: dict[str, tuple[float, float]] = {
    "epochs": (0, math.inf),
    "steps": (0, math.inf),
    "batch_size": (2, math.inf),
    "accumulate": (1, math.inf),
    "blr": (0, math.inf),
    "min_lr": (0, math.inf),
    "warmup_epochs": (0, math.inf),
    "weight_decay": (0, math.inf),
    "layer_decay": (0, 1),
    "drop_path": (0, 0.99),
    "clip_grad": (0, math.inf),
    "crop_scale": (0, 1),
    "rand_augment": (0, 10),
    "erase": (0, 1),
    "mixup": (0, math.inf),
    "cutmix": (0, math.inf),
    "switch": (0, 1),
    "label_smoothing": (0, 0.99),
    "test_crop": (0, 1),
    "ema": (0, 0.999999),
    "eval_every": (0, 1),
    "checkpoint_every": (1, math.inf),
    "log_every": (1, math.inf),
}
