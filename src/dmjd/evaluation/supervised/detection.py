"""Detection with Faster or Mask R-CNN, from a pre-trained encoder and from random weights."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from dmjd.config.dense import DetectionConfig
from dmjd.data.dense_loader import Augmentation, BoxAugment, ExampleBatch
from dmjd.data.dense_transforms import GeometricTransform, boxes_to_image, fit_scale, scaled_size, transform_image
from dmjd.data.sources.coco import CocoSource, Instances, find_coco, open_coco
from dmjd.data.statistics import warn_of_range
from dmjd.encoders.base import Encoder, known_preprocess
from dmjd.engine.device import seed_device
from dmjd.engine.loop import Task
from dmjd.evaluation.metrics import average_precisions
from dmjd.evaluation.supervised.dense_task import DenseEvaluation, open_encoder, open_parts, rounded_up
from dmjd.evaluation.supervised.pyramid import LEVELS, Pyramid, group_norm, strides_of
from dmjd.evaluation.supervised.segmentation import fill_of
from dmjd.figures.overlays import detection_panels, save_overlays
from dmjd.nn.dropout import set_row_keys
from dmjd.rng import STREAM_PROPOSALS, hash64

ANCHOR_SCALE = 1 / 32  # side of the smallest anchors over the longer side of the canvas: COCO's 32 of 1024 pixels

ROIS_PER_IMAGE = 128  # proposals per image to train the box head (Ren et al. 2015)

MASK_HEAD = 256  # width of torchvision's mask head

MIN_SHOWN_SCORE = 0.5  # smallest score of boxes in figures

MASK_THRESHOLD = 0.5

_LEVEL_NAMES = [str(level) for level in range(LEVELS)]


class _Backbone(nn.Module):
    """Encoder and feature pyramid as a torchvision backbone: float32 maps by name, under any autocast."""

    def __init__(self, pyramid: Pyramid, dim: int) -> None:
        super().__init__()
        self.pyramid, self.out_channels = pyramid, dim
        self.fpn = FeaturePyramidNetwork(pyramid.widths, dim, LastLevelMaxPool(), norm_layer=group_norm)
        self.autocast = False

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """[B, C, H, W] normalized -> name -> [B, dim, h, w]."""
        dtype = torch.get_autocast_dtype(images.device.type)
        with torch.autocast(images.device.type, dtype, enabled=self.autocast):
            maps = self.pyramid(images)
            named = self.fpn(OrderedDict(zip(_LEVEL_NAMES, maps, strict=True)))
        return OrderedDict((name, x.float()) for name, x in named.items())


class DetectionTask(Task):
    """torchvision's Faster R-CNN (Ren et al. 2015) or Mask R-CNN (He et al. 2017) on an encoder's pyramid.

    Args:
        encoder: encoder for the size of the canvas.
        config: resolved configuration.
        num_classes: number of object classes.
        masks: train on instance masks.
    """

    def __init__(self, encoder: Encoder, config: DetectionConfig, num_classes: int, masks: bool) -> None:
        super().__init__()
        self.config, self.preprocess, self.masks = config, known_preprocess(encoder), masks
        self.canvas = encoder.img_size
        dim, K = config.decoder_dim, num_classes + 1  # class 0 is the background
        smallest = max(self.canvas) * ANCHOR_SCALE
        sizes = tuple((round(smallest * 2**level, 1),) for level in range(LEVELS + 1))
        heads: dict[str, Any] = {}
        if masks:
            heads["mask_roi_pool"] = _roi_pool(14)
            heads["mask_predictor"] = MaskRCNNPredictor(MASK_HEAD, dim, K)
        self.rcnn = (MaskRCNN if masks else FasterRCNN)(
            _Backbone(Pyramid(encoder, config.freeze), dim),
            image_mean=list(self.preprocess.mean),
            image_std=list(self.preprocess.std),
            fixed_size=self.canvas[::-1],  # images come on canvases: no resizing, no further padding
            size_divisible=1,
            rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
            box_roi_pool=_roi_pool(7),
            box_head=TwoMLPHead(dim * 7 * 7, 4 * dim),
            box_predictor=FastRCNNPredictor(4 * dim, K),
            box_batch_size_per_image=ROIS_PER_IMAGE,
            **heads,
        )
        rpn, boxes = self.rcnn.rpn, self.rcnn.roi_heads
        self._samplers = [_KeyedSampler(part.fg_bg_sampler, number) for number, part in enumerate((rpn, boxes))]
        rpn.fg_bg_sampler, boxes.fg_bg_sampler = self._samplers

    @property
    def encoder(self) -> Encoder:
        """The encoder."""
        return self.rcnn.backbone.pyramid.encoder

    def forward(self, batch: ExampleBatch) -> dict[str, Tensor]:
        """{"loss"} and the terms of its sum, all scalars."""
        targets = []
        for instances in batch.targets:
            target = {"boxes": instances.boxes, "labels": instances.labels + 1}
            targets.append(target | ({"masks": instances.masks} if self.masks else {}))
        if batch.keys is not None:
            set_row_keys(self, batch.keys)
            for sampler in self._samplers:
                sampler.keys = batch.keys.tolist()
        losses = self._run(batch.images, targets)
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def detect(self, images: Tensor) -> list[dict[str, Tensor]]:
        """[B, C, h, w] canvases on the 0..255 scale -> boxes [n, 4], scores, labels from 0 (and masks) per image."""
        predictions = self._run(images, None)
        return [prediction | {"labels": prediction["labels"] - 1} for prediction in predictions]

    def _run(self, images: Tensor, targets: list[dict[str, Tensor]] | None) -> Any:
        """Run torchvision's heads in float32, whatever the precision of the encoder."""
        device_type = images.device.type
        self.rcnn.backbone.autocast = torch.is_autocast_enabled(device_type)
        with torch.autocast(device_type, enabled=False):
            return self.rcnn(list(images.float() / 255), targets)


class _KeyedSampler(BalancedPositiveNegativeSampler):
    """torchvision's sampler of anchors or proposals, its choices drawn from the key of each image.

    Args:
        sampler: its settings are taken over.
        number: tells apart the samplers of a model.

    Attributes:
        keys: keys of the images of the next call; None: torch's generator as it is.
    """

    def __init__(self, sampler: BalancedPositiveNegativeSampler, number: int) -> None:
        super().__init__(sampler.batch_size_per_image, sampler.positive_fraction)
        self.number = number
        self.keys: list[int] | None = None

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Matches of each image [n] -> chosen positives and negatives, [n] uint8 each."""
        keys, self.keys = self.keys, None
        if keys is None:
            return super().__call__(matched_idxs)
        positive, negative = [], []
        for key, matches in zip(keys, matched_idxs, strict=True):
            seed_device(matches.device, int(hash64(STREAM_PROPOSALS, key, self.number)) & (2**63 - 1))
            chosen = super().__call__([matches])
            positive += chosen[0]
            negative += chosen[1]
        return positive, negative


def _roi_pool(side: int) -> MultiScaleRoIAlign:
    """Crops of objects, each from the map on which it spans 14 to 28 cells, or from the finest (Lin et al. 2017).

    torchvision's rule depends on strides only: 224 pixels are 14 cells of stride 16, on a canvas of any size.
    """
    return MultiScaleRoIAlign(_LEVEL_NAMES, side, 2)


def _test_transform(image: np.ndarray, task: DetectionTask) -> GeometricTransform:
    """The whole image, as large as it fits into ``config.size``, in the upper left of the canvas."""
    size = (image.shape[0], image.shape[1])
    return GeometricTransform(size, scaled_size(size, fit_scale(size, task.config.size)), task.canvas)


def predict(task: DetectionTask, images: Sequence[np.ndarray]) -> list[dict[str, Tensor]]:
    """Detect objects in images at their own size.

    Args:
        task: a task in evaluation mode.
        images: [H, W, C] on the 0..255 scale, of any sizes.

    Returns:
        For each image, on the CPU: "boxes" [n, 4] (left, top, right, bottom) in its pixels, "scores" [n], "labels" [n]
        from 0 and, with Mask R-CNN, "masks" [n, H, W] bool.
    """
    device = next(task.parameters()).device
    transforms = [_test_transform(image, task) for image in images]
    fill = fill_of(task.preprocess)
    canvases = [transform_image(image, t, fill).float() for image, t in zip(images, transforms, strict=True)]
    results = []
    for prediction, transform in zip(task.detect(torch.stack(canvases).to(device)), transforms, strict=True):
        result = {name: value.cpu() for name, value in prediction.items()}
        result["boxes"] = boxes_to_image(result["boxes"], transform)
        if "masks" in result:
            result["masks"] = _masks_to_image(result["masks"], transform)
        results.append(result)
    return results


def _masks_to_image(masks: Tensor, transform: GeometricTransform) -> Tensor:
    """Probabilities [n, 1, h, w] on the canvas -> [n, H, W] bool in the image."""
    if not len(masks):
        return torch.zeros(0, *transform.image, dtype=torch.bool)
    own = masks[..., : transform.resized[0], : transform.resized[1]]
    return F.interpolate(own, size=transform.image, mode="bilinear", align_corners=False)[:, 0] > MASK_THRESHOLD


class Detection(DenseEvaluation):
    """Detection on one pair of sets; arguments as :class:`DenseEvaluation`."""

    name = "detection"
    score = "ap50"
    config: DetectionConfig
    train: CocoSource
    test: CocoSource

    @property
    def masks(self) -> bool:
        """Whether instance masks are trained and measured."""
        return self.config.instance_masks and all(part.has_masks for part in (self.train, self.test, self.validated))

    @property
    def canvas(self) -> tuple[int, int]:
        """(h, w), divisible by the cells of the RPN's coarsest map, so that anchors are centered on their cells."""
        return rounded_up(self.config.size, int(2 * strides_of(self.encoder)[-1]))

    def build(self, encoder: Encoder) -> DetectionTask:
        """Build the task for an encoder."""
        return DetectionTask(encoder, self.config, len(self.train.classes), self.masks)

    def augment(self) -> Augmentation:
        """The augmentation of training images and objects."""
        config = self.config
        fill = fill_of(known_preprocess(self.encoder))
        return BoxAugment(self.canvas, config.size, fill, (config.scale[0], config.scale[1]), config.flip)

    def measure(self, task: DetectionTask, source: CocoSource, rows: np.ndarray | None = None) -> dict[str, Any]:
        """COCO's average precision on images ``rows`` (None: all) of a set, in their own pixels."""
        types: Any = ("bbox", "segm") if task.masks else ("bbox",)
        metric = MeanAveragePrecision(iou_type=types, class_metrics=True, backend="pycocotools")
        for examples in self.read(source, rows):
            predictions = predict(task, [example.image for example in examples])
            metric.update(predictions, [ground_truth(example.target) for example in examples])
        values = metric.compute()
        result = average_precisions(values, "bbox_" if task.masks else "", self.train.classes)
        if rows is None and result[self.score] is None:
            raise ValueError(f"no image of {source.name} that can be read has an object, besides crowds")
        return result | ({"mask": average_precisions(values, "segm_", self.train.classes)} if task.masks else {})

    def draw(self, task: DetectionTask, rows: np.ndarray, file: Path) -> None:
        """Save images, their boxes and confident predictions."""
        panels = []
        for examples in self.read(self.test, rows):
            predictions = predict(task, [example.image for example in examples])
            shown = [{k: v[p["scores"] >= MIN_SHOWN_SCORE] for k, v in p.items()} for p in predictions]
            panels += [(e.image, e.target, prediction) for e, prediction in zip(examples, shown, strict=True)]
        save_overlays(detection_panels(panels, self.train.classes), file)

    def describe(self) -> dict[str, Any]:
        """Classes, numbers of objects and corrections of the data."""
        return {
            "classes": self.train.classes,
            "num_objects": [self.train.num_objects, self.test.num_objects],
            "masks": self.masks,
            "notes": [*self.train.notes, *self.test.notes],
        }


def ground_truth(target: Instances) -> dict[str, Tensor]:
    """Objects of an image, as torchmetrics expects them."""
    objects = {"boxes": target.boxes, "labels": target.labels, "iscrowd": target.crowd.long()}
    if target.masks is not None:
        objects["masks"] = target.masks.bool()
    if target.areas is not None:
        objects["area"] = target.areas
    return objects


def detection(run: str | Path, **options: Any) -> dict[str, Any]:
    """Train a detector from a pre-trained encoder, and one from random weights with the same schedule.

    Each training has its own folder under ``evaluation/detection/``. Called again, it resumes, and skips what is
    finished.

    Args:
        run: a run folder; or an encoder file or checkpoint, with ``out``.
        options: settings, the fields of :class:`~dmjd.config.dense.DetectionConfig`. ``data`` is required: see
            :func:`~dmjd.data.sources.coco.open_coco`.

    Returns:
        The content of ``evaluation/detection.json``: "result" and "random_init" with "ap" (0.5 to 0.95), "ap50",
        "ap75", "per_class" (and the same under "mask"), all of the last step on the whole test set; configuration,
        data (corrections under "notes"), ...

    Raises:
        Stopped: after a signal; everything is saved.
        ValueError: if settings or data are invalid; raised before training.
    """
    config = DetectionConfig(**options)
    overrides = config.given(options)
    try:
        import pycocotools  # noqa: F401
    except ImportError:
        raise ValueError("detection needs pycocotools: pip install 'dmjd[detection]'") from None
    encoder, folder = open_encoder(run, config.out)
    if config.data is None:
        raise ValueError("say which images and boxes: --data FOLDER (with train/ and train.json in COCO form)")
    if encoder.patch_size & (encoder.patch_size - 1):
        raise ValueError(f"detection needs a patch of 2, 4, 8, 16, ... pixels, {encoder.name} has {encoder.patch_size}")
    preprocess = known_preprocess(encoder)
    reading: dict[str, Any] = {"in_chans": preprocess.in_chans, "value_range": preprocess.value_range}
    reading["invalid"] = preprocess.filling
    train = open_coco(config.data, "train", **reading)
    if not train.has_objects:
        raise ValueError(f"{train.name} has no boxes, besides crowds: there is nothing to learn")
    test, val = open_parts(
        config,
        lambda data, split: open_coco(data, split, classes=train.classes, **reading),
        lambda data, split: find_coco(data, split) is not None,
    )
    if not test.has_objects:
        raise ValueError(f"{test.name} has no boxes, besides crowds: there is nothing to test on")
    warn_of_range(train)
    config = config.resolve(encoder.img_size, len(train))
    evaluation = Detection(
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
    for note in [f"{part.name}: {note}" for part in (train, test, val) if part is not None for note in part.notes]:
        evaluation.console.warn(note)
    return evaluation.compare(folder, overrides)
