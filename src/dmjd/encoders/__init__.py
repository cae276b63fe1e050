"""Encoders: ``create_encoder``, ``load_encoder`` and the families."""

from dmjd.encoders.base import Encoder
from dmjd.encoders.classifier import load_classifier
from dmjd.encoders.conv_vit import ConvViT
from dmjd.encoders.initialization import Initialization, create_encoder, initialize
from dmjd.encoders.registry import encoder_names, fresh_like, resized
from dmjd.encoders.sources import Weights, read_weights
from dmjd.encoders.stored import encoder_bytes, encoder_metadata, weights_hash
from dmjd.encoders.vit import VisionTransformer
from dmjd.encoders.weights import load_encoder

__all__ = [
    "ConvViT",
    "Encoder",
    "Initialization",
    "VisionTransformer",
    "Weights",
    "create_encoder",
    "encoder_bytes",
    "encoder_metadata",
    "encoder_names",
    "fresh_like",
    "initialize",
    "load_classifier",
    "load_encoder",
    "read_weights",
    "resized",
    "weights_hash",
]
