"""Weights to start from, read from any of the sources that ``--init`` takes."""

import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import Eva, VisionTransformer
from torch import Tensor, nn

from dmjd.checked_json import read_json
from dmjd.config.checks import check_path, check_text
from dmjd.encoders import source_settings
from dmjd.encoders.adaptation import FIRST_LAYERS, POSITIONS, PREFIX_TOKENS
from dmjd.encoders.base import Encoder
from dmjd.encoders.classifier import CLASSIFIER_FILE, load_classifier
from dmjd.encoders.folders import is_encoder_folder
from dmjd.encoders.headers import CHECKPOINTS, read_headers
from dmjd.encoders.parts import read_tensors
from dmjd.encoders.published import FORMER_KEYS, read_state, square_grid, to_our_state
from dmjd.encoders.stored import weights_hash
from dmjd.encoders.timm_weights import LOCAL, PREFIXES, TIMM, hub_folder, load_timm, timm_preprocess
from dmjd.encoders.transformers_weights import CONFIG, read_transformers
from dmjd.encoders.weights import ENCODER_FILE, load_encoder
from dmjd.files import read_metadata
from dmjd.hub import HUB
from dmjd.images.preprocess import Preprocess
from dmjd.nn.modes import own_defaults
from dmjd.regular import irregular

HASH_DIGITS = 16

_ENCODER_KEY = "encoder"  # in the metadata of a checkpoint of a run, not of an evaluation

_OF_AN_EVALUATION = (
    "holds the training of an evaluation (detection, segmentation or an unfinished fine-tuning), which does not say "
    f"which encoder it has: give the run, or the {CLASSIFIER_FILE} of a finished fine-tuning"
)


@dataclass(frozen=True)
class Weights:
    """Weights to start from.

    Attributes:
        source: as the user gave it.
        tensors: the encoder's, float32, under the names of our encoders, which are timm's.
        hash: 16 hexadecimal digits that identify them; for an encoder of ours its :func:`weights_hash`.
        grid: (h, w) of the position table; None without one.
        num_heads: attention heads; None if they are unknown.
        activation: of the MLP, as PyTorch shows the module; None if it is unknown.
        preprocess: how images became input; None if it is unknown.
        settings: name and sizes of the encoder that has these weights, as settings of a run; None if they are unknown.
        decoder: the other weights of the pre-training model, under its names; empty if there are none.
        decoder_heads: attention heads of its decoder; None if they are unknown.
    """

    source: str
    tensors: dict[str, Tensor]
    hash: str
    grid: tuple[int, int] | None = None
    num_heads: int | None = None
    activation: str | None = None
    preprocess: Preprocess | None = None
    settings: dict[str, Any] | None = None
    decoder: dict[str, Tensor] = field(default_factory=dict)
    decoder_heads: int | None = None

    @property
    def num_prefix_tokens(self) -> int:
        """Class token and registers."""
        return sum(self.tensors[name].shape[1] for name in PREFIX_TOKENS if name in self.tensors)

    @property
    def in_chans(self) -> int | None:
        """Channels of the first layer; None if there is none of a known name."""
        first = next((self.tensors[name] for name in FIRST_LAYERS if name in self.tensors), None)
        return None if first is None else first.shape[1]

    @property
    def img_size(self) -> tuple[int, int] | None:
        """(H, W) of the images they were trained on; None if unknown."""
        if self.preprocess is not None:
            return self.preprocess.img_size
        match = re.search(r"_patch(\d+)", "" if self.settings is None else self.settings["encoder"])
        if self.grid is None or match is None:
            return None
        return self.grid[0] * int(match[1]), self.grid[1] * int(match[1])


@own_defaults()
def read_weights(source: str | Path, *, decoder: bool = False) -> Weights:
    """Read weights to start from; torch's random state is left unchanged.

    Args:
        source: a run folder, an encoder file, a checkpoint, a fine-tuned classifier, published DMJD, ConvMAE or MAE
            weights (``.pth`` or ``.safetensors``), a folder that ``save_pretrained`` of transformers or timm wrote, a
            timm name, ``local-dir:FOLDER``, or ``hf-hub:NAME`` for a model of timm or transformers, or an encoder of
            ours.
        decoder: read the decoder too.

    Raises:
        ValueError: in one line that names the source, if it cannot be used.
    """
    text = check_text("init", source)
    with torch.random.fork_rng(devices=[]):
        if text.startswith(HUB) and (folder := hub_folder(text, "--init", "--init")) is not None:
            return dataclasses.replace(_from_folder(folder, decoder), source=text)
        if text.startswith(PREFIXES):
            return _from_timm(text)
        path = check_path("init", text)
        if not path.exists():
            return _from_timm(text)
        if not path.is_dir() and (kind := irregular(path)):
            raise ValueError(f"--init {path} is {kind}, not a file")
        return _from_folder(path, decoder) if path.is_dir() else _from_file(path, decoder)


def _from_folder(folder: Path, decoder: bool) -> Weights:
    if (folder / ENCODER_FILE).exists():
        return _of_encoder(folder, decoder)
    if (folder / CHECKPOINTS).is_dir():
        headers, _ = read_headers(folder / CHECKPOINTS)
        if headers and not any(_ENCODER_KEY in header.metadata for header in headers):
            raise ValueError(f"--init {folder} {_OF_AN_EVALUATION}")
        return _of_encoder(folder, decoder)
    if (folder / CLASSIFIER_FILE).exists():
        raise ValueError(f"--init {folder} is the folder of a classifier: give {folder / CLASSIFIER_FILE}")
    if not (folder / CONFIG).exists():
        raise ValueError(f"--init {folder} is neither a run folder nor one with a {CONFIG} of transformers or timm")
    config = read_json(folder / CONFIG, dict[str, Any])
    if is_encoder_folder(folder) and "model_type" not in config:  # the latter is the key of transformers
        return _of_encoder(folder, decoder)
    if "architecture" in config:  # timm's key
        return _from_timm(f"{LOCAL}{folder}")
    return _from_transformers(folder, config, decoder)


def _from_transformers(folder: Path, config: Mapping[str, Any], decoder: bool) -> Weights:
    read = read_transformers(folder, config, decoder=decoder)
    tensors = _plain(read.tensors)
    return Weights(
        source=str(folder),
        tensors=tensors,
        hash=hash_of(tensors),
        grid=read.grid if POSITIONS in tensors else None,
        num_heads=read.num_heads,
        activation=read.activation,
        preprocess=read.preprocess,
        settings=source_settings.of_transformers(read.kind, tensors, read.num_heads),
        decoder=_plain(read.decoder),
        decoder_heads=read.decoder_heads,
    )


def _from_file(file: Path, decoder: bool) -> Weights:
    if file.suffix == ".safetensors" and (metadata := read_metadata(file)):
        if "classifier" in metadata:
            return _weights_of(load_classifier(file).encoder, file)
        if "progress" in metadata and _ENCODER_KEY not in metadata:
            raise ValueError(f"--init {file} {_OF_AN_EVALUATION}")
        return _of_encoder(file, decoder)
    ours = to_our_state(read_state(file))
    prefix = "encoder."
    tensors = _plain({key.removeprefix(prefix): value for key, value in ours.items() if not _is_other(key)})
    if not any(key.startswith(("patch_embed.", "patch_embed1.")) for key in tensors):
        raise ValueError(f"--init {file} holds no weights of a ViT or ConvViT: patch_embed.proj.weight is missing")
    positions = tensors.get(POSITIONS)
    grid = None
    if positions is not None:
        try:
            grid = square_grid(positions.shape[1] - ("cls_token" in tensors))
        except ValueError as error:
            raise ValueError(f"--init {file}: {error}") from None
    others = {key: value for key, value in ours.items() if _is_other(key)} if decoder else {}
    is_conv = FIRST_LAYERS[1] in tensors
    settings = source_settings.of_conv_vit(tensors) if is_conv else source_settings.of_plain_vit(tensors)
    return Weights(str(file), tensors, hash_of(tensors), grid, settings=settings, decoder=_plain(others))


def _is_other(key: str) -> bool:
    """Whether a name of :func:`to_our_state` belongs to the pre-training model, not to its encoder."""
    return key.startswith(("branches.", "fusion."))


def _of_encoder(source: Path, decoder: bool) -> Weights:
    """Weights of a run folder, an encoder file or a checkpoint."""
    weights = _weights_of(load_encoder(source), source)
    if not decoder:
        return weights
    tensors, heads = _decoder_of(source)
    return dataclasses.replace(weights, decoder=tensors, decoder_heads=heads)


def _weights_of(encoder: Encoder, source: Path) -> Weights:
    heads, activation = traits(encoder)
    return Weights(
        source=str(source),
        tensors=_plain(encoder.state_dict()),
        hash=weights_hash(encoder),
        grid=encoder.grid,
        num_heads=heads,
        activation=activation,
        preprocess=encoder.preprocess,
        settings=source_settings.of_encoder(encoder),
    )


def _decoder_of(source: Path) -> tuple[dict[str, Tensor], int | None]:
    """The other weights of a pre-training model, from a checkpoint or the newest one of a run that can be read.

    Returns:
        Tensors and attention heads; {} and None without a decoder, None if its heads were left to the encoder's width.
    """
    files = [source]
    if source.is_dir():
        headers, _ = read_headers(source / CHECKPOINTS)
        files = [header.path for header in headers]
    for file in files:
        try:
            state, metadata = read_tensors(file)
        except ValueError:  # reading the encoder has warned about it
            continue
        prefix = "model."
        names = {_current(key.removeprefix(prefix)): key for key in state if key.startswith(prefix)}
        if found := {name: state[key] for name, key in names.items() if _is_other(name)}:
            return _plain(found), _decoder_heads(metadata)
    return {}, None


def _current(name: str) -> str:
    """Today's name of a tensor of a pre-training model, from that of any version."""
    former = next((begin for begin in FORMER_KEYS if name.startswith(begin)), "")
    return FORMER_KEYS.get(former, "") + name.removeprefix(former)


def _decoder_heads(metadata: Mapping[str, Any]) -> int | None:
    """Attention heads of the decoder by the configuration in a checkpoint."""
    config = metadata.get("config")
    heads = config.get("decoder_heads") if isinstance(config, dict) else None
    return heads if isinstance(heads, int) else None


def _from_timm(source: str) -> Weights:
    name = source.removeprefix(TIMM)
    if name.startswith(LOCAL):
        name = LOCAL + os.path.expanduser(name.removeprefix(LOCAL))
    model = load_timm(source if source.startswith(TIMM) else name, "--init", "--init", only=(VisionTransformer, Eva))
    tensors = _plain(model.state_dict())
    heads, activation = traits(model)
    grid: Any = getattr(model.patch_embed, "grid_size", None)
    return Weights(
        source=source,
        tensors=tensors,
        hash=hash_of(tensors),
        grid=tuple(grid) if grid is not None and POSITIONS in tensors else None,
        num_heads=heads,
        activation=activation,
        preprocess=timm_preprocess(model),
        settings=_of_timm_folder(model, tensors, heads) if name.startswith(PREFIXES) else {"encoder": f"{TIMM}{name}"},
    )


def _of_timm_folder(model: nn.Module, tensors: Mapping[str, Tensor], heads: int | None) -> dict[str, Any] | None:
    """The settings of a model of timm that came from a folder, whose sizes need not be those of its name."""
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if name is None or not timm.is_model(name):
        return source_settings.of_plain_vit(tensors, heads)
    with torch.device("meta"):
        named = timm.create_model(name, num_classes=0)
    shapes = {key: value.shape for key, value in named.state_dict().items() if key.startswith("blocks.")}
    same = shapes == {key: value.shape for key, value in tensors.items() if key.startswith("blocks.")}
    first = FIRST_LAYERS[0]
    same = same and named.state_dict()[first].shape[2:] == tensors[first].shape[2:] and traits(named)[0] == heads
    return {"encoder": f"{TIMM}{name}"} if same else source_settings.of_plain_vit(tensors, heads)


def traits(model: nn.Module) -> tuple[int | None, str | None]:
    """Attention heads and activation of a transformer's first block, which its tensors do not tell; None if unknown."""
    block = next(iter(getattr(model, "blocks", [])), None)
    activation = getattr(getattr(block, "mlp", None), "act", None)
    return getattr(getattr(block, "attn", None), "num_heads", None), None if activation is None else repr(activation)


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits of a SHA-256 of names, shapes and float32 values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:HASH_DIGITS]


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that belong to nothing else, with floats of any precision as float32."""
    return {
        key: value.detach().to(torch.float32, copy=True) if value.is_floating_point() else value.detach().clone()
        for key, value in tensors.items()
    }
