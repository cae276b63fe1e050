"""Encoder files: how they are loaded, and which of a run's files holds the newest weights."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from dmjd.checked_json import check_json
from dmjd.config.checks import check_path, check_text
from dmjd.encoders.base import Encoder
from dmjd.encoders.folders import CONFIG, WEIGHTS, is_encoder_folder
from dmjd.encoders.headers import CHECKPOINTS, ENCODER_DIGEST_KEY, read_headers
from dmjd.encoders.parts import read_tensors
from dmjd.encoders.registry import check_options, create_encoder, encoder_family, is_encoder_name
from dmjd.encoders.stored import FORMAT, EncoderMetadata
from dmjd.encoders.timm_features import feature_backbone
from dmjd.files import read_digest
from dmjd.hub import HUB, download
from dmjd.images.preprocess import Preprocess
from dmjd.nn.modes import own_defaults
from dmjd.warning import DMJDWarning

ENCODER_FILE = "encoder.safetensors"


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


@own_defaults()
def load_encoder(
    source: str | Path,
    device: torch.device | str = "cpu",
    *,
    features_only: bool = False,
    out_indices: int | tuple[int, ...] | None = None,
) -> Any:
    """Load a trained encoder in evaluation mode.

    Args:
        source: a run folder, an ``encoder.safetensors`` file, a checkpoint file of a run, a folder of
            :meth:`Encoder.save_pretrained`, ``hf-hub:user/name`` (or ``hf-hub:user/name@revision``), or an encoder
            name (``vit_tiny_patch16``: random weights, for baselines).
        device: device of the weights.
        features_only, out_indices: return timm's feature backbone instead, as :func:`create_encoder` does.

    Returns:
        :class:`Encoder` with ``preprocess``, if the file has it (or timm's ``FeatureGetterNet``).

    Raises:
        ValueError: naming what is wrong with the source.
    """
    path = _located(source)
    encoder = _load(path)
    encoder.origin = path if path.exists() else None
    return (feature_backbone(encoder, out_indices) if features_only else encoder).eval().to(device)


def is_shared(source: Path) -> bool:
    """Whether a source is an encoder of :meth:`Encoder.save_pretrained`, in a folder or on the hub, not a run."""
    return str(source).startswith(HUB) or is_encoder_folder(source)


def _located(source: str | Path) -> Path:
    """The path of what to load; files of the hub are downloaded to its cache."""
    text = check_text("source", source)
    if not text.startswith(HUB):
        return check_path("source", text)
    folder = download(text.removeprefix(HUB), (CONFIG, WEIGHTS))
    if not is_encoder_folder(folder):
        raise ValueError(f"{text} was not written by dmjd; weights of others are for --init")
    return folder


def _load(path: Path) -> Encoder:
    if path.is_dir():
        return _load_file(path / WEIGHTS) if is_encoder_folder(path) else _load_run(path)
    if not path.exists():
        if is_encoder_name(str(path)):
            return create_encoder(str(path))
        raise ValueError(f"{path} does not exist: give a run folder, {ENCODER_FILE}, a checkpoint or an encoder name")
    if path.name == ENCODER_FILE:
        _warn_if_stale(path)
    return _load_file(path)


def _warn_if_stale(file: Path) -> None:
    """Warn if an encoder file that is named itself does not belong to the newest checkpoint of its run."""
    headers, _ = read_headers(file.parent / CHECKPOINTS)
    digest = headers[0].metadata.get(ENCODER_DIGEST_KEY) if headers else None
    if digest is not None and digest != read_digest(file):
        warnings.warn(f"{file} does not belong to the newest checkpoint; {file.parent} does", DMJDWarning, stacklevel=5)


def _load_run(run: Path) -> Encoder:
    """The encoder of a run's newest checkpoint: from the encoder file if it belongs to it, else from the checkpoint."""
    file = run / ENCODER_FILE
    headers, unreadable = read_headers(run / CHECKPOINTS)
    if not headers and not file.exists():
        reasons = "".join(f"\n  {one.reason}" for one in unreadable[:5])
        raise ValueError(
            f"{run} holds no {ENCODER_FILE}: it is not a run folder, or nothing has been saved yet{reasons}"
        )
    newest = headers[0].step if headers else -1
    newer = [one.reason for one in unreadable if one.newer_than(newest)]
    problems = list(newer)
    candidates = [header.path for header in headers]
    digests = [header.metadata.get(ENCODER_DIGEST_KEY) for header in headers]
    if not file.exists():
        problems.append(f"{file} is missing")
    elif (digest := read_digest(file)) in digests[:1] or (newer and digest not in digests):
        candidates.insert(0, file)  # it belongs to the newest checkpoint, or to a newer one that is damaged
    else:
        candidates.append(file)
        if digests and digests[0] is not None:  # a checkpoint of version 0.1 does not tell
            problems.append(f"{file} does not belong to the newest checkpoint")
    for candidate in candidates:
        try:
            encoder = _load_file(candidate)
        except ValueError as error:
            problems.append(str(error))
            continue
        if problems:
            warnings.warn(f"{'; '.join(problems)}. The weights are taken from {candidate}", DMJDWarning, stacklevel=5)
        return encoder
    raise ValueError(f"{run} holds no readable weights:\n  " + "\n  ".join(problems[:5]))


def _load_file(file: Path) -> Encoder:
    metadata, state = _read(file)
    encoder = build_encoder_of(metadata, state, file)
    encoder.load_state_dict(state, strict=True)
    return encoder


def build_encoder_of(metadata: Any, state: Mapping[str, Tensor], file: Path) -> Encoder:
    """Create the encoder that the metadata of a file describe, with random weights and with its preprocessing.

    Nothing is allocated before, so that metadata which ask for an endless model are refused at once.

    Args:
        metadata: as :func:`encoder_metadata` returns.
        state: the encoder's tensors in the file.
        file: for error messages.

    Raises:
        ValueError: if the metadata are wrong or do not fit the tensors.
    """
    number = metadata.get("format") if isinstance(metadata, dict) else None
    if isinstance(number, int) and number > FORMAT:
        raise ValueError(f"{file} was written by a newer dmjd (format {number}): update dmjd to read it")
    problem = f"{file}: its metadata do not describe an encoder"
    checked = check_json(metadata, EncoderMetadata, problem)
    name, options = checked["name"], checked["options"]
    try:
        family = encoder_family(check_text("encoder", name))
        check_options(family, options, len(state))
        with torch.device("meta"):
            expected = {key: value.shape for key, value in create_encoder(name, **options).state_dict().items()}
    except ValueError as error:
        raise ValueError(f"{problem}: {error}") from None
    for key in sorted(expected.keys() | state.keys()):
        if key not in expected or key not in state or expected[key] != state[key].shape:
            raise ValueError(f"{file}: the weights do not fit {name}: {_difference(key, expected, state)}")
    encoder = create_encoder(name, **options)
    if checked["preprocess"] is not None:
        try:
            encoder.preprocess = Preprocess.from_dict(checked["preprocess"])
        except ValueError as error:
            raise ValueError(f"{file}: its preprocessing cannot be used: {error}") from None
    return encoder


def _difference(key: str, expected: Mapping[str, torch.Size], state: Mapping[str, Tensor]) -> str:
    if key not in state:
        return f"it lacks {key}"
    if key not in expected:
        return f"{key} is not known"
    return f"{key} is {list(state[key].shape)}, but its metadata ask for {list(expected[key])}"


def _read(file: Path) -> tuple[Any, dict[str, Tensor]]:
    """Metadata and weights of an encoder file, or of the encoder in a run's checkpoint (``model.encoder.*``)."""
    state, metadata = read_tensors(file)
    if not metadata:
        raise ValueError(
            f"{file} was not written by dmjd; weights of others are for --init, or dmjd.interop.load_official"
        )
    if "encoder" in metadata:  # a checkpoint of a run
        prefix = "model.encoder."
        return metadata["encoder"], {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
    return metadata, dict(state)
