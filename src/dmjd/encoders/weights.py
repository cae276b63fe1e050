"""Encoders as files: saving, loading, hashing."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, overload

import safetensors
import torch
from safetensors.torch import load_file, save

from dmjd.encoders.base import Encoder
from dmjd.encoders.registry import _features_only, create_encoder
from dmjd.files import METADATA_KEY
from dmjd.images.preprocess import Preprocess

FORMAT = 1  # of the metadata; raised when older readers would misunderstand it

ENCODER_FILE = "encoder.safetensors"


def encoder_metadata(encoder: Encoder) -> dict[str, Any]:
    """What makes the encoder again besides its weights: name, options and preprocessing, as JSON types.

    ``drop_path`` is left at 0: it belongs to a training, not to the encoder.
    """
    return {
        "format": FORMAT,
        "name": encoder.name,
        "options": encoder.options | {"drop_path": 0.0},
        "preprocess": encoder.preprocess.to_dict() if encoder.preprocess is not None else None,
    }


def encoder_bytes(encoder: Encoder) -> bytes:
    """The encoder as a safetensors file: a function of its weights and configuration only.

    One sorted-JSON metadata key holds name, options and preprocessing; no path, time or host.
    """
    state = {key: value.detach().cpu().contiguous() for key, value in encoder.state_dict().items()}
    return save(state, metadata={METADATA_KEY: json.dumps(encoder_metadata(encoder), sort_keys=True)})


def weights_hash(encoder: Encoder) -> str:
    """16 hexadecimal digits that change with the encoder's weights or configuration."""
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
            (``vit_tiny_patch16``: fresh weights, for baselines).
        device: where to put it.
        features_only, out_indices: give timm's feature backbone instead, as :func:`create_encoder` does.

    Returns:
        :class:`Encoder` with ``preprocess`` set where the file knows it (or timm's ``FeatureGetterNet``).

    Raises:
        ValueError: naming what is wrong with the source.
    """
    encoder = _load(Path(source).expanduser())
    return (_features_only(encoder, out_indices) if features_only else encoder).eval().to(device)


def _load(path: Path) -> Encoder:
    if not path.exists():
        if re.fullmatch(r"(conv_)?vit_[a-z]+_patch\d+", str(path)):
            return create_encoder(str(path))
        raise ValueError(f"{path} does not exist: give a run folder, {ENCODER_FILE}, a checkpoint or an encoder name")
    file = path / ENCODER_FILE if path.is_dir() else path
    if not file.exists():
        raise ValueError(f"{path} holds no {ENCODER_FILE}: it is no run folder, or its pre-training has not saved yet")
    metadata, state = _read(file)
    if metadata["format"] > FORMAT:
        raise ValueError(f"{file} was written by a newer dmjd (format {metadata['format']}): update dmjd to read it")
    name = metadata["name"]
    options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in metadata["options"].items()}
    encoder = create_encoder(name, **options)
    try:
        encoder.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{file}: the weights do not fit {name}: {str(error).splitlines()[-1].strip()}") from None
    if metadata["preprocess"] is not None:
        encoder.preprocess = Preprocess.from_dict(metadata["preprocess"])
    return encoder


def _read(file: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Metadata and encoder weights of an encoder file or of a run's checkpoint (keys under ``model.encoder.``)."""
    try:
        with safetensors.safe_open(file, "pt") as opened:
            text = (opened.metadata() or {}).get(METADATA_KEY)
        state = load_file(file)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a readable safetensors file ({error}); it may be cut short") from None
    if text is None:
        raise ValueError(f"{file} was not written by dmjd; for published weights use dmjd.interop.load_official")
    metadata = json.loads(text)
    if "encoder" in metadata:  # a checkpoint of a run
        prefix = "model.encoder."
        return metadata["encoder"], {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return metadata, state
