"""Encoders: a table of names, ``create_encoder`` and ``load_encoder``."""

import difflib
import hashlib
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, overload

import safetensors
import torch
from safetensors.torch import load_file, save
from timm.models._features import FeatureGetterNet

from dmjd.encoders.base import Encoder
from dmjd.encoders.conv_vit import CONV_VIT_SIZES, ConvViT
from dmjd.encoders.vit import VIT_SIZES, VisionTransformer
from dmjd.pictures import Preprocess

__all__ = [
    "ConvViT",
    "Encoder",
    "VisionTransformer",
    "create_encoder",
    "encoder_bytes",
    "encoder_metadata",
    "encoder_names",
    "load_encoder",
    "weights_hash",
]

METADATA_KEY = "dmjd"
FORMAT = 1  # of the metadata; raised when older readers would misunderstand it
ENCODER_FILE = "encoder.safetensors"
_CONV_PATCHES = (4, 8, 16)


def _vit(size: str, **options: Any) -> Encoder:
    dim, depth, heads = VIT_SIZES[size]
    return VisionTransformer(**{"embed_dim": dim, "depth": depth, "num_heads": heads} | options)


def _conv_vit(size: str, patch_size: int, class_token: bool = False, **options: Any) -> Encoder:
    if class_token:
        raise ValueError("ConvViT has no class token; use a vit_* encoder or leave class_token out")
    if patch_size not in _CONV_PATCHES:
        raise ValueError(f"conv_vit encoders come with patch 4, 8 or 16, got {patch_size}")
    dims, depths, heads = CONV_VIT_SIZES[size]
    sizes: dict[str, Any] = {"embed_dims": dims, "depths": depths, "num_heads": heads}
    return ConvViT(patch_size=patch_size, **sizes | options)


# family: (class, factory by size); both families have the same four sizes
ENCODERS: dict[str, tuple[type[Encoder], Callable[..., Encoder]]] = {
    "vit": (VisionTransformer, _vit),
    "conv_vit": (ConvViT, _conv_vit),
}


def encoder_names() -> list[str]:
    """Common names; any other patch side works for ViT too (``vit_small_patch14``)."""
    vit = [f"vit_{size}_patch{p}" for size in VIT_SIZES for p in (2, 4, 8, 14, 16, 32)]
    return vit + [f"conv_vit_{size}_patch{p}" for size in CONV_VIT_SIZES for p in _CONV_PATCHES]


def create_encoder(
    name: str,
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    class_token: bool = False,
    drop_path: float = 0.0,
    *,
    features_only: bool = False,
    out_indices: int | tuple[int, ...] | None = None,
    **overrides: Any,
) -> Any:
    """Make an encoder with fresh weights (from torch's own random state).

    Args:
        name: ``vit_{tiny,small,base,large}_patch{P}`` or ``conv_vit_{tiny,small,base,large}_patch{4,8,16}``.
        img_size: pixels, one side or (height, width); the patch must divide both.
        in_chans: channels. class_token: one prefix token (ViT only). drop_path: stochastic depth of the last block.
        features_only: give timm's feature backbone instead, a module: images -> list of maps [B, D, h, w], with
            ``feature_info``. out_indices: which maps (default: all of ConvViT's three, ViT's last four).
        overrides: any argument of :class:`VisionTransformer` (``embed_dim``, ``depth``, ``num_heads``, ``mlp_ratio``)
            or :class:`ConvViT` (``embed_dims``, ``depths``, ``num_heads``, ``mlp_ratios``).

    Returns:
        :class:`Encoder` (or timm's ``FeatureGetterNet``).

    Raises:
        ValueError: unknown name (the nearest is suggested), unknown override, or sizes that do not fit.
    """
    match = re.fullmatch(r"(vit|conv_vit)_([a-z]+)_patch(\d+)", name)
    if match is None or match[2] not in VIT_SIZES or int(match[3]) == 0:
        near = difflib.get_close_matches(name, encoder_names(), n=1, cutoff=0.0)
        raise ValueError(f"unknown encoder '{name}'; did you mean '{near[0]}'?")
    cls, factory = ENCODERS[match[1]]
    known = set(inspect.signature(cls).parameters) - {"patch_size"}  # the name says it
    if unknown := set(overrides) - known:
        raise ValueError(f"{name} does not take {', '.join(sorted(unknown))}; it takes {', '.join(sorted(known))}")
    size = (img_size, img_size) if isinstance(img_size, int) else (int(img_size[0]), int(img_size[1]))
    options = {"in_chans": in_chans, "class_token": class_token, "drop_path": drop_path} | overrides
    encoder = factory(match[2], patch_size=int(match[3]), img_size=size, **options)
    encoder.name = name
    encoder.options = {"img_size": list(size)} | {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
    return _features_only(encoder, out_indices) if features_only else encoder


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


def _features_only(encoder: Encoder, out_indices: int | tuple[int, ...] | None) -> FeatureGetterNet:
    indices = out_indices if out_indices is not None else min(4, len(encoder.feature_info))
    return FeatureGetterNet(encoder, out_indices=indices)


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
