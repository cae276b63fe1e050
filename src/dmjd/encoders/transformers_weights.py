"""Folders that transformers' ``save_pretrained`` wrote: key tables to timm's names, used in both directions.

The tables need no transformers: a folder is read as ``config.json`` and ``model.safetensors``, or several such files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmjd.checked_json import read_json
from dmjd.config.checks import MAX_HEADS, MAX_SIDE, Bounds, check_int, shown
from dmjd.encoders.published import read_state
from dmjd.encoders.sharded import INDEX, read_shards
from dmjd.images.preprocess import Preprocess
from dmjd.nn.tokens import sincos_positions

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"

WEIGHTS = ("model.safetensors", INDEX, "pytorch_model.bin")  # the first that exists is read


@dataclass(frozen=True)
class KeyTable:
    """Names of a family of transformers and their names in timm, for :meth:`to_timm` and :meth:`to_transformers`.

    Attributes:
        outside: (theirs, timm's) beginnings of the names outside of the blocks; the first match counts.
        layers: beginning of the names in a block, before its number; timm's is ``blocks.``.
        inside: (theirs, timm's) beginnings in a block, after its number.
        query_key_value: their three projections, which timm joins in ``attn.qkv``.
        biases: timm's names of the biases of query and value; None = joined in ``attn.qkv`` too.
    """

    outside: tuple[tuple[str, str], ...]
    layers: str
    inside: tuple[tuple[str, str], ...]
    query_key_value: tuple[str, str, str]
    biases: tuple[str, str] | None = None

    def to_timm(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under timm's names. Those that the table does not know keep their names."""
        renamed, parts = {}, dict(state)
        for key in state:
            number, inner = self._inside(key, self.layers)
            if number is None:
                renamed[_replaced(key, self.outside)] = parts.pop(key)
            elif not inner.startswith(self.query_key_value):
                renamed[f"blocks.{number}.{_replaced(inner, self.inside)}"] = parts.pop(key)
        for key in state:  # in the order of the file
            number, inner = self._inside(key, self.layers)
            query, first, kind = inner.partition(self.query_key_value[0])
            if key in parts and first and not query:
                renamed |= self._joined(parts, f"{self.layers}{number}.", f"blocks.{number}.attn.", kind)
        return renamed | parts

    def _joined(self, parts: dict[str, Tensor], theirs: str, ours: str, kind: str) -> dict[str, Tensor]:
        """The projections of a block's query, key and value as timm's, taken out of ``parts``; "weight" or "bias"."""
        names = [f"{theirs}{name}{kind}" for name in self.query_key_value]
        if kind == "bias" and self.biases is not None:
            pairs = zip((names[0], names[2]), self.biases, strict=True)
            return {ours + name: parts.pop(key) for key, name in pairs if key in parts}
        if not all(name in parts for name in names):
            return {}
        return {f"{ours}qkv.{kind}": torch.cat([parts.pop(name) for name in names])}

    def to_transformers(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inverse of :meth:`to_timm`."""
        outside = [(ours, theirs) for theirs, ours in self.outside]
        inside = [(ours, theirs) for theirs, ours in self.inside]
        if self.biases is not None:
            pairs = zip(self.biases, self.query_key_value[::2], strict=True)
            inside += [(f"attn.{name}", f"{theirs}bias") for name, theirs in pairs]
        renamed = {}
        for key, tensor in state.items():
            number, inner = self._inside(key, "blocks.")
            if number is None:
                renamed[_replaced(key, outside)] = tensor
            elif inner.startswith("attn.qkv."):
                kind = inner.removeprefix("attn.qkv.")
                for name, part in zip(self.query_key_value, tensor.chunk(3), strict=True):
                    renamed[f"{self.layers}{number}.{name}{kind}"] = part
            else:
                renamed[f"{self.layers}{number}.{_replaced(inner, inside)}"] = tensor
        return renamed

    @staticmethod
    def _inside(key: str, layers: str) -> tuple[int | None, str]:
        """Number of the block of a name, and the rest of it; (None, "") outside of the blocks."""
        number, _, inner = key.removeprefix(layers).partition(".")
        return (int(number), inner) if key.startswith(layers) and number.isdecimal() else (None, "")


def _replaced(name: str, table: Any) -> str:
    """A name whose beginning stands in a table of (beginning, replacement) with the replacement."""
    return next((new + name[len(old) :] for old, new in table if name.startswith(old)), name)


_EMBEDDINGS = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("embeddings.register_tokens", "reg_token"),
    ("layernorm.", "norm."),
)

_SCALES = (("layer_scale1.lambda1", "ls1.gamma"), ("layer_scale2.lambda1", "ls2.gamma"))

_SEPARATE = ("attention.attention.query.", "attention.attention.key.", "attention.attention.value.")

VIT_MODEL_TYPE, MAE_MODEL_TYPE = "vit", "vit_mae"  # in config.json of a ViTModel and a ViTMAEModel

VIT = KeyTable(
    outside=_EMBEDDINGS,
    layers="encoder.layer.",
    inside=(
        ("layernorm_before.", "norm1."),
        ("attention.output.dense.", "attn.proj."),
        ("layernorm_after.", "norm2."),
        ("intermediate.dense.", "mlp.fc1."),
        ("output.dense.", "mlp.fc2."),
    ),
    query_key_value=_SEPARATE,
)

MAE_DECODER = KeyTable(  # to our names
    outside=(
        ("decoder_embed.", "embed."),
        ("decoder_pos_embed", "pos_embed"),
        ("decoder_norm.", "norm."),
        ("decoder_pred.", "head."),
    ),
    layers="decoder_layers.",
    inside=VIT.inside,
    query_key_value=_SEPARATE,
)

DINOV2 = KeyTable(
    outside=_EMBEDDINGS,
    layers="encoder.layer.",
    inside=(("attention.output.dense.", "attn.proj."), *_SCALES),
    query_key_value=_SEPARATE,
)

DINOV2_SWIGLU = KeyTable(
    outside=_EMBEDDINGS,
    layers="encoder.layer.",
    inside=(*DINOV2.inside, ("mlp.weights_in.", "mlp.fc1."), ("mlp.weights_out.", "mlp.fc2.")),
    query_key_value=_SEPARATE,
)

_DINOV3_INSIDE = (
    ("attention.o_proj.", "attn.proj."),
    ("layer_scale1.lambda1", "gamma_1"),
    ("layer_scale2.lambda1", "gamma_2"),
    ("mlp.down_proj.", "mlp.fc2."),
)

_DINOV3: dict[str, Any] = {
    "outside": (
        ("embeddings.cls_token", "cls_token"),
        ("embeddings.register_tokens", "reg_token"),
        ("embeddings.patch_embeddings.", "patch_embed.proj."),
    ),
    "layers": "layer.",
    "query_key_value": ("attention.q_proj.", "attention.k_proj.", "attention.v_proj."),
    "biases": ("q_bias", "v_bias"),
}

DINOV3 = KeyTable(inside=(*_DINOV3_INSIDE, ("mlp.up_proj.", "mlp.fc1.")), **_DINOV3)

DINOV3_GATED = KeyTable(
    inside=(*_DINOV3_INSIDE, ("mlp.gate_proj.", "mlp.fc1_g."), ("mlp.up_proj.", "mlp.fc1_x.")), **_DINOV3
)

# model_type in config.json -> (setting of a gated MLP or None, tables without and with it)
TABLES: dict[str, tuple[str | None, KeyTable, KeyTable]] = {
    VIT_MODEL_TYPE: (None, VIT, VIT),
    MAE_MODEL_TYPE: (None, VIT, VIT),
    "dinov2": ("use_swiglu_ffn", DINOV2, DINOV2_SWIGLU),
    "dinov2_with_registers": ("use_swiglu_ffn", DINOV2, DINOV2_SWIGLU),
    "dinov3_vit": ("use_gated_mlp", DINOV3, DINOV3_GATED),
}

# hidden_act in config.json -> the module, as PyTorch shows it
ACTIVATIONS = {
    "gelu": "GELU(approximate='none')",
    "gelu_pytorch_tanh": "GELUTanh()",
    "gelu_new": "GELUTanh()",
    "silu": "SiLU()",
    "swish": "SiLU()",
}

# Names of a ViTMAE's decoder; version 5 of transformers writes the first for the second.
_DECODER, _LAYERS = "decoder.", ("decoder_encoder.layer.", "decoder_layers.")

_OUR_DECODER = "branches.mim.decoder."

_ALMOST = 1e-2  # largest difference of a table of sines and cosines, which may be rounded to bfloat16

_UNUSED = ("pooler.", "embeddings.mask_token", "classifier.", "decoder.")


@dataclass(frozen=True)
class TransformersWeights:
    """Weights of a folder of transformers under timm's names, and what its configuration tells about them.

    Attributes:
        kind: its ``model_type``.
        tensors: the encoder's.
        grid: (h, w) of the position table.
        num_heads: attention heads.
        activation: the MLP's, as PyTorch shows the module.
        preprocess: from ``preprocessor_config.json``; None without that file.
        decoder: a ViTMAE's, under the names of the pre-training model; empty if it was not requested or is not there.
        decoder_heads: its attention heads; None without one.
    """

    kind: str
    tensors: dict[str, Tensor]
    grid: tuple[int, int]
    num_heads: int
    activation: str
    preprocess: Preprocess | None
    decoder: dict[str, Tensor]
    decoder_heads: int | None


def read_transformers(folder: Path, config: Mapping[str, Any], *, decoder: bool = False) -> TransformersWeights:
    """Read a folder that ``save_pretrained`` wrote.

    Args:
        folder: the folder.
        config: content of its ``config.json``.
        decoder: read the decoder of a ViTMAE too.

    Raises:
        ValueError: if the model is of another kind than ViT, ViTMAE, DINOv2 and DINOv3, a file is missing or
            damaged, or the decoder computes something else than ours would with its weights.
    """
    kind = str(config.get("model_type"))
    if kind not in TABLES:
        raise ValueError(f"{folder} is not a ViT: model_type {shown(kind)} is none of {', '.join(TABLES)}")
    name = str(folder / CONFIG)
    sides = _sides(config, "image_size", name)
    patches = _sides(config, "patch_size", name)
    heads = check_int(f"{name}: num_attention_heads", config.get("num_attention_heads"), Bounds(ge=1, most=MAX_HEADS))
    gated, plain, with_gate = TABLES[kind]
    is_gated = gated is not None and bool(config.get(gated))
    file = next((folder / file for file in WEIGHTS if (folder / file).exists()), None)
    if file is None:
        raise ValueError(f"{folder} holds none of {', '.join(WEIGHTS)}")
    state = read_shards(file) if file.name == INDEX else read_state(file)
    activation = "silu" if is_gated and kind != "dinov3_vit" else str(config.get("hidden_act"))
    activation = ACTIVATIONS.get(activation, activation)
    grid = (sides[0] // patches[0], sides[1] // patches[1])
    branch = _mae_decoder(state, grid, activation, file) if decoder and kind == MAE_MODEL_TYPE else {}
    word = "decoder_num_attention_heads"
    return TransformersWeights(
        kind=kind,
        tensors=(with_gate if is_gated else plain).to_timm(_without_model_prefix(state, file)),
        grid=grid,
        num_heads=heads,
        activation=activation,
        preprocess=_preprocess(folder, sides, config),
        decoder=branch,
        decoder_heads=check_int(f"{name}: {word}", config.get(word), Bounds(ge=1, most=MAX_HEADS)) if branch else None,
    )


def _mae_decoder(state: Mapping[str, Tensor], grid: tuple[int, int], activation: str, file: Path) -> dict[str, Tensor]:
    """The decoder of a ViTMAE under the names of our pre-training model; empty without one.

    Raises:
        ValueError: if activation or positions are not those of our decoder, which are in none of its tensors.
    """
    theirs = {key.removeprefix(_DECODER): value for key, value in state.items() if key.startswith(_DECODER)}
    if not theirs:
        return {}
    if activation != ACTIVATIONS["gelu"]:
        raise ValueError(f"--init-decoder: {file} has a decoder with the activation {activation}, not GELU")
    decoder = MAE_DECODER.to_timm({key.replace(*_LAYERS): value for key, value in theirs.items()})
    table = decoder.get("pos_embed")
    if table is not None and not _is_fixed(table.float(), grid):
        raise ValueError(
            f"--init-decoder: {file} has a decoder with other positions than the sines and cosines of "
            f"{grid[0]} x {grid[1]} patches and a class token"
        )
    return {f"{_OUR_DECODER}{key}": value for key, value in decoder.items()}


def _is_fixed(table: Tensor, grid: tuple[int, int]) -> bool:
    """Whether a position table is that of a grid after one class token, as our decoder computes it."""
    shape, width = (1, 1 + grid[0] * grid[1], table.shape[-1]), table.shape[-1]
    if table.shape != shape or width % 4:
        return False
    return torch.allclose(table, sincos_positions(width, grid, 1), rtol=0, atol=_ALMOST)


def _without_model_prefix(state: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The trunk of a model with a head (``vit.embeddings.cls_token``) or without, without its name and heads."""
    first = next((key for key in state if key.endswith("embeddings.cls_token")), None)
    if first is None:
        raise ValueError(f"{file} holds no weights of a ViT of transformers: embeddings.cls_token is missing")
    prefix = first.removesuffix("embeddings.cls_token")
    trunk = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return {key: value for key, value in trunk.items() if not key.startswith(_UNUSED)}


def _sides(config: Mapping[str, Any], name: str, file: str) -> tuple[int, int]:
    value = config.get(name)
    sides = value if isinstance(value, list) and len(value) == 2 else [value, value]
    height, width = (check_int(f"{file}: {name}", side, Bounds(ge=1, most=MAX_SIDE)) for side in sides)
    return height, width


def _preprocess(folder: Path, sides: tuple[int, int], config: Mapping[str, Any]) -> Preprocess | None:
    file = folder / PREPROCESSOR
    if not file.exists():
        return None
    values = read_json(file, dict[str, Any])
    mean, std = values.get("image_mean"), values.get("image_std")
    if mean is None or std is None:
        return None
    try:
        return Preprocess(sides, config.get("num_channels", 3), mean, std)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
