"""Settings of segmentation and detection. Imports no torch."""

import math
from dataclasses import dataclass
from typing import ClassVar, Self

from dmjd.config.checks import MAX_BATCH_SIZE, MAX_COUNT, MAX_EPOCHS, MAX_FACTOR, MAX_SIDE, MAX_WIDTH
from dmjd.config.evaluation import COMMON, EvaluationConfig
from dmjd.config.fields import PRECISIONS, option

DECODERS = ("upernet", "linear")

INFERENCE = ("whole", "slide")

DECODER_MULTIPLE = 16  # of UPerNet's width: its pools have a quarter of the channels, in groups of at least 4


@dataclass(frozen=True, kw_only=True)
class DenseConfig(EvaluationConfig):
    """Settings shared by segmentation and detection: length and schedule of the training, image size."""

    precision: str = option("auto", "auto: bf16 on GPUs that support it, else fp32", COMMON, choices=PRECISIONS)

    epochs: float | None = option(None, "length of a training in epochs; default 50", "dense", gt=0, most=MAX_EPOCHS)
    steps: int | None = option(None, "length of a training in steps, instead of epochs", "dense", ge=1, most=MAX_COUNT)
    img_size: tuple[int, ...] | None = option(
        None,
        "image side in pixels, or height and width; default the encoder's",
        "dense",
        ge=8,
        most=MAX_SIDE,
        length=(1, 2),
    )
    batch_size: int = option(16, "images per step", "dense", ge=1, most=MAX_BATCH_SIZE)
    accumulate: int = option(1, "micro-batches per step: less memory", "dense", ge=1, most=MAX_BATCH_SIZE)
    blr: float | None = option(
        None,
        "base learning rate, lr = blr * batch / 256; default 1e-3 * sqrt(256 / batch)",
        "dense",
        gt=0,
        most=MAX_FACTOR,
    )
    min_lr: float = option(1e-6, "final learning rate", "dense", ge=0, most=MAX_FACTOR)
    warmup: float = option(0.1, "fraction of the training with linear warm-up", "dense", ge=0, le=1)
    weight_decay: float = option(0.05, "weight decay of AdamW, not on biases and norms", "dense", ge=0, most=MAX_FACTOR)
    layer_decay: float = option(
        0.75, "learning-rate factor from a layer to the one below; 1 from scratch", "dense", gt=0, le=1
    )
    drop_path: float = option(0.1, "stochastic depth rate of the encoder's last block", "dense", ge=0, le=0.99)
    clip_grad: float | None = option(3.0, "maximum gradient norm", "dense", gt=0, most=1e9)
    freeze: bool = option(False, "train the decoder only; the encoder is frozen", "dense")
    decoder_dim: int = option(256, "width of the decoder or feature pyramid", "dense", ge=16, most=MAX_WIDTH)
    flip: bool = option(True, "random left-right flips", "dense")
    num_images: int = option(6, "test images drawn with their predictions", "dense", ge=0, most=1000)
    num_evals: int = option(4, "evaluations on a part of the test set during training", "dense", ge=0, most=1000)
    checkpoint_every: int = option(200, "steps between checkpoints", "dense", ge=1, most=MAX_COUNT)
    log_every: int = option(20, "steps between lines of metrics.jsonl", "dense", ge=1, most=MAX_COUNT)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give --epochs or --steps, not both")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not divisible by accumulate {self.accumulate}")

    def resolve(self, img_size: tuple[int, int], num_images: int) -> Self:
        """Fill in the defaults for an encoder of ``img_size`` and a training set of ``num_images``.

        The learning rate scales with the square root of the batch, because AdamW's steps do not shrink with the
        gradient: 2.5e-4 at 16. A batch is never larger than the training set.
        """
        batch = min(self.batch_size, num_images // self.accumulate * self.accumulate)
        if batch == 0:
            raise ValueError(f"{num_images} training image(s) are too few for --accumulate {self.accumulate}")
        size = self.img_size or img_size
        return self.replace(
            epochs=50.0 if self.epochs is None and self.steps is None else self.epochs,
            img_size=(size[0], size[-1]),
            batch_size=batch,
            blr=self.blr or 1e-3 * math.sqrt(256 / batch),
        )

    @property
    def lr(self) -> float:
        """Peak learning rate, for a resolved configuration."""
        assert self.blr is not None
        return self.blr * self.batch_size / 256

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) that images are resized to, for a resolved configuration."""
        assert self.img_size is not None
        return self.img_size[0], self.img_size[-1]


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig(DenseConfig):
    """Semantic segmentation. Images are resized to cover ``resize``; crops and sliding windows are ``img_size``."""

    task: ClassVar[str] = "segmentation"

    data: str | None = option(None, "folder with train/images and train/masks, or a table", COMMON)

    decoder: str = option("upernet", "upernet, or linear: one layer on the last feature map", "dense", choices=DECODERS)
    resize: tuple[int, ...] | None = option(
        None,
        "side, or height and width, that images cover before cropping; default --img-size",
        "dense",
        ge=8,
        most=MAX_SIDE,
        length=(1, 2),
    )
    scale: tuple[float, ...] = option(
        (0.5, 2.0), "range of the random scaling in training", "dense", ge=0.05, le=20, length=(2,)
    )
    color_jitter: bool = option(True, "random brightness, contrast, saturation and hue", "dense")
    inference: str = option(
        "whole", "whole image at once, or slide: sliding windows of --img-size", "dense", choices=INFERENCE
    )
    num_classes: int | None = option(
        None, "number of classes; default by classes.txt, else by the training masks", "dense", ge=2, le=30_000
    )
    ignore_index: tuple[int, ...] = option((255,), "mask values that mean no label", "dense", ge=0, le=65_535)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decoder_dim % DECODER_MULTIPLE:
            given, nearest = self.decoder_dim, round(self.decoder_dim / DECODER_MULTIPLE) * DECODER_MULTIPLE
            raise ValueError(
                f"decoder_dim must be a multiple of {DECODER_MULTIPLE}, got {given}: the nearest is {nearest}"
            )

    @property
    def covered(self) -> tuple[int, int]:
        """(height, width) that images cover before cropping, for a resolved configuration."""
        return (self.resize[0], self.resize[-1]) if self.resize is not None else self.size


@dataclass(frozen=True, kw_only=True)
class DetectionConfig(DenseConfig):
    """Detection with Faster R-CNN, or Mask R-CNN where the data has instance masks. Images fit into ``img_size``."""

    task: ClassVar[str] = "detection"

    data: str | None = option(None, "folder with train/ and train.json in COCO format", COMMON)

    batch_size: int = option(8, "images per step", "dense", ge=1, most=MAX_BATCH_SIZE)
    scale: tuple[float, ...] = option(
        (0.5, 1.5), "range of the random scaling in training", "dense", ge=0.05, le=20, length=(2,)
    )
    instance_masks: bool = option(True, "train on instance masks where the data has them (Mask R-CNN)", "dense")
