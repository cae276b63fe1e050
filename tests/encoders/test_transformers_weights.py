"""Folders of transformers: the key tables invert each other, and features equal those of transformers."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load, load_file, save_file
from torch import Tensor, nn

from dmjd.branches import Reconstruction
from dmjd.encoders.initialization import create_encoder, initialize
from dmjd.encoders.registry import ENCODERS
from dmjd.encoders.registry import create_encoder as create_fresh_encoder
from dmjd.encoders.sources import read_weights
from dmjd.encoders.transformers_weights import DINOV2, DINOV2_SWIGLU, DINOV3, DINOV3_GATED, VIT
from dmjd.model import MaskedImageModel
from dmjd.nn.tokens import gather_tokens
from dmjd.runs.start import Start

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
HIDDEN = {"intermediate_size": 64, "layer_norm_eps": 1e-6}
DECODER = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_intermediate_size": 32}
OURS = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "class_token": True}

# model -> (its class, the class of its configuration, settings)
MODELS = {
    "vit": ("ViTModel", "ViTConfig", HIDDEN),
    "vit with a head": ("ViTForImageClassification", "ViTConfig", HIDDEN),
    "mae": (
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        HIDDEN | DECODER | {"decoder_num_attention_heads": 2, "mask_ratio": 0.0},
    ),
    "dinov2": ("Dinov2Model", "Dinov2Config", {"mlp_ratio": 2}),
    "dinov2 swiglu": ("Dinov2Model", "Dinov2Config", {"mlp_ratio": 2, "use_swiglu_ffn": True}),
    "dinov2 registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", {"mlp_ratio": 2}),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", {"intermediate_size": 64, "num_register_tokens": 4}),
    "dinov3 gated": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {"intermediate_size": 64, "num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu"},
    ),
}


def saved(kind: str, folder: Path, patch_size: int = 8, **changes: object) -> nn.Module:
    """A model of 4 x 4 patches with random weights, also those that start as zeros or ones, saved into a folder.

    The decoder's positions are the fixed ones of published files; some versions of transformers start with zeros.
    """
    torch.manual_seed(0)
    model, config, settings = MODELS[kind]
    sizes = SIZES | {"image_size": 4 * patch_size, "patch_size": patch_size}
    model = getattr(transformers, model)(getattr(transformers, config)(**sizes, **settings | changes)).eval()
    if hasattr(model, "decoder"):
        model.decoder.initialize_weights(16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "decoder_pos_embed" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def images(side: int = 32) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def trunk(model: nn.Module) -> nn.Module:
    return getattr(model, "vit", model)


def tokens_of(model: nn.Module, side: int = 32) -> Tensor:
    """All tokens after the final norm, as transformers computes them."""
    order = {"noise": torch.arange(16.0).expand(2, -1)} if "MAE" in type(model).__name__ else {}
    with torch.no_grad():
        return trunk(model)(images(side), **order).last_hidden_state


@pytest.mark.parametrize(
    ("kind", "table"),
    [
        ("vit", VIT),
        ("dinov2 registers", DINOV2),
        ("dinov2 swiglu", DINOV2_SWIGLU),
        ("dinov3", DINOV3),
        ("dinov3 gated", DINOV3_GATED),
    ],
)
def test_the_key_tables_invert_each_other(kind, table, tmp_path):
    saved(kind, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    converted = table.to_timm(state)
    assert not any("attention" in key or key.startswith(("encoder.layer", "layer.")) for key in converted)
    back = table.to_transformers(converted)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("kind", ["vit", "vit with a head", "mae", "dinov2"])
def test_features_of_a_plain_vit_equal_those_of_transformers(kind, tmp_path):
    """Layer scale of DINOv2 is moved into the weights."""
    model = saved(kind, tmp_path)
    encoder = create_encoder("vit_tiny_patch8", init=tmp_path, **OURS)
    with torch.no_grad():
        torch.testing.assert_close(encoder.forward_features(images()), tokens_of(model), rtol=0, atol=1e-5)


def timm_vit(kind: str) -> nn.Module:
    """timm's model of the kind, small and with random weights."""
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    if kind.startswith("dinov2"):
        packed = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 96 / 32}
        more = packed if kind.endswith("swiglu") else {"mlp_ratio": 2.0}
        name = "vit_small_patch14_reg4_dinov2" if kind.endswith("registers") else "vit_small_patch14_dinov2"
        return timm.create_model(name, **small, **more).eval()
    gated = "_plus" if kind.endswith("gated") else ""
    name = f"vit_small{gated}_patch16_dinov3_qkvb"
    return timm.create_model(name, **small, mlp_ratio=2.0, global_pool="token").eval()


@pytest.mark.parametrize("kind", ["dinov2", "dinov2 swiglu", "dinov2 registers", "dinov3", "dinov3 gated"])
def test_features_of_timms_models_equal_those_of_transformers(kind, tmp_path):
    """Layer scale, registers, gated MLPs and rotary positions, under timm's names."""
    model, theirs = saved(kind, tmp_path), timm_vit(kind)
    weights = read_weights(tmp_path)
    tensors = dict(weights.tensors)
    if kind == "dinov2 registers":  # timm has no position of the class token there
        tensors["cls_token"] = tensors["cls_token"] + tensors["pos_embed"][:, :1]
        tensors["pos_embed"] = tensors["pos_embed"][:, 1:]
    theirs.load_state_dict(tensors)
    with torch.no_grad():
        torch.testing.assert_close(theirs.forward_features(images()), tokens_of(model), rtol=0, atol=2e-5)


@pytest.mark.skipif("timm" not in ENCODERS, reason="there are no encoders of timm")
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("vit", "vit_tiny_patch16_224"),
        ("dinov2", "vit_small_patch14_dinov2"),
        ("dinov2 registers", "vit_small_patch14_reg4_dinov2"),
        ("dinov3", "vit_small_patch16_dinov3_qkvb"),
        ("dinov3 gated", "vit_small_plus_patch16_dinov3_qkvb"),
    ],
)
def test_features_of_encoders_of_timm_equal_those_of_transformers(kind, name, tmp_path):
    patch_size = 14 if "patch14" in name else 16
    model = saved(kind, tmp_path, patch_size)
    sizes = OURS | {"img_size": 4 * patch_size, "class_token": False}
    encoder = create_encoder(f"timm/{name}", init=tmp_path, **sizes).eval()
    x = images(4 * patch_size)
    with torch.no_grad():
        torch.testing.assert_close(encoder.forward_features(x), tokens_of(model, x.shape[-1]), rtol=0, atol=2e-5)


def test_what_the_folder_tells_besides_weights(tmp_path):
    saved("dinov3 gated", tmp_path)
    weights = read_weights(tmp_path)
    assert (weights.grid, weights.num_heads, weights.activation) == (None, 2, "SiLU()")
    assert weights.preprocess is None
    content = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "size": {"height": 32}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    preprocess = read_weights(tmp_path).preprocess
    assert (preprocess.mean, preprocess.std, preprocess.img_size) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), (32, 32))


def change_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "quick_gelu"}, "has the activation quick_gelu, vit_tiny_patch8 has the activation GELU"),
        ({"hidden_act": "gelu_new"}, r"has the activation GELUTanh\(\), vit_tiny_patch8"),
        ({"num_attention_heads": 4}, "has 4 attention heads, vit_tiny_patch8 has 2 attention heads"),
        ({"num_attention_heads": None}, r"config\.json: num_attention_heads must be int"),
        ({"model_type": "swin"}, "is not a ViT: model_type 'swin' is none of vit, vit_mae"),
        ({"model_type": ["vit"]}, "is not a ViT"),
        ({"image_size": "32"}, r"config\.json: image_size must be int"),
        ({"image_size": 800}, r"pos_embed is \[1, 17, 32\], too small for 100 x 100 tokens"),
    ],
)
def test_configurations_that_do_not_fit(changes, message, tmp_path):
    saved("vit", tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as refused:
        create_encoder("vit_tiny_patch8", init=tmp_path, **OURS)
    assert "\n" not in str(refused.value)


def test_damaged_folders(tmp_path):
    saved("vit", tmp_path)
    file = tmp_path / "model.safetensors"
    state = load(file.read_bytes())  # not mapped: the file is overwritten
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"no weights of a ViT of transformers: embeddings\.cls_token is missing"):
        read_weights(tmp_path)
    save_file({key: value for key, value in state.items() if "key" not in key}, file)
    encoder = create_fresh_encoder("vit_tiny_patch8", **OURS)
    with pytest.raises(
        ValueError, match=r"4 of 30 tensors would stay fresh: blocks\.0\.attn\.qkv\.weight, .*; it has 8"
    ):
        initialize(encoder, read_weights(tmp_path))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file"):
        read_weights(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match=r"holds none of model\.safetensors, .*, pytorch_model\.bin"):
        read_weights(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        read_weights(tmp_path)


DECODED = {"decoder_dim": 16, "decoder_depth": 2, "decoder_heads": 2, "decoder_mlp_ratio": 2.0}


def started(folder: Path, encoder: dict[str, object] = {}, **mim: object) -> MaskedImageModel:  # noqa: B006, only read
    """A model of MAE that starts from encoder and decoder of a folder."""
    encoder = create_fresh_encoder("vit_tiny_patch8", **OURS | encoder)
    model = MaskedImageModel(encoder, mim=Reconstruction("pixel", **DECODED | mim), vis=None)
    start = Start(read_weights(folder, decoder=True), with_decoder=True)
    start.load_encoder(model.encoder)
    start.load_decoder(model)
    return model.eval()


def rename_tensors(folder: Path, old: str, new: str) -> None:
    file = folder / "model.safetensors"
    save_file({key.replace(old, new): value for key, value in load_file(file).items()}, file)


@pytest.mark.parametrize("layers", ["decoder_encoder.layer.", "decoder_layers."])
def test_the_reconstruction_of_a_vit_mae_equals_that_of_transformers(layers, tmp_path):
    """All tokens, with half of them masked; the layers of the decoder have two names in files."""
    theirs = saved("mae", tmp_path, decoder_num_hidden_layers=2)
    rename_tensors(tmp_path, "decoder_encoder.layer.", layers)
    ours = started(tmp_path)
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(1))
    order = noise.argsort(1)
    theirs.config.mask_ratio = 0.5
    visible, masked = order[:, :8], order[:, 8:]
    with torch.no_grad():
        expected = theirs(images(), noise=noise).logits
        found = ours.branches["mim"].decoder(ours.encode(images(), visible[None]), visible, masked, all_tokens=True)
    torch.testing.assert_close(found, gather_tokens(expected, order), rtol=0, atol=1e-5)


def test_folders_without_a_decoder_that_fits(tmp_path):
    """Those of encoders alone, and of tasks whose decoder is of another kind."""
    saved("mae", tmp_path)
    weights = read_weights(tmp_path)
    assert (weights.decoder, weights.decoder_heads) == ({}, None)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    save_file({key: value for key, value in state.items() if not key.startswith("decoder.")}, file)
    with pytest.raises(ValueError, match=r"--init-decoder: .* holds no decoder: give a run"):
        started(tmp_path)
    save_file(state, file)
    change_config(tmp_path, model_type="vit")
    assert read_weights(tmp_path, decoder=True).decoder == {}


@pytest.mark.parametrize(
    ("config", "ours", "message"),
    [
        ({"hidden_act": "gelu_new"}, {}, r"has a decoder with the activation GELUTanh\(\), not GELU$"),
        ({"image_size": 40}, {}, "other positions than the sines and cosines of 5 x 5 patches and a class token$"),
        ({"decoder_num_attention_heads": 4}, {}, "of 4 attention heads, not 2: give --decoder-heads 4$"),
        ({"decoder_num_attention_heads": "2"}, {}, r"config\.json: decoder_num_attention_heads must be int, got '2'$"),
        ({}, {"encoder": {"class_token": False}}, r"reads 1 prefix tokens .*, but here are 0: .*\(--class-token\)"),
        ({}, {"decoder_depth": 3}, r"blocks\.2\.attn\.proj\.bias is missing there and \[16\] here"),
        ({}, {"decoder_mlp_ratio": 4.0}, r"blocks\.0\.mlp\.fc1\.bias is \[32\] there and \[64\] here"),
    ],
)
def test_decoders_that_do_not_fit(config, ours, message, tmp_path):
    saved("mae", tmp_path, decoder_num_hidden_layers=2)
    change_config(tmp_path, **config)
    with pytest.raises(ValueError, match=message) as refused:
        started(tmp_path, **ours)
    assert "\n" not in str(refused.value)
    assert "--init-decoder" in str(refused.value) or "must be int" in str(refused.value)


@pytest.mark.parametrize("change", ["swapped", "gone", "unknown"])
def test_damaged_decoders(change, tmp_path):
    """Rows and columns swapped in the positions, a tensor that is not there, one more."""
    saved("mae", tmp_path, decoder_num_hidden_layers=2)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    table = state["decoder.decoder_pos_embed"]
    if change == "swapped":
        state["decoder.decoder_pos_embed"] = torch.cat([table[..., 8:], table[..., :8]], 2)
        message = "other positions than the sines"
    elif change == "gone":
        del state["decoder.decoder_encoder.layer.1.attention.attention.key.weight"]
        message = r"branches\.mim\.decoder\.\S+ is .*missing"
    else:
        state["decoder.more"] = torch.zeros(2)
        message = r"branches\.mim\.decoder\.more is \[2\] there and missing here"
    save_file(state, file)
    with pytest.raises(ValueError, match=message) as refused:
        started(tmp_path)
    assert "\n" not in str(refused.value)
