"""Trained models to compare an encoder with: other runs, encoder files, and any model of timm."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmjd.checked_json import read_json
from dmjd.config.checks import check_path, check_text, shown
from dmjd.config.pretrain import PretrainConfig
from dmjd.encoders.base import Encoder, known_preprocess
from dmjd.encoders.folders import CONFIG, is_encoder_folder
from dmjd.encoders.headers import CHECKPOINTS
from dmjd.encoders.initialization import initialize
from dmjd.encoders.sources import read_weights
from dmjd.encoders.stored import weights_hash
from dmjd.encoders.timm_names import check_timm_name, class_of
from dmjd.encoders.timm_weights import LOCAL, TIMM, load_timm, timm_preprocess
from dmjd.encoders.training_facts import TrainingCost, training_cost
from dmjd.encoders.weights import ENCODER_FILE, load_encoder
from dmjd.evaluation.frozen.features import Extractor, pooled
from dmjd.hub import HUB, download
from dmjd.images.preprocess import Preprocess
from dmjd.nn.layers import TRANSFORMER_NORM_EPS
from dmjd.runs.build import build_encoder
from dmjd.suggest import did_you_mean
from dmjd.targets.teacher import fingerprint_of

FLAG = "--baseline"

_AT_ONCE = 64  # images, since a model of timm may be larger than the encoder it is compared with

_UNKNOWN: TrainingCost = {"minutes": None, "device": None, "images": None}


@dataclass(frozen=True, eq=False)
class TrainedBaseline:
    """A trained model beside the evaluated encoder.

    Attributes:
        name: its name in results; names of several baselines are different.
        source: as the user gave it.
        model: an encoder of ours, or a model of timm without its head, in evaluation mode.
        preprocess: its own preprocessing.
        weights: hash of weights and preprocessing.
        training: what its training took; unknown for models of timm.
    """

    name: str
    source: str
    model: nn.Module
    preprocess: Preprocess
    weights: str
    training: TrainingCost

    @property
    def encoder(self) -> Encoder | None:
        """The model, if it is an encoder of ours."""
        return self.model if isinstance(self.model, Encoder) else None

    def describe(self) -> dict[str, Any]:
        """What results say about it, as JSON types."""
        return {
            "source": self.source,
            "weights": self.weights,
            "img_size": list(self.preprocess.img_size),
            "training": self.training,
        }

    def extractor(self, precision: str = "fp32") -> Extractor:
        """Its feature: normalized [b, C, H, W] -> [b, D] float32, with LayerNorm without affine as ours.

        Models of timm pool by themselves, as without a head: the mean over the map of a CNN, for example.

        Args:
            precision: "fp32" or "bf16" (autocast).
        """
        if self.encoder is not None:
            return pooled(self.encoder, precision)

        def extract_features(images: Tensor) -> Tensor:
            with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
                features = torch.cat([self.model(part).float() for part in images.split(_AT_ONCE)])
            return F.layer_norm(features, features.shape[-1:], eps=TRANSFORMER_NORM_EPS)

        return extract_features

    def check(self, read: Preprocess, exact: bool = False) -> None:
        """Check that it can take images that were read for an encoder.

        Args:
            read: preprocessing of that encoder.
            exact: with as many channels; otherwise gray and color images are converted.

        Raises:
            ValueError: for other channels that cannot be converted, or another range of stored values.
        """
        theirs, ours = self.preprocess.in_chans, read.in_chans
        if theirs != ours and (exact or ours not in (1, 3, 4) or theirs not in (1, 3)):
            raise ValueError(
                f"{FLAG} {self.source} takes images of {theirs} channels, the evaluated encoder of {ours}: "
                "give a baseline of as many channels"
            )
        if self.encoder is not None and self.preprocess.value_range != read.value_range:
            own, other = (one.value_range or "that of the data type" for one in (self.preprocess, read))
            raise ValueError(
                f"{FLAG} {self.source} reads images with the value range {own}, the evaluated encoder with {other}: "
                "both cannot be measured in one pass over the images"
            )


def load_baselines(
    sources: Sequence[str | Path], read: Preprocess, device: torch.device | str = "cpu", *, trainable: bool = False
) -> list[TrainedBaseline]:
    """Load trained models to compare an encoder with. Those that are given twice are loaded once.

    Args:
        sources: run folders, encoder files or checkpoints; ``timm/NAME``, from the cache if there is no network;
            ``local-dir:FOLDER`` for a model that timm saved; ``hf-hub:NAME`` for an encoder of ours or a model of timm.
        read: preprocessing of the evaluated encoder.
        device: device of the weights.
        trainable: load models of timm as encoders of ours; only plain vision transformers can be.

    Raises:
        ValueError: if there is no such model, its weights are not available, or it cannot take the images.
    """
    located: dict[str, str] = {}
    for source in sources:
        located.setdefault(locate_baseline(source), str(source))
    baselines = []
    for name, (source, given) in zip(_names(list(located)), located.items(), strict=True):
        baseline = (
            _of_encoder(name, given, _trainable(source, read)) if trainable else _load(name, given, source, device)
        )
        baseline.check(read, exact=trainable)
        _check_feature(baseline, device)
        baselines.append(baseline)
    return baselines


def describe_baselines(
    encoder: Encoder, weights: str, others: Sequence[TrainedBaseline], scores: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The keys "baselines" and "training" of a result; empty without trained baselines.

    Args:
        encoder: the evaluated encoder.
        weights: hash of its weights.
        others: trained baselines.
        scores: of each of them.
    """
    if not others:
        return {}
    found = {other.name: {"result": one} | other.describe() for other, one in zip(others, scores, strict=True)}
    return {"baselines": found, "training": training_cost(encoder.origin, weights)}


def _trainable(source: str, read: Preprocess) -> Encoder:
    """The encoder of a located baseline, to be trained; ValueError for what is no plain vision transformer."""
    if not source.startswith((TIMM, LOCAL)) and (not source.startswith(HUB) or _is_ours(source)):
        return _load_ours(source, "cpu")
    try:
        if source.startswith(TIMM):
            class_of(source.removeprefix(TIMM))  # before weights are downloaded
        weights = read_weights(source)
        if weights.settings is None or weights.img_size is None:
            raise ValueError("the sizes of its architecture or of its images are not known")
        config = PretrainConfig(**weights.settings, img_size=weights.img_size, in_chans=read.in_chans)
        encoder = build_encoder(config)
        initialize(encoder, weights)
    except ValueError as error:
        reason = str(error).removeprefix("--init ").removeprefix(source).strip(": ")
        reason = f"it {reason}" if reason.startswith("is ") else reason
        raise ValueError(f"{FLAG} {source} cannot be fine-tuned here, only evaluated frozen: {reason}") from None
    if encoder.preprocess is None:  # of other channels
        encoder.preprocess = dataclasses.replace(read, img_size=encoder.img_size)
    return encoder.eval()


def locate_baseline(source: str | Path) -> str:
    """A source in one form: an absolute path, ``timm/NAME``, ``local-dir:FOLDER`` or ``hf-hub:NAME``.

    Raises:
        ValueError: if there is no such path and no such model of timm.
    """
    text = check_text("baseline", source)
    if text.startswith(HUB):
        return text
    if text.startswith(LOCAL):
        folder = check_path("baseline", text.removeprefix(LOCAL))
        if not folder.is_dir():
            raise ValueError(f"{FLAG} {text}: there is no folder {folder}")
        return LOCAL + os.path.abspath(folder)
    path = check_path("baseline", text)
    if path.exists():
        return (LOCAL if _is_timm_folder(path) else "") + os.path.abspath(path)
    name = text.removeprefix(TIMM)
    if not text.startswith(TIMM) and not timm.is_model(name):
        models = [] if "/" in text else [TIMM + model for model in timm.list_models()]
        raise ValueError(
            f"there is no baseline {shown(text)}{did_you_mean(text, models)} "
            "Give a run folder, an encoder file, timm/NAME or local-dir:FOLDER"
        )
    check_timm_name(name)
    return TIMM + name


def _is_timm_folder(path: Path) -> bool:
    """Whether a folder was saved by timm, and is neither a run nor an encoder of ours."""
    if not path.is_dir() or (path / ENCODER_FILE).exists() or (path / CHECKPOINTS).is_dir() or is_encoder_folder(path):
        return False
    return (path / CONFIG).is_file() and "architecture" in read_json(path / CONFIG, dict[str, Any])  # timm's key


def _load(name: str, given: str, source: str, device: torch.device | str) -> TrainedBaseline:
    if source.startswith((TIMM, LOCAL)) or (source.startswith(HUB) and not _is_ours(source)):
        model = load_timm(source.removeprefix(TIMM), "baseline", FLAG).eval()
        preprocess = timm_preprocess(model)
        return TrainedBaseline(name, given, model.to(device), preprocess, fingerprint_of(model, preprocess), _UNKNOWN)
    return _of_encoder(name, given, _load_ours(source, device))


def _load_ours(source: str, device: torch.device | str) -> Encoder:
    try:
        encoder = load_encoder(source, device)
        known_preprocess(encoder)
    except ValueError as error:
        raise ValueError(f"{FLAG} {error}") from None
    return encoder


def _of_encoder(name: str, given: str, encoder: Encoder) -> TrainedBaseline:
    """An encoder of ours, loaded from what the user gave, as a baseline of a name."""
    weights = weights_hash(encoder)
    training = training_cost(encoder.origin, weights)
    return TrainedBaseline(name, given, encoder, known_preprocess(encoder), weights, training)


def _is_ours(source: str) -> bool:
    """Whether a model of the hub was written by dmjd; its configuration is downloaded."""
    try:
        return is_encoder_folder(download(source.removeprefix(HUB), (CONFIG,)))
    except ValueError as error:
        raise ValueError(f"{FLAG} {error}") from None


def _check_feature(baseline: TrainedBaseline, device: torch.device | str) -> None:
    """Try a blank image: a model without pooling, or one that has another size in mind, fails before the long work."""
    blank = torch.zeros(1, baseline.preprocess.in_chans, *baseline.preprocess.img_size, device=device)
    with torch.inference_mode():
        feature = baseline.extractor()(blank)
    if feature.dim() != 2:
        raise ValueError(
            f"{FLAG} {baseline.source} gives features of shape {list(feature.shape[1:])} for an image: only models "
            "that pool them to one vector can be compared"
        )


def _names(sources: Sequence[str]) -> list[str]:
    """Short, different names of located sources."""
    most = max((len(Path(source.removeprefix(LOCAL)).parts) for source in sources), default=1)
    for count in range(1, most + 1):
        names = [_short(source, count) for source in sources]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({names[:i].count(name) + 1})" if name in names[:i] else name for i, name in enumerate(names)]


def _short(source: str, count: int) -> str:
    """The last parts of a path, one more for a file; names of timm and the hub as they are."""
    if source.startswith((TIMM, HUB)):
        return source
    path = Path(source.removeprefix(LOCAL))
    return "/".join(path.parts[-count - path.is_file() :]).lstrip("/")
