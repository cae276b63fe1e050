"""Settings of fine-tuning. Imports no torch.

The published recipe (MAE, ConvMAE, DMJD: ImageNet, 224 pixels, 100 epochs) for data sets and runs of that size, and a
milder one for smaller ones: see :meth:`FinetuneConfig.resolve`.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from dmjd.config.checks import MAX_BATCH_SIZE, MAX_COUNT, MAX_EPOCHS, MAX_FACTOR
from dmjd.config.evaluation import COMMON, LabeledConfig
from dmjd.config.fields import PRECISIONS, option
from dmjd.config.schedules import steps_of_epochs

SMALL_SIDE = 96  # pixels; in smaller images, crops of 8 % of the area lose the object

MANY_IMAGES = 1_000_000  # samples in a run; shorter runs underfit with strong augmentation

LARGE_WIDTH = 1024  # embedding width of the paper's large encoders

MAX_BATCH, MIN_BATCH, BATCHES_PER_EPOCH = 1024, 16, 32

SHORT_STEPS = 100  # in trainings of at most so many, layer decay was measured to cost accuracy

FEW_EPOCHS, LONG_EPOCHS, MANY_STEPS = 5, 50, 1000  # see FinetuneConfig.too_short


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(LabeledConfig):
    """Fine-tuning of an encoder as a classifier. None means the default named in the help text."""

    task: ClassVar[str] = "finetune"

    precision: str = option("auto", "auto: bf16 on GPUs that support it, else fp32", COMMON, choices=PRECISIONS)

    epochs: float | None = option(
        None,
        "length of the training in epochs; default 100, or 50 for a large encoder",
        "finetune",
        gt=0,
        most=MAX_EPOCHS,
    )
    steps: int | None = option(
        None, "length of a training in steps, instead of epochs", "finetune", ge=1, most=MAX_COUNT
    )
    batch_size: int | None = option(
        None, "images per step; default 1/32 of the training set, 16 to 1024", "finetune", ge=2, most=MAX_BATCH_SIZE
    )
    accumulate: int = option(
        1,
        "micro-batches per step: less memory, same result",
        "finetune",
        ge=1,
        most=MAX_BATCH_SIZE,
    )
    blr: float | None = option(
        None,
        "base learning rate, lr = blr * batch / 256; default 5e-4 * sqrt(1024 / batch), at least 5e-4",
        "finetune",
        gt=0,
        most=MAX_FACTOR,
    )
    min_lr: float = option(1e-6, "final learning rate", "finetune", ge=0, most=MAX_FACTOR)
    warmup_epochs: float = option(
        5.0, "epochs of linear warm-up; at most a fifth of the training", "finetune", ge=0, most=MAX_EPOCHS
    )
    weight_decay: float = option(
        0.05, "weight decay of AdamW, not on biases and norms", "finetune", ge=0, most=MAX_FACTOR
    )
    layer_decay: float | None = option(
        None,
        "learning-rate factor from a layer to the one below; default 0.65, 0.75 for a large encoder, 1 up to 100 steps",
        "finetune",
        gt=0,
        le=1,
    )
    drop_path: float | None = option(
        None, "stochastic depth rate of the last block; default 0.1, 0.2 for a large encoder", "finetune", ge=0, le=0.99
    )
    clip_grad: float | None = option(None, "maximum gradient norm; default no clipping", "finetune", gt=0, most=1e9)
    crop_scale: tuple[float, ...] | None = option(
        None,
        "range of the area of random crops; default 0.08 1, or 0.5 1 below 96 pixels",
        "finetune",
        gt=0,
        le=1,
        length=(2,),
    )
    flip: bool = option(True, "random left-right flips; default as in pre-training", "finetune")
    rand_augment: float | None = option(
        None, "magnitude of RandAugment, 0: off; default 9, or 5 in short runs", "finetune", ge=0, le=10
    )
    erase: float | None = option(
        None, "probability of random erasing; default 0.25, or 0 in short runs", "finetune", ge=0, le=1
    )
    mixup: float | None = option(
        None, "alpha of mixup, 0: off; default 0.8, or 0 in short runs", "finetune", ge=0, most=1000
    )
    cutmix: float | None = option(
        None, "alpha of CutMix, 0: off; default 1, or 0 in short runs", "finetune", ge=0, most=1000
    )
    switch: float = option(0.5, "probability of CutMix where both are on", "finetune", ge=0, le=1)
    label_smoothing: float = option(0.1, "label smoothing", "finetune", ge=0, le=0.99)
    test_crop: float | None = option(
        None,
        "fraction of each side kept by the center crop at test; default 0.875, or 1 below 96 pixels",
        "finetune",
        gt=0,
        le=1,
    )
    ema: float | None = option(
        None, "decay of an exponential moving average of the weights; default none", "finetune", gt=0, le=0.999999
    )
    eval_every: float = option(0.1, "fraction of the training between evaluations", "finetune", ge=0, le=1)
    checkpoint_every: int = option(500, "steps between checkpoints", "finetune", ge=1, most=MAX_COUNT)
    log_every: int = option(20, "steps between lines of metrics.jsonl", "finetune", ge=1, most=MAX_COUNT)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give --epochs or --steps, not both")

    def resolve(self, num_images: int, img_size: tuple[int, int], embed_dim: int) -> Self:
        """Fill in the defaults for a training set and an encoder.

        - Batch size: 1/32 of the training set, even (mixup pairs images), 16 to 1024, so that small sets get enough
          steps.
        - Learning rate: the published one at the published batch of 1024. Below, it scales with the square root of
          the batch: AdamW's steps do not shrink with the gradient, and linear scaling leaves hardly any learning rate
          for a batch of 16.
        - Images below 96 pixels: crops of at least half the area, and the whole image at test.
        - Runs of fewer than a million samples: no mixup, CutMix and erasing, and RandAugment 5 instead of 9. Such
          runs show each label too rarely to fit mixed targets.
        - Large encoders: the paper's 50 epochs, layer decay 0.75, drop path 0.2.
        - Trainings of at most 100 steps: no layer decay, as from scratch. Its low learning rates would leave the early
          layers as they are.

        Args:
            num_images: size of the training set.
            img_size: (H, W) of the encoder.
            embed_dim: width of the encoder.

        Returns:
            A configuration in which only ``clip_grad``, ``ema``, and one of ``epochs`` and ``steps`` may be None.
        """
        large, small = embed_dim >= LARGE_WIDTH, min(img_size) < SMALL_SIDE
        batch = self.batch_size or max(MIN_BATCH, min(MAX_BATCH, num_images // BATCHES_PER_EPOCH // 2 * 2))
        epochs = self.epochs if self.epochs is not None or self.steps is not None else (50.0 if large else 100.0)
        shown = self.steps * batch if self.steps is not None else (epochs or 0.0) * num_images
        strong, short = shown >= MANY_IMAGES, self._num_steps(epochs, num_images, batch) <= SHORT_STEPS
        defaults: dict[str, Any] = {
            "epochs": epochs,
            "batch_size": batch,
            "blr": 5e-4 * max(1.0, math.sqrt(MAX_BATCH / batch)),
            "layer_decay": 1.0 if short else 0.75 if large else 0.65,
            "drop_path": 0.2 if large else 0.1,
            "crop_scale": (0.5, 1.0) if small else (0.08, 1.0),
            "test_crop": 1.0 if small else 0.875,
            "rand_augment": 9.0 if strong else 5.0,
            "erase": 0.25 if strong else 0.0,
            "mixup": 0.8 if strong else 0.0,
            "cutmix": 1.0 if strong else 0.0,
        }
        changes = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return self.replace(**changes)

    def too_short(self, num_images: int) -> str | None:
        """Why a training with this resolved configuration is too short to judge an encoder by; None if it is not.

        It is long enough with 50 epochs, with 1,000 steps, or with 5 epochs and more than 100 steps.
        """
        assert self.batch_size is not None
        steps = self._num_steps(self.epochs, num_images, self.batch_size)
        epochs = steps * self.batch_size / num_images
        if epochs >= LONG_EPOCHS or steps >= MANY_STEPS or (epochs >= FEW_EPOCHS and steps > SHORT_STEPS):
            return None
        return f"{steps} steps ({epochs:.1f} epochs) are too few to judge the encoder by; give more --steps or --epochs"

    def _num_steps(self, epochs: float | None, num_images: int, batch_size: int) -> int:
        return self.steps if self.steps is not None else steps_of_epochs(epochs or 0.0, num_images, batch_size)

    def identity(self) -> dict[str, Any]:
        """Settings that a result depends on, as JSON types."""
        return {name: value for name, value in self.to_dict().items() if name not in _NOT_IN_IDENTITY}


_NOT_IN_IDENTITY = ("checkpoint_every", "log_every")  # these do not change a result
