"""What of an encoder is stored: weights and metadata as bytes, and their hash."""

from pathlib import Path
from typing import Any, Protocol, TypedDict

from dmjd.files import content_hash, content_hash_of, safetensors_bytes
from dmjd.images.preprocess import Preprocess

FORMAT = 1  # version of the metadata; increased when older versions would misread it


class Stored(Protocol):
    """The part of an :class:`~dmjd.encoders.base.Encoder` that is stored, and what its model card tells."""

    name: str
    options: dict[str, Any]
    preprocess: Preprocess | None
    origin: Path | None
    img_size: tuple[int, int]
    in_chans: int
    embed_dim: int
    patch_size: int
    num_prefix_tokens: int

    def state_dict(self) -> dict[str, Any]:
        """Its tensors."""

    def timm_model(self) -> Any:
        """Its model of timm, or None."""


class EncoderMetadata(TypedDict):
    """What :func:`encoder_metadata` returns."""

    format: int
    name: str
    options: dict[str, Any]
    preprocess: dict[str, Any] | None


def encoder_metadata(encoder: Stored) -> dict[str, Any]:
    """Everything that defines an encoder besides its weights: name, options and preprocessing, as JSON types.

    ``drop_path`` is stored as 0, because it belongs to a training run, not to the encoder.
    """
    return {
        "format": FORMAT,
        "name": encoder.name,
        "options": encoder.options | {"drop_path": 0.0},
        "preprocess": encoder.preprocess.to_dict() if encoder.preprocess is not None else None,
    }


def encoder_bytes(encoder: Stored) -> bytes:
    """The encoder as a safetensors file. The bytes depend only on its weights, options and preprocessing."""
    return safetensors_bytes(encoder.state_dict(), encoder_metadata(encoder))


def weights_hash(encoder: Stored) -> str:
    """16 hexadecimal digits of a SHA-256 of the encoder's weights, options and preprocessing."""
    return content_hash(encoder.state_dict(), encoder_metadata(encoder))[:16]


def weights_hash_of(content: bytes) -> str:
    """:func:`weights_hash` of the encoder in the bytes of :func:`encoder_bytes`."""
    return content_hash_of(content)[:16]
