"""The device computes what the CPU computes: masks to the bit, targets and losses to rounding, published values."""

import pytest
import test_golden as published
import torch
from dense_sets import make_run
from tiny_models import KEYS, smooth_images, tiny_model

import dmjd
from dmjd.interop.conversion import load_official
from dmjd.masking import ComplementaryMasks, DisjointMasks, IndependentMasks, Masks
from dmjd.nn.tokens import gather_tokens
from dmjd.targets.hog import hog
from dmjd.targets.teacher import TeacherSettings

pytestmark = pytest.mark.cuda

SAMPLERS = [
    DisjointMasks(2, 0.6),
    DisjointMasks(3, 0.75, 0.9, block_size=1),
    IndependentMasks(2, 0.6),
    ComplementaryMasks(4),
]


def same_masks(first: Masks, second: Masks) -> bool:
    return all(
        torch.equal(getattr(first, name).cpu(), getattr(second, name).cpu()) for name in ("visible", "masked", "mask")
    )


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: f"{type(sampler).__name__}-{sampler.num_views}")
def test_masks_are_those_of_the_cpu(device, sampler):
    keys = torch.randint(-(2**63), 2**63 - 1, (512,), generator=torch.Generator().manual_seed(0))
    drawn, expected = sampler.draw(keys.to(device), (14, 14)), sampler.draw(keys, (14, 14))
    assert drawn.mask.device.type == device.type
    assert same_masks(drawn, expected)
    assert same_masks(drawn.subset_masked(0.25), expected.subset_masked(0.25))


@pytest.mark.parametrize("bins", [4, 9])  # with 4, gradients of 45 degrees lie on the edge of two bins
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_hog_is_that_of_the_cpu(device, dtype, bins):
    images = torch.randint(0, 256, (8, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.testing.assert_close(hog(images.to(device), 8, bins).cpu(), hog(images, 8, bins), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("encoder", ["vit_tiny_patch8", "conv_vit_tiny_patch8"])
@pytest.mark.parametrize("target", ["hog", "pixel", "ema", "teacher"])
def test_losses_and_gradients_are_those_of_the_cpu(device, encoder, target, tmp_path):
    settings = TeacherSettings(make_run(tmp_path / "teacher")) if target == "teacher" else target
    found = []
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for where in ("cpu", device):
            model = tiny_model(encoder, target=settings).to(where)
            for key in model.branch_targets:
                if target == "teacher":
                    model.target(key)._held[0].to(where)
            images, raw = (x.to(where) for x in smooth_images())
            out = model(images, raw, keys=KEYS.to(where))
            out["loss"].backward()
            gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
            found.append(({name: float(value) for name, value in out.items()}, gradients))
    (losses, gradients), (got, got_gradients) = found
    assert got == pytest.approx(losses, rel=1e-4, abs=1e-5)
    assert got_gradients.keys() == gradients.keys()
    for name, expected in gradients.items():
        atol = 1e-3 * float(expected.abs().max()) + 1e-7
        torch.testing.assert_close(got_gradients[name], expected, rtol=1e-3, atol=atol, msg=name)


@pytest.fixture(scope="module")
def convit(device):
    values, state, config = published.read("convit_pretrain.safetensors")
    model = load_official(state, num_heads=config["num_heads"], decoder_heads=config["decoder_num_heads"])
    values = {key: value.to(device) for key, value in values.items()}
    B = values["images"].shape[0]
    masks = dmjd.Masks.from_visible(values["ids_keep"].view(-1, B, values["ids_keep"].shape[1]), num_tokens=196)
    return model.to(device), values, masks


def test_published_conv_vit(convit):
    model, values, masks = convit
    close = {"rtol": 0, "atol": 3e-4}
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        with torch.no_grad():
            torch.testing.assert_close(model.encode(values["images"], masks.visible), values["latent"], **close)
            predictions = model.predict(values["images"], masks)
        expected = gather_tokens(values["pred"], masks.masked.flatten(0, 1))
        torch.testing.assert_close(predictions["mim"], expected, **close)
        torch.testing.assert_close(predictions["vis"], values["pred_vis"], **close)
        out = model(values["images"], values["images_u8"], masks=masks)
        for name, key in (("loss", "loss"), ("mim", "loss_mim"), ("vis", "loss_vis")):
            torch.testing.assert_close(out[name].detach(), values[key], rtol=1e-4, atol=0)
        out["loss"].backward()
    published.assert_gradient_norms(model, values, conv_vit=True)


def test_published_target(convit):
    model, values, _ = convit
    target = model.target("mim")(values["images"], values["images_u8"])
    torch.testing.assert_close(target, values["target"], rtol=0, atol=1e-3)


def test_published_mae(device):
    values, state, config = published.read("mae_pretrain.safetensors")
    model = load_official(state, num_heads=config["num_heads"], decoder_heads=config["decoder_num_heads"]).to(device)
    values = {key: value.to(device) for key, value in values.items()}
    masks = dmjd.Masks.from_visible(values["ids_keep"], num_tokens=196)
    out = model(values["images"], torch.zeros_like(values["images"]), masks=masks)
    torch.testing.assert_close(out["loss"].detach(), values["loss"], rtol=1e-4, atol=0)
    out["loss"].backward()
    published.assert_gradient_norms(model, values, conv_vit=False)


def test_published_classifier(device):
    values, state, config = published.read("convit_classify.safetensors")
    model = load_official(state, num_heads=config["num_heads"]).to(device).eval()
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        logits = model(values["images"].to(device))
    torch.testing.assert_close(logits.cpu(), values["logits"], rtol=0, atol=3e-4)
