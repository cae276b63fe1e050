"""Encoders for others: as a folder that this library, timm and the hub read, and as a repository of the hub.

The mixin of huggingface_hub is not used: it writes its files one by one, without keeping what was there before.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmjd.config.checks import check_out
from dmjd.encoders.folders import CARD, CONFIG, OURS, WEIGHTS, check_folder, is_edited, signed_card, write_folder
from dmjd.encoders.model_card import model_card, usage_lines
from dmjd.encoders.stored import Stored, encoder_metadata, weights_hash
from dmjd.encoders.training_facts import read_facts
from dmjd.files import safetensors_bytes
from dmjd.hub import check_upload, read_remote, upload


def save_encoder(encoder: Stored, folder: str | Path) -> None:
    """Write an encoder to a folder; see :meth:`dmjd.encoders.base.Encoder.save_pretrained`."""
    folder = check_out("folder", folder)
    check_folder(folder, "folder")
    write_folder(folder, folder_files(encoder))


def push_encoder(encoder: Stored, repo: str, private: bool) -> str:
    """Upload an encoder; see :meth:`dmjd.encoders.base.Encoder.push_to_hub`."""
    check_upload(repo)
    return push_files(repo, folder_files(encoder, repo), private)


def push_files(repo: str, files: Mapping[str, bytes], private: bool = False) -> str:
    """Upload the files of an encoder to the hub; a model card that was edited there is kept. Returns the address."""
    card = read_remote(repo, CARD)
    kept = {CARD} if card is not None and is_edited(card) else set()
    return upload(repo, {name: content for name, content in files.items() if name not in kept}, private)


def folder_files(encoder: Stored, repo: str | None = None) -> dict[str, bytes]:
    """The files of an encoder: weights, configuration and model card.

    Encoders that timm has get its keys in ``config.json``. The weights name PyTorch as their format, which some
    versions of transformers require.
    """
    facts = read_facts(encoder.origin, weights_hash(encoder))
    metadata = encoder_metadata(encoder)
    config = {OURS: metadata | {"training": facts}} | timm_config(encoder)
    return {
        WEIGHTS: safetensors_bytes(encoder.state_dict(), metadata, {"format": "pt"}),
        CONFIG: json_bytes(config),
        CARD: signed_card(model_card(encoder, facts, usage_lines(encoder, repo))),
    }


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """JSON for people to read; equal content gives equal bytes."""
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def timm_config(encoder: Stored) -> dict[str, Any]:
    """What timm reads in ``config.json``: architecture, arguments and preprocessing; empty if it has no such model."""
    if (model := encoder.timm_model()) is None:
        return {}
    known, chans = encoder.preprocess, encoder.in_chans
    data: dict[str, Any] = {
        "input_size": [chans, *encoder.img_size],
        "fixed_input_size": True,
        "crop_pct": 1.0,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "num_classes": 0,
        "pool_size": None,
        # timm adapts this layer to other numbers of channels, but only from three.
        "first_conv": "patch_embed.proj" if chans == 3 else None,
        "classifier": "head",
    }
    if known is not None:
        data |= dict(zip(("mean", "std"), known.stored_statistics, strict=True))
    return {
        "architecture": model.name,
        "num_classes": 0,
        "num_features": encoder.embed_dim,
        "model_args": {key: value for key, value in model.arguments.items() if key != "num_classes"},
        "pretrained_cfg": data,
    }
