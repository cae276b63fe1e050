"""Configurations and recipes. Nothing here imports torch."""

from dmjd.config.dense import DenseConfig, DetectionConfig, SegmentationConfig
from dmjd.config.evaluation import (
    EvaluationConfig,
    FrozenConfig,
    KnnConfig,
    LinearConfig,
    LinearSweepConfig,
    WhitenedKnnConfig,
)
from dmjd.config.finetune import FinetuneConfig
from dmjd.config.pretrain import PretrainConfig

__all__ = [
    "DenseConfig",
    "DetectionConfig",
    "EvaluationConfig",
    "FinetuneConfig",
    "FrozenConfig",
    "KnnConfig",
    "LinearConfig",
    "LinearSweepConfig",
    "PretrainConfig",
    "SegmentationConfig",
    "WhitenedKnnConfig",
]
