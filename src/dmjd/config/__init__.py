"""Configurations and recipes. Nothing here imports torch."""

from dmjd.config.dense import DenseConfig, DetectionConfig, SegmentationConfig
from dmjd.config.finetune import FinetuneConfig
from dmjd.config.pretrain import PretrainConfig

__all__ = ["DenseConfig", "DetectionConfig", "FinetuneConfig", "PretrainConfig", "SegmentationConfig"]
