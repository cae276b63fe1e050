"""Encoders that start from weights: everything is loaded or named, and what was adapted is reported."""

import pytest
import timm
import torch
from support import small_encoder
from torch import Tensor, nn

import dmjd
from dmjd.encoders.base import Encoder
from dmjd.encoders.initialization import create_encoder, initialize
from dmjd.encoders.registry import fresh_like
from dmjd.encoders.sources import Weights, hash_of, read_weights
from dmjd.encoders.stored import encoder_bytes, weights_hash
from dmjd.encoders.weights import load_encoder
from dmjd.images.preprocess import Preprocess

SMALL = {
    "vit_tiny_patch8": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "conv_vit_tiny_patch8": {"embed_dims": (8, 12, 16), "depths": (1, 1, 1), "num_heads": 2},
    "conv_vit_tiny_patch4": {"embed_dims": (8, 12, 16), "depths": (1, 1, 1), "num_heads": 2},
}


def trained(name: str = "vit_tiny_patch8", **options) -> Encoder:
    """An encoder whose tensors all differ from a fresh one's, with a preprocessing."""
    torch.manual_seed(1)
    encoder = dmjd.create_encoder(name, **{"img_size": 32} | SMALL[name] | options)
    with torch.no_grad():
        for key, parameter in encoder.named_parameters():
            if key != "pos_embed":
                parameter.add_(0.1 * torch.randn_like(parameter))
    C = encoder.in_chans
    encoder.preprocess = Preprocess(encoder.img_size, C, (0.3,) * C, (0.2,) * C)
    return encoder.eval()


def weights_of(encoder: Encoder, tmp_path) -> Weights:
    file = tmp_path / "encoder.safetensors"
    file.write_bytes(encoder_bytes(encoder))
    return read_weights(file)


def fresh(name: str = "vit_tiny_patch8", **options) -> Encoder:
    return dmjd.create_encoder(name, **{"img_size": 32} | SMALL[name] | options).eval()


def difference(first: Encoder, second: Encoder, images: Tensor) -> float:
    with torch.no_grad():
        return (first(images) - second(images)).abs().max().item()


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "options"),
    [("vit_tiny_patch8", {}), ("vit_tiny_patch8", {"class_token": True}), ("conv_vit_tiny_patch8", {})],
)
def test_the_same_encoder_is_loaded_whole(name, options, tmp_path):
    source = trained(name, **options)
    encoder = fresh(name, **options)
    count = len(encoder.state_dict())
    done = initialize(encoder, weights_of(source, tmp_path))
    assert str(done) == f"{count} of {count} encoder tensors from {tmp_path / 'encoder.safetensors'}"
    assert done.hash == weights_hash(source)
    assert difference(encoder, source, IMAGES) == 0
    assert encoder.preprocess == source.preprocess


def test_create_encoder_takes_weights_and_stays_an_ordinary_encoder(tmp_path):
    """Its file loads without the source, and a baseline of its architecture has random weights."""
    source = trained()
    weights_of(source, tmp_path)
    encoder = dmjd.create_encoder("vit_tiny_patch8", 32, init=tmp_path, **SMALL["vit_tiny_patch8"])
    assert difference(encoder, source, IMAGES) == 0
    random = fresh_like(encoder, seed=0)
    assert (encoder.blocks[0].mlp.fc1.weight - random.blocks[0].mlp.fc1.weight).abs().max() > 0.1
    (tmp_path / "encoder.safetensors").write_bytes(encoder_bytes(encoder))
    assert difference(load_encoder(tmp_path), source, IMAGES) == 0
    backbone = create_encoder("vit_tiny_patch8", 32, init=tmp_path, features_only=True, **SMALL["vit_tiny_patch8"])
    with torch.no_grad():
        maps = source.forward_intermediates(IMAGES, intermediates_only=True)
        assert torch.equal(backbone(IMAGES)[-1], maps[-1])


def test_reading_weights_leaves_the_random_state_alone(tmp_path):
    torch.manual_seed(0)
    weights_of(small_encoder("vit_tiny_patch8", img_size=16), tmp_path)
    before = torch.get_rng_state()
    read_weights(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "options", "changes"),
    [
        ("vit_tiny_patch8", {"img_size": (48, 96)}, ("positions computed 4 x 4 -> 6 x 12",)),
        (
            "vit_tiny_patch8",
            {"img_size": (48, 96), "in_chans": 1},
            ("positions computed 4 x 4 -> 6 x 12", "first layer adapted 3 -> 1 channels"),
        ),
        ("vit_tiny_patch8", {"in_chans": 5}, ("first layer adapted 3 -> 5 channels",)),
        ("conv_vit_tiny_patch8", {"in_chans": 5}, ("first layer adapted 3 -> 5 channels",)),
    ],
)
def test_size_and_channels_are_adapted(name, options, changes, tmp_path):
    encoder = fresh(name, **options)
    done = initialize(encoder, weights_of(trained(name), tmp_path))
    assert done.changes == changes
    assert done.loaded == done.wanted
    if encoder.in_chans != 3:
        assert encoder.preprocess is None  # mean and std are for other channels
    else:
        assert encoder.preprocess.img_size == encoder.img_size


def test_features_of_gray_images_survive_the_change_of_channels(tmp_path):
    source, encoder = trained(), fresh(in_chans=1)
    initialize(encoder, weights_of(source, tmp_path))
    gray = IMAGES[:, :1]
    with torch.no_grad():
        torch.testing.assert_close(encoder(gray), source(gray.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


def test_another_patch_size(tmp_path):
    source, encoder = trained("conv_vit_tiny_patch8"), fresh("conv_vit_tiny_patch4")
    done = initialize(encoder, weights_of(source, tmp_path))
    assert done.changes == ("positions computed 4 x 4 -> 8 x 8", "patches resampled 8 -> 4 pixels")
    vit = dmjd.create_encoder("vit_tiny_patch16", 64, **SMALL["vit_tiny_patch8"])
    done = initialize(vit, weights_of(trained(), tmp_path))
    assert done.changes == ("patches resampled 8 -> 16 pixels",)


def test_a_class_token_is_dropped_and_a_wanted_one_must_be_there(tmp_path):
    with_token = weights_of(trained(class_token=True), tmp_path)
    encoder = fresh()
    assert initialize(encoder, with_token).changes == ("class token dropped",)
    without = weights_of(trained(), tmp_path)
    wanting = fresh(class_token=True)
    state = {key: value.clone() for key, value in wanting.state_dict().items()}
    with pytest.raises(ValueError, match=r"1 of 30 tensors would stay fresh: cls_token; .*--init-fresh cls_token"):
        initialize(wanting, without)
    assert all(torch.equal(value, state[key]) for key, value in wanting.state_dict().items())
    done = initialize(wanting, without, fresh=["cls_token"])
    assert (done.loaded, done.fresh) == (29, ("cls_token",))
    assert str(done).endswith("29 of 30 encoder tensors from " + without.source + ", fresh: cls_token")
    assert torch.equal(wanting.cls_token, state["cls_token"])


def test_requested_tensors_stay_fresh_though_the_source_has_them(tmp_path):
    source, encoder = trained(), fresh(in_chans=4)
    before = encoder.patch_embed.proj.weight.clone()
    done = initialize(encoder, weights_of(source, tmp_path), fresh=["patch_embed."])
    assert done.fresh == ("patch_embed.proj.weight", "patch_embed.proj.bias")
    assert torch.equal(encoder.patch_embed.proj.weight, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 8}, r"72 of 101 tensors would stay fresh: blocks\.2\.norm1\.weight, .* and 67 more\. The weights"),
        ({"depth": 1}, r"it has 12 tensors that the encoder lacks: blocks\.1\.norm1\.weight"),
        ({"embed_dim": 64}, r"pos_embed is \[1, 16, 32\], wanted is \[1, 16, 64\] \(and 28 more\)"),
        ({"num_heads": 4}, "has 2 attention heads, vit_tiny_patch8 has 4 attention heads"),
        ({"mlp_ratio": 2.0}, r"blocks\.0\.mlp\.fc1\.weight is \[128, 32\], wanted is \[64, 32\]"),
    ],
)
def test_weights_of_other_sizes_are_refused(options, message, tmp_path):
    """In one line, which tells how to create the encoder that fits."""
    weights = weights_of(trained(), tmp_path)
    with pytest.raises(ValueError, match=message) as refused:
        initialize(fresh(**options), weights)
    text = str(refused.value)
    assert "--encoder vit_tiny_patch8 --embed-dim 32 --depth 2 --num-heads 2" in text
    assert "\n" not in text


def test_weights_of_another_family_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"would stay fresh: patch_embed1\.proj\.weight, .*that the encoder lacks"):
        initialize(fresh("conv_vit_tiny_patch8"), weights_of(trained(embed_dim=16), tmp_path))


def timm_vit(**options) -> nn.Module:
    torch.manual_seed(2)
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **small | options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def weights_of_timm(model: nn.Module) -> Weights:
    tensors = dict(model.state_dict())
    return Weights("timm", tensors, hash_of(tensors), tuple(model.patch_embed.grid_size), 2, "GELU(approximate='none')")


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({}, ()),
        ({"init_values": 0.5}, ("layer scale moved into the weights",)),
        ({"no_embed_class": True}, ()),
        ({"class_token": False, "global_pool": "avg"}, None),
    ],
)
def test_timm_models_of_other_builds_compute_the_same(options, changes):
    model = timm_vit(**options)
    encoder = fresh(class_token=options.get("class_token", True))
    done = initialize(encoder, weights_of_timm(model))
    with torch.no_grad():
        if changes is None:  # timm has the norm behind the pooling
            torch.testing.assert_close(encoder(IMAGES), model.forward_features(IMAGES), rtol=0, atol=1e-5)
            assert torch.equal(encoder.norm.weight, model.fc_norm.weight)
        else:
            assert done.changes == changes
            torch.testing.assert_close(
                encoder.forward_features(IMAGES), model.forward_features(IMAGES), rtol=0, atol=1e-5
            )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pre_norm": True}, r"it has 2 tensors that the encoder lacks: norm_pre\.weight, norm_pre\.bias"),
        ({"qk_norm": True}, r"lacks: blocks\.0\.attn\.q_norm\.weight"),
        ({"qkv_bias": False}, r"would stay fresh: blocks\.0\.attn\.qkv\.bias"),
    ],
)
def test_timm_models_with_other_parts_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        initialize(fresh(class_token=True), weights_of_timm(timm_vit(**options)))


def test_registers_are_dropped():
    done = initialize(fresh(class_token=True), weights_of_timm(timm_vit(reg_tokens=4)))
    assert done.changes == ("registers dropped",)


def test_biases_that_are_zero_are_left_out():
    weights = weights_of_timm(timm_vit(class_token=False, global_pool="avg"))
    zero = Weights(**vars(weights) | {"tensors": weights.tensors | {"blocks.0.attn.q_bias": torch.zeros(32)}})
    initialize(fresh(), zero)
    other = Weights(**vars(weights) | {"tensors": weights.tensors | {"blocks.0.attn.q_bias": torch.ones(32)}})
    with pytest.raises(ValueError, match=r"lacks: blocks\.0\.attn\.q_bias"):
        initialize(fresh(), other)
