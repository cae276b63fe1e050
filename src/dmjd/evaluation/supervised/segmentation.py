"""Semantic segmentation, from a pre-trained encoder and from random weights."""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from dmjd.config.dense import SegmentationConfig
from dmjd.data.dense_loader import Augmentation, Example, ExampleBatch, MaskAugment
from dmjd.data.dense_transforms import IGNORE, GeometricTransform, cover_scale, scaled_size, transform_image
from dmjd.data.sources.base import Source
from dmjd.data.sources.segmentation_masks import (
    SegmentationSource,
    has_segmentation_split,
    open_segmentation,
    resolve_classes,
)
from dmjd.data.statistics import warn_of_range
from dmjd.encoders.base import Encoder, known_preprocess
from dmjd.engine.loop import Task
from dmjd.evaluation.metrics import iou_scores
from dmjd.evaluation.supervised.dense_task import DenseEvaluation, open_encoder, open_parts, rounded_up
from dmjd.evaluation.supervised.pyramid import EncoderMaps, LastMap, LinearDecoder, Pyramid, UPerNet
from dmjd.figures.overlays import save_overlays, segmentation_panels
from dmjd.images.preprocess import Preprocess
from dmjd.nn.dropout import set_row_keys
from dmjd.warning import DMJDWarning

OVERLAP = 1 / 3  # common overlap of neighboring sliding windows

_WINDOWS_AT_ONCE = 8


class SegmentationTask(Task):
    """Encoder, decoder and cross-entropy over the labeled pixels.

    Args:
        encoder: encoder for the size of the canvas.
        config: resolved configuration.
        num_classes: K.
    """

    def __init__(self, encoder: Encoder, config: SegmentationConfig, num_classes: int) -> None:
        super().__init__()
        self.config, self.preprocess = config, known_preprocess(encoder)
        self.decoder: nn.Module
        if config.decoder == "linear":
            self.maps: EncoderMaps = LastMap(encoder, config.freeze)
            self.decoder = LinearDecoder(encoder.embed_dim, num_classes)
        else:
            pyramid = Pyramid(encoder, config.freeze)
            self.maps, self.decoder = pyramid, UPerNet(pyramid.widths, config.decoder_dim, num_classes)

    @property
    def encoder(self) -> Encoder:
        """The encoder."""
        return self.maps.encoder

    def logits(self, images: Tensor) -> Tensor:
        """[B, C, H, W] on the 0..255 scale, sides divisible by the patch -> [B, K, H, W] float32."""
        logits = self.decoder(self.maps(self.preprocess.normalize(images))).float()
        return F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)

    def forward(self, batch: ExampleBatch) -> dict[str, Tensor]:
        """{"loss"}: mean over the labeled pixels; 0 if a batch has none."""
        if batch.keys is not None:
            set_row_keys(self, batch.keys)
        target = batch.targets.long()
        total = F.cross_entropy(self.logits(batch.images), target, ignore_index=IGNORE, reduction="sum")
        return {"loss": total / (target != IGNORE).sum().clamp(min=1)}


def predict(task: SegmentationTask, images: Sequence[np.ndarray]) -> list[Tensor]:
    """Predict the class of every pixel of images at their own size.

    An image is resized to cover ``config.covered`` and padded to a multiple of the patch. The padding is cut off before
    the scores are resized back.

    Args:
        task: a task in evaluation mode.
        images: [H, W, C] on the 0..255 scale, of any sizes.

    Returns:
        [H, W] int64 each, on the task's device.
    """
    device = next(task.parameters()).device
    transforms = [_test_transform(image, task) for image in images]
    canvases = [
        transform_image(image, transform, fill_of(task.preprocess)).float()
        for image, transform in zip(images, transforms, strict=True)
    ]
    logits: list[Tensor | None] = [None] * len(canvases)
    for shape in {canvas.shape for canvas in canvases}:  # canvases of one shape are a batch
        rows = [i for i, canvas in enumerate(canvases) if canvas.shape == shape]
        batch = torch.stack([canvases[i] for i in rows]).to(device)
        for i, scores in zip(rows, _scores(task, batch), strict=True):
            logits[i] = scores
    predictions = []
    for scores, transform in zip(logits, transforms, strict=True):
        assert scores is not None
        own = scores[None, :, : transform.resized[0], : transform.resized[1]]
        full = F.interpolate(own, size=transform.image, mode="bilinear", align_corners=False)[0]
        predictions.append(full.argmax(0))
    return predictions


def _test_transform(image: np.ndarray, task: SegmentationTask) -> GeometricTransform:
    """Fit the whole image at test size on a canvas divisible by the patch, at least as large as a window."""
    size, config, patch = (image.shape[0], image.shape[1]), task.config, _patch(task)
    resized = scaled_size(size, cover_scale(size, config.covered))
    canvas = rounded_up(resized, patch)
    if config.inference == "slide":
        window = rounded_up(config.size, patch)
        canvas = (max(canvas[0], window[0]), max(canvas[1], window[1]))
    return GeometricTransform(size, resized, canvas)


def _patch(task: SegmentationTask) -> int:
    return task.encoder.patch_size


def _scores(task: SegmentationTask, images: Tensor) -> Tensor:
    """[B, C, H, W] on the 0..255 scale -> logits [B, K, H, W], of the whole image or averaged over windows."""
    if task.config.inference == "whole":
        return task.logits(images)
    window = rounded_up(task.config.size, _patch(task))
    corners = [(top, left) for top in starts(images.shape[2], window[0]) for left in starts(images.shape[3], window[1])]
    total, counts = None, images.new_zeros(1, 1, *images.shape[2:])
    for first in range(0, len(corners), _WINDOWS_AT_ONCE):
        part = corners[first : first + _WINDOWS_AT_ONCE]
        windows = torch.cat([images[..., t : t + window[0], n : n + window[1]] for t, n in part])
        logits = task.logits(windows).unflatten(0, (len(part), len(images)))
        if total is None:
            total = logits.new_zeros(len(images), logits.shape[2], *images.shape[2:])
        for (t, n), scores in zip(part, logits, strict=True):
            total[..., t : t + window[0], n : n + window[1]] += scores
            counts[..., t : t + window[0], n : n + window[1]] += 1
    assert total is not None
    return total / counts


def starts(length: int, window: int) -> list[int]:
    """Starts of windows that cover ``length``, each overlapping the next by at least a third."""
    stride = max(1, int(window * (1 - OVERLAP)))
    return sorted({min(start, length - window) for start in range(0, length - window + stride, stride)})


def fill_of(preprocess: Preprocess) -> tuple[float, ...]:
    """The padding value per channel on the 0..255 scale: 0 after normalization."""
    return tuple(255 * mean for mean in preprocess.mean)


class Segmentation(DenseEvaluation):
    """Segmentation of one pair of sets; arguments as :class:`DenseEvaluation`."""

    name = "segmentation"
    score = "miou"
    config: SegmentationConfig
    train: SegmentationSource
    test: SegmentationSource

    @property
    def canvas(self) -> tuple[int, int]:
        """(h, w) of training crops."""
        return rounded_up(self.config.size, self.encoder.patch_size)

    def build(self, encoder: Encoder) -> SegmentationTask:
        """Build the task for an encoder."""
        return SegmentationTask(encoder, self.config, len(self.train.classes))

    def augment(self) -> Augmentation:
        """The augmentation of training images and masks."""
        config = self.config
        scale = (config.scale[0], config.scale[1])
        fill = fill_of(known_preprocess(self.encoder))
        return MaskAugment(self.canvas, config.covered, fill, scale, config.flip, config.color_jitter)

    def measure(self, task: SegmentationTask, source: Source, rows: np.ndarray | None = None) -> dict[str, Any]:
        """Scores on images ``rows`` (None: all) of a set, at their own size; None if ``rows`` have no label."""
        metric = MulticlassConfusionMatrix(len(self.train.classes), ignore_index=IGNORE, validate_args=False)
        for example, prediction in self._predictions(task, source, rows):
            metric.update(prediction.cpu(), torch.from_numpy(example.target).long())
        confusion = metric.compute()
        if int(confusion.sum()) == 0:
            if rows is None:
                raise ValueError(f"no pixel of the images of {source.name} has a label")
            text = f"no pixel of {len(rows)} images of {source.title} has a label: {self.score} counts as 0 meanwhile"
            warnings.warn(text, DMJDWarning, stacklevel=2)
            return {self.score: None}
        return iou_scores(confusion, self.train.classes)

    def draw(self, task: SegmentationTask, rows: np.ndarray, file: Path) -> None:
        """Save images, their masks and predictions."""
        panels = [
            (e.image, e.target, prediction.cpu().numpy()) for e, prediction in self._predictions(task, self.test, rows)
        ]
        save_overlays(segmentation_panels(panels, self.train.classes), file)

    def _predictions(
        self, task: SegmentationTask, source: Source, rows: np.ndarray | None
    ) -> Iterator[tuple[Example, Tensor]]:
        for examples in self.read(source, rows):
            yield from zip(examples, predict(task, [example.image for example in examples]), strict=True)

    def describe(self) -> dict[str, Any]:
        """Classes and ignored numbers of the masks."""
        assert self.train.class_map is not None
        classes = self.train.class_map
        return {"classes": list(classes.names), "numbers": classes.numbers, "ignored": list(classes.ignored)}


def _labeled_validation(
    config: SegmentationConfig, test: SegmentationSource, val: SegmentationSource | None
) -> SegmentationSource | None:
    """The validation set if its masks have labels. Withheld labels are common.

    Raises:
        ValueError: if the masks of the test set have none.
    """
    unlabeled, has_val = "hold only numbers that mean no label (--ignore-index)", val is not None and val.has_labels
    if not test.has_labels:
        hint = "; --split val tests on the validation part" if has_val and config.test_data is None else ""
        raise ValueError(f"the masks of {test.name} {unlabeled}: there is nothing to test on{hint}")
    if val is not None and not has_val:
        text = f"the masks of {val.name} {unlabeled}: part of the test set is used while it trains"
        warnings.warn(text, DMJDWarning, stacklevel=3)
    return val if has_val else None


def segmentation(run: str | Path, **options: Any) -> dict[str, Any]:
    """Train a segmentation model from a pre-trained encoder, and one from random weights with the same schedule.

    Each training has its own folder under ``evaluation/segmentation/``. Called again, it resumes, and skips what is
    finished.

    Args:
        run: a run folder; or an encoder file or checkpoint, with ``out``.
        options: settings, the fields of :class:`~dmjd.config.dense.SegmentationConfig`. ``data`` is required: see
            :func:`~dmjd.data.sources.segmentation_masks.open_segmentation`.

    Returns:
        The content of ``evaluation/segmentation.json``: "result" and "random_init" with "miou", "iou" by class,
        "pixel_accuracy", "mean_accuracy", all of the last step on the whole test set; configuration, data, ...

    Raises:
        Stopped: after a signal; everything is saved.
        ValueError: if settings or data are invalid; raised before training.
    """
    config = SegmentationConfig(**options)
    overrides = config.given(options)
    encoder, folder = open_encoder(run, config.out)
    if config.data is None:
        raise ValueError("say which images and masks: --data FOLDER (with train/images and train/masks)")
    preprocess = known_preprocess(encoder)
    reading: dict[str, Any] = {"in_chans": preprocess.in_chans, "value_range": preprocess.value_range}
    reading["invalid"] = preprocess.filling
    train = open_segmentation(config.data, "train", **reading)
    test, val = open_parts(
        config, lambda data, split: open_segmentation(data, split, **reading), has_segmentation_split
    )
    warn_of_range(train.images)
    resolve_classes(train, [test] if val is None else [test, val], config.num_classes, config.ignore_index)
    val = _labeled_validation(config, test, val)
    config = config.resolve(encoder.img_size, len(train))
    evaluation = Segmentation(
        config,
        encoder,
        train,
        test,
        device=config.device,
        precision=config.precision,
        num_workers=config.num_workers,
        seed=config.seed,
        val=val,
    )
    return evaluation.compare(folder, overrides)
