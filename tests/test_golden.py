"""Comparison with the published code: DMJD at commit 881b21d, MAE at commit efb2a80 (float32, CPU)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import dmjd
from dmjd.encoders.classifier import Classifier
from dmjd.encoders.published import to_ours
from dmjd.images.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from dmjd.interop.conversion import load_official
from dmjd.nn.tokens import gather_tokens
from dmjd.targets import hog

GOLDEN = Path(__file__).parent / "golden"


def read(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict]:
    """Expected values with their two input photographs, the published state dict, the configuration."""
    with safe_open(GOLDEN / name, "pt") as file:
        values = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    raw = load_file(GOLDEN / "photographs.safetensors")["images_u8"]
    values |= {"images_u8": raw, "images": Preprocess((224, 224), 3, IMAGENET_MEAN, IMAGENET_STD).normalize(raw)}
    state = {key.removeprefix("state."): values.pop(key) for key in list(values) if key.startswith("state.")}
    return values, state, config


def assert_gradient_norms(model: nn.Module, values: dict[str, torch.Tensor], conv_vit: bool) -> None:
    parameters = dict(model.named_parameters())
    published = {key.removeprefix("grad_norm."): value for key, value in values.items() if key.startswith("grad_norm.")}
    assert len(published) == sum(p.requires_grad for p in parameters.values())
    for key, expected in published.items():
        torch.testing.assert_close(
            parameters[to_ours(key, conv_vit)].grad.norm(), expected, rtol=1e-3, atol=1e-7, msg=key
        )


@pytest.fixture(scope="module")
def convit():
    values, state, config = read("convit_pretrain.safetensors")
    model = load_official(state, num_heads=config["num_heads"], decoder_heads=config["decoder_num_heads"])
    B = values["images"].shape[0]
    masks = dmjd.Masks.from_visible(values["ids_keep"].view(-1, B, values["ids_keep"].shape[1]), num_tokens=196)
    return model, values, masks


def test_convit_pretraining_outputs(convit):
    model, values, masks = convit
    visible, masked = masks.visible.flatten(0, 1), masks.masked.flatten(0, 1)
    with torch.no_grad():
        latent = model.encode(values["images"], masks.visible)
        torch.testing.assert_close(latent, values["latent"], rtol=0, atol=1e-4)
        everything = model.branches["mim"].decoder(latent, visible, masked, all_tokens=True)
        expected = gather_tokens(values["pred"], torch.cat([visible, masked], dim=1))
        torch.testing.assert_close(everything, expected, rtol=0, atol=1e-4)
        predictions = model.predict(values["images"], masks)
    torch.testing.assert_close(predictions["mim"], gather_tokens(values["pred"], masked), rtol=0, atol=1e-4)
    torch.testing.assert_close(predictions["vis"], values["pred_vis"], rtol=0, atol=1e-4)
    assert torch.equal(masks.mask.flatten(0, 1), values["mask"].bool())


def test_convit_losses_and_gradients(convit):
    model, values, masks = convit
    model.zero_grad()
    out = model(values["images"], values["images_u8"], masks=masks)
    for name, expected in (("loss", "loss"), ("mim", "loss_mim"), ("vis", "loss_vis")):
        torch.testing.assert_close(out[name].detach(), values[expected], rtol=1e-5, atol=0)
    out["loss"].backward()
    assert_gradient_norms(model, values, conv_vit=True)


def test_published_misaligned_loss_differs(convit):
    """The published loss compares visible tokens with targets in raster order; ours must differ from it."""
    model, values, masks = convit
    _, _, config = read("convit_pretrain.safetensors")
    with torch.no_grad():
        loss = model(values["images"], values["images_u8"], masks=masks)["loss"].item()
    assert abs(loss - config["loss_as_published"]) > 5e-4


def test_hog_and_whitened_target(convit):
    model, values, _ = convit
    torch.testing.assert_close(hog(values["images_u8"], cell_size=8), values["hog"], rtol=0, atol=1e-4)
    target = model.target("mim")(values["images"], values["images_u8"])
    torch.testing.assert_close(target, values["target"], rtol=0, atol=1e-4)


def test_convit_classifier():
    values, state, config = read("convit_classify.safetensors")
    model = load_official(state, num_heads=config["num_heads"])
    assert isinstance(model, Classifier)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(values["images"]), values["features"], rtol=0, atol=1e-4)
        torch.testing.assert_close(model(values["images"]), values["logits"], rtol=0, atol=1e-4)


def test_mae():
    values, state, config = read("mae_pretrain.safetensors")
    model = load_official(state, num_heads=config["num_heads"], decoder_heads=config["decoder_num_heads"])
    masks = dmjd.Masks.from_visible(values["ids_keep"], num_tokens=196)
    visible, masked = masks.visible[0], masks.masked[0]
    latent = model.encode(values["images"], masks.visible)
    torch.testing.assert_close(latent, values["latent"], rtol=0, atol=1e-4)
    everything = model.branches["mim"].decoder(latent, visible, masked, all_tokens=True)
    expected = gather_tokens(values["pred"], torch.cat([visible, masked], dim=1))
    torch.testing.assert_close(everything, expected, rtol=0, atol=1e-4)
    assert torch.equal(masks.mask[0], values["mask"].bool())
    out = model(values["images"], torch.zeros_like(values["images"]), masks=masks)
    torch.testing.assert_close(out["loss"].detach(), values["loss"], rtol=1e-5, atol=0)
    out["loss"].backward()
    assert_gradient_norms(model, values, conv_vit=False)


@pytest.mark.parametrize("name", ["convit_pretrain", "mae_pretrain"])
def test_unknown_and_missing_keys_are_named(name, tmp_path):
    _, state, config = read(f"{name}.safetensors")
    heads = {"num_heads": config["num_heads"], "decoder_heads": config["decoder_num_heads"]}
    torch.save({"model": state}, tmp_path / "good.pth")
    load_official(tmp_path / "good.pth", **heads)
    with pytest.raises(ValueError, match=r"unknown: surprise\.weight"):
        load_official(state | {"surprise.weight": torch.zeros(1)}, **heads)
    state.pop("norm.weight")
    with pytest.raises(ValueError, match=r"missing: norm\.weight"):
        load_official(state, **heads)
