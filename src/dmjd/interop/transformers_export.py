"""Export to transformers: a folder for its ``ViTModel``, with the tables that read such folders."""

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from dmjd.encoders.base import Encoder
from dmjd.encoders.folders import CARD, CONFIG, OURS, PREPROCESSOR, WEIGHTS, signed_card, write_folder
from dmjd.encoders.model_card import model_card
from dmjd.encoders.pooling_lines import transformers_pooling
from dmjd.encoders.sharing import json_bytes
from dmjd.encoders.sources import traits
from dmjd.encoders.stored import encoder_metadata, weights_hash
from dmjd.encoders.training_facts import read_facts
from dmjd.encoders.transformers_weights import ACTIVATIONS, VIT, VIT_MODEL_TYPE
from dmjd.images.preprocess import Preprocess
from dmjd.interop.exported import check_close, random_images

TOLERANCE = 1e-5

_KINDS = ("weight", "bias")

_OUTSIDE = {"embeddings.cls_token", "embeddings.position_embeddings"} | {
    f"{name}.{kind}" for name in ("embeddings.patch_embeddings.projection", "layernorm") for kind in _KINDS
}

_INSIDE = (
    *VIT.query_key_value,
    *(theirs for theirs, _ in VIT.inside),
)

_BICUBIC = 3  # Pillow's number


def check_transformers_installed() -> None:
    """ValueError if transformers is missing."""
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("the hf format needs transformers: pip install transformers")


def why_not_transformers(encoder: Encoder) -> str | None:
    """Why ``ViTModel`` of transformers cannot be an encoder; None if it can, as far as the tensors tell."""
    state = VIT.to_transformers(encoder.state_dict())
    inside = {f"{name}{kind}" for name in _INSIDE for kind in _KINDS}
    wanted = _OUTSIDE | {f"{VIT.layers}{block}.{name}" for block in range(encoder.depth) for name in inside}
    if wanted - state.keys() == {"embeddings.cls_token"} and not state.keys() - wanted:
        return "it has no class token, and every token of a ViTModel attends to one"
    if state.keys() != wanted:
        return f"ViTModel has other parts than {type(encoder).__name__}"
    _, activation = traits(encoder)
    return None if activation in ACTIVATIONS.values() else f"ViTModel has no activation {activation}"


def transformers_files(encoder: Encoder, repo: str | None = None) -> dict[str, bytes]:
    """The files of a folder for ``ViTModel.from_pretrained``, which is compared with the encoder first.

    Raises:
        ValueError: if transformers has no such model, or computes other numbers.
    """
    if (reason := why_not_transformers(encoder)) is not None:
        raise ValueError(f"{encoder.name} cannot be a ViTModel of transformers: {reason}. {_instead(encoder)}")
    facts = read_facts(encoder.origin, weights_hash(encoder))
    config = vit_config(encoder) | {OURS: encoder_metadata(encoder) | {"training": facts}}
    state = {key: value.contiguous() for key, value in VIT.to_transformers(encoder.state_dict()).items()}
    files = {WEIGHTS: save(state, {"format": "pt"}), CONFIG: json_bytes(config)}
    if (known := encoder.preprocess) is not None:
        files[PREPROCESSOR] = json_bytes(processor_config(known))
    usage = ["```python", *transformers_usage(repo or "FOLDER", encoder).splitlines(), "```"]
    files[CARD] = signed_card(model_card(encoder, facts, usage, library="transformers"))
    _check_files(encoder, files)
    return files


def _instead(encoder: Encoder) -> str:
    """The formats that an encoder has instead."""
    if encoder.timm_model() is None:
        return "Use --format torch, a program for PyTorch alone, or --format onnx"
    return "Use --format timm --out FOLDER, which AutoModel of transformers loads through timm, or --format torch"


def vit_config(encoder: Encoder) -> dict[str, Any]:
    """``config.json`` of a ViTModel."""
    heads, activation = traits(encoder)
    state = encoder.state_dict()
    height, width = encoder.img_size
    return {
        "architectures": ["ViTModel"],
        "model_type": VIT_MODEL_TYPE,
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": heads,
        "intermediate_size": state["blocks.0.mlp.fc1.weight"].shape[0],
        "hidden_act": next(name for name, shown in ACTIVATIONS.items() if shown == activation),
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": getattr(encoder.norm, "eps", 1e-6),
        "image_size": height if height == width else [height, width],
        "patch_size": encoder.patch_size,
        "num_channels": encoder.in_chans,
        "qkv_bias": True,
        "torch_dtype": "float32",
    }


def processor_config(preprocess: Preprocess) -> dict[str, Any]:
    """``preprocessor_config.json``: resize so that the shorter side fits, and crop the center.

    Transformers has no processor that does so for sizes that are not square: those images are resized without a crop.
    """
    height, width = preprocess.img_size
    square = height == width
    mean, std = preprocess.stored_statistics
    return {
        "image_processor_type": "BitImageProcessor" if square else "ViTImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": height} if square else {"height": height, "width": width},
        "resample": _BICUBIC,
        "do_center_crop": square,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
        "do_convert_rgb": preprocess.in_chans == 3,
    }


def transformers_usage(source: str, encoder: Encoder) -> str:
    """How transformers loads a folder."""
    lines = [
        "from transformers import AutoImageProcessor, AutoModel",
        "",
        f"processor = AutoImageProcessor.from_pretrained({source!r})",
        f"model = AutoModel.from_pretrained({source!r}, add_pooling_layer=False)",
        'tokens = model(**processor(images, return_tensors="pt")).last_hidden_state  # encoder.forward_features',
    ]
    if encoder.preprocess is None:
        lines = ["from transformers import AutoModel", "", lines[3], "tokens = model(images).last_hidden_state"]
    return "\n".join([*lines, *transformers_pooling(encoder)])


def _check_files(encoder: Encoder, files: Mapping[str, bytes]) -> None:
    """Let transformers load the files from a temporary folder, and compare the model with the encoder."""
    from transformers import ViTModel  # slow to import, and not a dependency

    images = random_images(encoder, 2)
    with TemporaryDirectory() as folder, _quiet():
        write_folder(Path(folder), files)
        model = ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()
    with torch.inference_mode():
        theirs: Tensor = model(images).last_hidden_state
        ours = encoder.forward_features(images)
    check_close("the tokens of transformers", theirs.numpy(), ours.numpy(), TOLERANCE)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the messages and progress bars of transformers off the console."""
    from transformers.utils import logging  # slow to import, and not a dependency

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
