"""Encoder files: save, load, hash."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

import torch

from dmjd.config.checks import check_path, check_text
from dmjd.encoders.base import Encoder
from dmjd.encoders.registry import check_options, create_encoder, encoder_family, is_encoder_name
from dmjd.encoders.timm_features import feature_backbone
from dmjd.files import read_safetensors, safetensors_bytes
from dmjd.images.preprocess import Preprocess

FORMAT = 1  # version of the metadata; increased when older versions would misread it

ENCODER_FILE = "encoder.safetensors"


def encoder_metadata(encoder: Encoder) -> dict[str, Any]:
    """Everything that defines an encoder besides its weights: name, options and preprocessing, as JSON types.

    ``drop_path`` is stored as 0, because it belongs to a training run, not to the encoder.
    """
    return {
        "format": FORMAT,
        "name": encoder.name,
        "options": encoder.options | {"drop_path": 0.0},
        "preprocess": encoder.preprocess.to_dict() if encoder.preprocess is not None else None,
    }


def encoder_bytes(encoder: Encoder) -> bytes:
    """The encoder as a safetensors file. The bytes depend only on its weights, options and preprocessing."""
    return safetensors_bytes(encoder.state_dict(), encoder_metadata(encoder))


def weights_hash(encoder: Encoder) -> str:
    """16 hexadecimal digits of the SHA-256 of :func:`encoder_bytes`."""
    return hashlib.sha256(encoder_bytes(encoder)).hexdigest()[:16]


@overload
def load_encoder(source: str | Path, device: torch.device | str = "cpu") -> Encoder: ...


@overload
def load_encoder(
    source: str | Path,
    device: torch.device | str = "cpu",
    *,
    features_only: bool,
    out_indices: int | tuple[int, ...] | None = None,
) -> Any: ...


def load_encoder(
    source: str | Path,
    device: torch.device | str = "cpu",
    *,
    features_only: bool = False,
    out_indices: int | tuple[int, ...] | None = None,
) -> Any:
    """Load a trained encoder in evaluation mode.

    Args:
        source: a run folder, an ``encoder.safetensors`` file, a checkpoint file of a run, or an encoder name
            (``vit_tiny_patch16``: random weights, for baselines).
        device: device of the weights.
        features_only, out_indices: return timm's feature backbone instead, as :func:`create_encoder` does.

    Returns:
        :class:`Encoder` with ``preprocess``, if the file has it (or timm's ``FeatureGetterNet``).

    Raises:
        ValueError: naming what is wrong with the source.
    """
    encoder = _load(check_path("source", source))
    return (feature_backbone(encoder, out_indices) if features_only else encoder).eval().to(device)


def _load(path: Path) -> Encoder:
    if not path.exists():
        if is_encoder_name(str(path)):
            return create_encoder(str(path))
        raise ValueError(f"{path} does not exist: give a run folder, {ENCODER_FILE}, a checkpoint or an encoder name")
    file = path / ENCODER_FILE if path.is_dir() else path
    if not file.exists():
        raise ValueError(f"{path} holds no {ENCODER_FILE}: it is not a run folder, or nothing has been saved yet")
    metadata, state = _read(file)
    if metadata["format"] > FORMAT:
        raise ValueError(f"{file} was written by a newer dmjd (format {metadata['format']}): update dmjd to read it")
    name = metadata["name"]
    encoder = _built(file, name, metadata["options"], state)
    try:
        encoder.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{file}: the weights do not fit {name}: {str(error).splitlines()[-1].strip()}") from None
    if metadata["preprocess"] is not None:
        try:
            encoder.preprocess = Preprocess.from_dict(metadata["preprocess"])
        except ValueError as error:
            raise ValueError(f"{file}: its preprocessing cannot be used: {error}") from None
    return encoder


def _built(file: Path, name: Any, options: Any, state: Mapping[str, torch.Tensor]) -> Encoder:
    """The encoder that a file's metadata describe, if its weights have the shapes of those in the file.

    Nothing is allocated before, so that metadata which ask for an endless model are refused at once.
    """
    try:
        family = encoder_family(check_text("encoder", name))
        check_options(family, options, len(state))
        with torch.device("meta"):
            expected = create_encoder(name, **options).state_dict()
    except ValueError as error:
        raise ValueError(f"{file}: its metadata do not describe an encoder: {error}") from None
    for key, value in expected.items():
        if key in state and state[key].shape != value.shape:
            shapes = f"{list(state[key].shape)}, but its metadata ask for {list(value.shape)}"
            raise ValueError(f"{file}: the weights do not fit {name}: {key} is {shapes}")
    return create_encoder(name, **options)


def _read(file: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Metadata and weights of an encoder file, or of the encoder in a run's checkpoint (``model.encoder.*``)."""
    state, metadata = read_safetensors(file)
    if not metadata:
        raise ValueError(f"{file} was not written by dmjd; for published weights use dmjd.interop.load_official")
    if "encoder" in metadata:  # a checkpoint of a run
        prefix = "model.encoder."
        return metadata["encoder"], {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return metadata, state
