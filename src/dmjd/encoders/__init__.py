"""Encoders: ``create_encoder``, ``load_encoder`` and the families."""

from dmjd.encoders.base import Encoder
from dmjd.encoders.classifier import load_classifier
from dmjd.encoders.conv_vit import ConvViT
from dmjd.encoders.registry import create_encoder, encoder_names, fresh_like, resized
from dmjd.encoders.vit import VisionTransformer
from dmjd.encoders.weights import encoder_bytes, encoder_metadata, load_encoder, weights_hash

__all__ = [
    "ConvViT",
    "Encoder",
    "VisionTransformer",
    "create_encoder",
    "encoder_bytes",
    "encoder_metadata",
    "encoder_names",
    "fresh_like",
    "load_classifier",
    "load_encoder",
    "resized",
    "weights_hash",
]
