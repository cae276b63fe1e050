"""Conversion of weights: key tables that invert each other, strict loading, untrusted files."""

import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dmjd.branches import Distillation, Reconstruction
from dmjd.encoders.classifier import Classifier
from dmjd.encoders.published import to_ours, to_published
from dmjd.encoders.registry import create_encoder
from dmjd.encoders.stored import encoder_bytes
from dmjd.encoders.weights import load_encoder
from dmjd.interop.conversion import from_timm, load_official, timm_arguments
from dmjd.masking import DisjointMasks, disjoint_masks
from dmjd.model import MaskedImageModel
from dmjd.nn.tokens import sincos_positions

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = {"convit_pretrain": True, "convit_classify": True, "mae_pretrain": False}


def golden_keys(name: str) -> list[str]:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return [key.removeprefix("state.") for key in file.keys() if key.startswith("state.")]  # noqa: SIM118


# ---- key tables


@pytest.mark.parametrize(("name", "conv_vit"), FILES.items())
def test_key_tables_invert_each_other(name, conv_vit):
    keys = golden_keys(name)
    assert len(keys) > 40
    ours = [to_ours(key, conv_vit) for key in keys]
    assert len(set(ours)) == len(keys)
    assert [to_published(key, conv_vit) for key in ours] == keys


@pytest.mark.parametrize(
    ("published", "ours", "conv_vit"),
    [
        ("blocks3.4.attn.qkv.weight", "encoder.blocks.4.attn.qkv.weight", True),
        ("blocks1.0.attn.weight", "encoder.blocks1.0.dwconv.weight", True),
        ("blocks2.1.conv2.bias", "encoder.blocks2.1.conv2.bias", True),
        ("stage2_output_decode.bias", "fusion.convs.1.bias", True),
        ("blocks.1.attn.proj.bias", "encoder.blocks.1.attn.proj.bias", False),
        ("cls_token", "encoder.cls_token", False),
        ("norm.weight", "encoder.norm.weight", False),
        ("mask_token", "branches.mim.decoder.mask_token", False),
        ("decoder_pred.bias", "branches.mim.decoder.head.bias", False),
        ("predictor.0.weight", "branches.vis.head.predictor.weight", True),
        ("proj_embed.3.weight", "branches.vis.head.projector.3.weight", True),
    ],
)
def test_known_names(published, ours, conv_vit):
    assert to_ours(published, conv_vit) == ours
    assert to_published(ours, conv_vit) == published


def as_published(model: nn.Module, conv_vit: bool) -> dict[str, Tensor]:
    """A model's weights as the published code would save them: its names, 1 x 1 convolutions with four dimensions."""
    state = {}
    for key, value in model.state_dict().items():
        name = to_published(key, conv_vit)
        pointwise = conv_vit and name.startswith(("blocks1.", "blocks2.")) and value.dim() == 2
        state[name] = value[:, :, None, None] if pointwise else value
    return state


def shake(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.parametrize(
    ("name", "encoder_options", "options"),
    [
        (
            "vit_tiny_patch8",
            {"embed_dim": 32, "depth": 2, "num_heads": 2, "class_token": True},
            {"vis": None},
        ),
        ("vit_tiny_patch4", {"embed_dim": 32, "depth": 1, "num_heads": 4, "mlp_ratio": 2.0, "in_chans": 5}, {}),
        ("conv_vit_tiny_patch16", {"embed_dims": (8, 12, 16), "depths": (1, 2, 1), "num_heads": 2}, {}),
        (
            "conv_vit_tiny_patch8",
            {
                "embed_dims": (8, 12, 16),
                "depths": (2, 1, 2),
                "num_heads": 2,
                "mlp_ratios": (4.0, 2.0, 3.0),
                "in_chans": 1,
            },
            {"vis": None},
        ),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", None])
def test_pretraining_weights_round_trip(name, encoder_options, options, suffix, tmp_path):
    torch.manual_seed(0)
    side = 64 if name.endswith("16") else 32
    encoder = create_encoder(name, img_size=side, **encoder_options)
    mim = Reconstruction("pixel" if "vis" in options else "hog", decoder_dim=16, decoder_depth=2, decoder_heads=4)
    vis = None if "vis" in options else Distillation(projector_dim=16)
    model = MaskedImageModel(encoder, DisjointMasks(1, 0.5, block_size=1), mim, vis).eval()
    shake(model)
    state = as_published(model, name.startswith("conv"))
    source: Path | dict[str, Tensor] = state
    if suffix is not None:
        source = tmp_path / f"weights{suffix}"
        if suffix == ".pth":
            torch.save({"model": state, "epoch": 3}, source)
        else:
            save_file({key: value.contiguous() for key, value in state.items()}, source)
    loaded = load_official(source, num_heads=encoder_options["num_heads"], decoder_heads=4)
    assert isinstance(loaded, MaskedImageModel)
    assert not loaded.training
    assert (loaded.encoder.grid, loaded.encoder.in_chans) == (encoder.grid, encoder.in_chans)
    assert list(loaded.branches) == (["mim"] if "vis" in options else ["mim", "vis"])
    images = torch.randn(2, encoder.in_chans, side, side)
    raw = torch.randint(0, 256, images.shape)
    masks = disjoint_masks(2, encoder.grid, 1, 0.5, keys=torch.arange(2))
    with torch.no_grad():
        for key, value in model(images, raw, masks=masks).items():
            assert torch.equal(loaded(images, raw, masks=masks)[key], value), key
    (tmp_path / "encoder.safetensors").write_bytes(encoder_bytes(loaded.encoder))
    loaded_encoder = load_encoder(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded_encoder(images), encoder(images))


@pytest.mark.parametrize("with_norm", [True, False])
def test_classifier_round_trip(with_norm):
    """Fine-tuned weights drop the norm of pre-training; those that keep it load too."""
    torch.manual_seed(0)
    encoder = create_encoder(
        "conv_vit_tiny_patch16", img_size=32, embed_dims=(8, 12, 16), depths=(1, 1, 1), num_heads=2
    )
    model = Classifier(encoder, 7).eval()
    shake(model)
    state = as_published(model, True)
    if not with_norm:
        state = {key: value for key, value in state.items() if not key.startswith("norm.")}
    loaded = load_official(state, num_heads=2)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    del state["fc_norm.bias"]
    with pytest.raises(ValueError, match=r"missing: fc_norm\.bias"):
        load_official(state, num_heads=2)


# ---- strictness


@pytest.fixture(scope="module")
def mae_state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    encoder = create_encoder("vit_tiny_patch8", img_size=32, embed_dim=32, depth=1, num_heads=2)
    mim = Reconstruction("pixel", decoder_dim=16, decoder_depth=1, decoder_heads=4)
    model = MaskedImageModel(encoder, mim=mim, vis=None)
    return as_published(model, False)


def test_every_missing_key_is_named(mae_state):
    for key in mae_state:
        state = {k: v for k, v in mae_state.items() if k != key}
        with pytest.raises(ValueError, match=rf"{key}\b.*missing|missing.*\b{key}|neither a decoder \({key}\)"):
            load_official(state, num_heads=2, decoder_heads=4)


def test_unknown_keys_and_wrong_shapes_are_named(mae_state):
    heads = {"num_heads": 2, "decoder_heads": 4}
    with pytest.raises(ValueError, match=r"unknown: blocks\.0\.ls1\.gamma, surprise"):
        load_official(mae_state | {"surprise": torch.zeros(1), "blocks.0.ls1.gamma": torch.zeros(32)}, **heads)
    with pytest.raises(ValueError, match=r"of wrong shape: norm\.weight is \[31\], expected \[32\]"):
        load_official(mae_state | {"norm.weight": torch.zeros(31)}, **heads)
    with pytest.raises(ValueError, match="table of 15 patches is not square"):
        load_official(mae_state | {"pos_embed": torch.zeros(1, 15, 32)}, **heads)


def test_heads_that_cannot_be_inferred_from_shapes(mae_state):
    with pytest.raises(ValueError, match="num_heads cannot be inferred from a width of 32: pass num_heads="):
        load_official(mae_state)
    with pytest.raises(ValueError, match="num_heads cannot be inferred"):
        load_official(mae_state, num_heads=5)


def test_weights_of_something_else():
    with pytest.raises(
        ValueError, match=r"not DMJD, ConvMAE or MAE weights: pos_embed, patch_embed\.proj\.weight missing"
    ):
        load_official({"conv1.weight": torch.zeros(1)})


# ---- files


class Bomb:
    """Runs code when it is unpickled without ``weights_only``."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):
        return (Path.touch, (self.victim,))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["torch", "pickle", "legacy"])
@pytest.mark.parametrize("suffix", [".pth", ".bin"])
def test_a_pickle_with_code_is_refused_and_does_not_run(form, suffix, tmp_path):
    victim, file = tmp_path / "ran", tmp_path / f"weights{suffix}"
    content = {"model": {"pos_embed": torch.zeros(1)}, "payload": Bomb(victim)}
    if form == "pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(
        ValueError, match=r"could not be read as plain weights .*Nothing in a file is ever executed"
    ) as caught:
        load_official(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)  # torch's advice to execute it
    assert not victim.exists()
    if form != "legacy":  # without weights_only, loading does run the code
        pickle.loads(pickle.dumps(Bomb(victim)))
        assert victim.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.99])
def test_a_file_cut_short_is_refused(suffix, fraction, mae_state, tmp_path):
    file = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"model": mae_state}, file)
    else:
        save_file(mae_state, file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * fraction)])
    with pytest.raises(ValueError, match=rf"weights\{suffix} (could not be read|is not a readable)"):
        load_official(file)


def test_files_without_weights(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.pth is not a file"):
        load_official(tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="is not a file"):
        load_official(tmp_path)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds no state dict of tensors"):
        load_official(tmp_path / "list.pth")
    torch.save({"model": {"a": 1}}, tmp_path / "numbers.pth")
    with pytest.raises(ValueError, match="holds no state dict of tensors"):
        load_official(tmp_path / "numbers.pth")


# ---- timm


def timm_vit(**options) -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **sizes | options).eval()


def test_from_timm_drops_the_head_and_saves_like_any_encoder(tmp_path):
    torch.manual_seed(0)
    theirs = timm_vit(in_chans=4, img_size=(32, 48))
    ours = from_timm(theirs)
    assert (ours.in_chans, ours.img_size, ours.num_prefix_tokens, ours.training) == (4, (32, 48), 1, False)
    images = torch.randn(2, 4, 32, 48)
    (tmp_path / "encoder.safetensors").write_bytes(encoder_bytes(ours))
    with torch.no_grad():
        torch.testing.assert_close(ours.forward_features(images), theirs.forward_features(images), rtol=0, atol=1e-5)
        assert torch.equal(load_encoder(tmp_path)(images), ours(images))


def test_from_timm_with_the_norm_behind_the_pooling():
    theirs = timm_vit(class_token=False, global_pool="avg")
    assert isinstance(theirs.norm, nn.Identity)
    ours = from_timm(theirs)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs.forward_features(images), rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.norm.weight, theirs.fc_norm.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_values": 1e-5}, r"unknown: blocks\.0\.ls1\.gamma"),
        ({"reg_tokens": 4}, r"unknown: .*reg_token"),
        ({"pre_norm": True}, r"unknown: norm_pre\.bias"),
        ({"qk_norm": True}, r"unknown: blocks\.0\.attn\.k_norm"),
        ({"qkv_bias": False}, r"missing: blocks\.0\.attn\.qkv\.bias"),
        ({"act_layer": "quick_gelu"}, "computes other values than timm/vit_tiny_patch16_224"),
        ({"num_heads": 3, "embed_dim": 30}, "a width divisible by 4"),
    ],
)
def test_from_timm_refuses_unsupported_parts(options, message):
    with pytest.raises(ValueError, match=message):
        from_timm(timm_vit(**options))


def test_from_timm_refuses_other_classes():
    with pytest.raises(ValueError, match="ResNet is not a plain vision transformer of timm"):
        from_timm(timm.create_model("resnet10t"))
    with pytest.raises(ValueError, match="VisionTransformerDistilled is not a plain"):
        from_timm(timm.create_model("deit_tiny_distilled_patch16_224", depth=1))
    with pytest.raises(ValueError, match=r"was not built by timm\.create_model"):
        from_timm(timm.models.VisionTransformer(img_size=32, embed_dim=32, depth=1, num_heads=2, reg_tokens=1))


@pytest.mark.parametrize(
    "name", ["eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "vit_small_patch14_reg4_dinov2"]
)
def test_from_timm_takes_other_vision_transformers_by_their_names(name):
    patch = 14 if "14" in name else 16
    sizes = {"img_size": (2 * patch, 3 * patch), "embed_dim": 32, "depth": 2, "num_heads": 2, "in_chans": 1}
    theirs = timm.create_model(name, **sizes, num_classes=5).eval()
    ours = from_timm(theirs)
    assert (ours.name, ours.img_size, ours.in_chans) == (f"timm/{name}", sizes["img_size"], 1)
    norm = theirs.fc_norm if isinstance(theirs.norm, nn.Identity) else theirs.norm
    torch.testing.assert_close(ours.norm.weight, norm.weight)
    images = torch.randn(2, 1, *sizes["img_size"])
    with torch.no_grad():
        expected = theirs.forward_intermediates(images, 1, norm=True, output_fmt="NLC", intermediates_only=True)[0]
        tokens = ours(images) if norm is theirs.fc_norm else ours.forward_features(images)
    torch.testing.assert_close(tokens[:, ours.num_prefix_tokens :], expected, rtol=0, atol=1e-5)


def test_timm_arguments_are_for_vit_only():
    with pytest.raises(ValueError, match="timm has no ConvViT"):
        timm_arguments(create_encoder("conv_vit_tiny_patch16", img_size=32, depths=(1, 1, 1)))


def test_published_position_tables_are_the_fixed_ones():
    """Another image size recomputes them, which holds only if the stored table is the sine-cosine one."""
    with safe_open(GOLDEN / "convit_pretrain.safetensors", "pt") as file:
        table = file.get_tensor("state.pos_embed")
    torch.testing.assert_close(table, sincos_positions(table.shape[-1], (14, 14)), rtol=0, atol=1e-5)
