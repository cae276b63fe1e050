"""The branches: predictions, defaults, switching them off, and errors."""

import pytest
import torch
from tiny_models import KEYS, losses_of, smooth_images, tiny_model

from dmjd import Distillation, Reconstruction
from dmjd.encoders.registry import create_encoder
from dmjd.masking import Masks
from dmjd.model import MaskedImageModel
from dmjd.targets.hog import HogSettings

BOTH = pytest.mark.parametrize("name", ["vit_tiny_patch8", "conv_vit_tiny_patch8"])


@BOTH
def test_decode_ratio_is_the_whole_method_with_fewer_masked_tokens(name):
    """The loss is that of the decoded tokens; the visible branch and all predictions are unchanged."""
    model, whole = tiny_model(name, mim={"decode_ratio": 0.4}).eval(), tiny_model(name).eval()
    masks = model.draw_masks(KEYS)
    decoded = masks.subset_masked(0.4)
    assert decoded.masked.shape[-1] == round(0.4 * masks.masked.shape[-1])
    actual, expected, all_decoded = losses_of(model), losses_of(whole, masks=decoded), losses_of(whole)
    assert actual == pytest.approx(expected, rel=1e-6)
    assert actual["vis"] == pytest.approx(all_decoded["vis"], rel=1e-6)
    assert actual["mim"] != pytest.approx(all_decoded["mim"], rel=1e-4)
    normalized, _ = smooth_images()
    with torch.no_grad():
        assert torch.equal(model.predict(normalized, masks)["mim"], whole.predict(normalized, masks)["mim"])


def test_theta_weighs_the_visible_branch_alone():
    a, b = losses_of(tiny_model().eval()), losses_of(tiny_model(vis={"theta": 2.5}).eval())
    assert (a["mim"], a["vis"]) == (b["mim"], b["vis"])
    assert b["loss"] == pytest.approx(a["mim"] + 2.5 * a["vis"], rel=1e-6)


@BOTH
@pytest.mark.parametrize(("off", "kept"), [("vis", "mim"), ("mim", "vis")])
def test_a_branch_that_is_off_is_not_built(name, off, kept):
    weights = {"vis": {"theta": 2.5}} if kept == "vis" else {}
    model = tiny_model(name, **{off: None} | weights)
    assert list(model.branches) == list(model.branch_targets) == [kept]
    assert not [key for key in model.state_dict() if key.startswith(f"branches.{off}")]
    out = model(*smooth_images(), keys=KEYS)
    assert set(out) == {"loss", kept}
    assert torch.equal(out["loss"], (2.5 if kept == "vis" else 1.0) * out[kept])
    out["loss"].backward()  # data-parallel training waits for the gradient of every trainable parameter
    assert [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@BOTH
def test_theta_0_gives_the_gradient_of_reconstruction_alone(name):
    both, alone = tiny_model(name, vis={"theta": 0.0}), tiny_model(name, vis=None)
    both.load_state_dict(alone.state_dict(), strict=False)
    for model in (both, alone):
        model(*smooth_images(), keys=KEYS)["loss"].backward()
    gradients = {key: p.grad for key, p in both.named_parameters() if p.requires_grad}
    distillation = [gradient for key, gradient in gradients.items() if key.startswith("branches.vis")]
    assert distillation
    assert not any(gradient.any() for gradient in distillation)
    for key, parameter in alone.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[key], parameter.grad, msg=key)


@BOTH
@pytest.mark.parametrize("K", [1, 4])
def test_shapes_of_predictions(name, K):
    model = tiny_model(name, masks={"num_views": K, "mask_ratio": 0.5})
    normalized, raw = smooth_images()
    predictions = model.predict(normalized, model.draw_masks(KEYS))
    for branch in ("mim", "vis"):
        assert predictions[branch].shape == (K * 3, 8, model.target(branch).dim)
    assert model(normalized, raw, keys=KEYS)["loss"].isfinite()


def test_reconstruction_predicts_each_position_by_itself():
    """Positions distinguish the mask tokens, and predictions come in the order of the masked ids."""
    model = tiny_model().eval()
    normalized, _ = smooth_images()
    masks = model.draw_masks(KEYS)
    swapped = Masks(masks.visible, masks.masked.flip(-1), masks.mask)
    with torch.no_grad():
        a, b = model.predict(normalized, masks)["mim"], model.predict(normalized, swapped)["mim"]
    torch.testing.assert_close(a.flip(1), b, rtol=1e-4, atol=1e-5)
    assert (a[:, 0] - a[:, 1]).abs().max() > 1e-3


def test_class_token_passes_through_and_is_never_predicted():
    model = tiny_model(encoder={"class_token": True}).eval()
    normalized, raw = smooth_images()
    masks = model.draw_masks(KEYS)
    decoder = model.branches["mim"].decoder
    with torch.no_grad():
        latent = model.encode(normalized, masks.visible)
        assert latent.shape[1] == 1 + masks.visible.shape[-1]
        predictions = model.predict(normalized, masks)
        assert predictions["vis"].shape[1] == masks.visible.shape[-1]
        assert predictions["mim"].shape[1] == masks.masked.shape[-1]
        visible, masked = masks.visible.flatten(0, 1), masks.masked.flatten(0, 1)
        changed = torch.cat([latent[:, :1] + 3 * torch.randn_like(latent[:, :1]), latent[:, 1:]], dim=1)
        assert not torch.allclose(decoder(changed, visible, masked), predictions["mim"], atol=1e-4)  # it is attended to
        torch.testing.assert_close(model.branches["vis"].head(latent[:, 1:]), predictions["vis"])
        everything = decoder(latent, visible, masked, all_tokens=True)
    assert everything.shape[1] == 16
    torch.testing.assert_close(everything[:, visible.shape[1] :], predictions["mim"])
    assert not decoder.pos_embed[:, 0].any()
    out = model(normalized, raw, keys=KEYS)
    out["loss"].backward()
    assert model.encoder.cls_token.grad.any()


def test_default_decoders_grow_with_the_encoder():
    for size, expected in (
        ("tiny", (128, 2, 4)),
        ("small", (256, 2, 8)),
        ("base", (512, 8, 16)),
        ("large", (512, 8, 16)),
    ):
        with torch.device("meta"):
            model = MaskedImageModel(create_encoder(f"conv_vit_{size}_patch16", img_size=64))
        decoder, head = model.branches["mim"].decoder, model.branches["vis"].head
        block = decoder.blocks[0]
        assert (decoder.embed.out_features, len(decoder.blocks), block.attn.num_heads) == expected
        assert block.mlp.fc1.out_features == 8 * expected[0]
        assert head.predictor.in_features == expected[0]
    with torch.device("meta"):
        vit = MaskedImageModel(create_encoder("vit_base_patch16", img_size=64))
    assert vit.branches["mim"].decoder.blocks[0].mlp.fc1.out_features == 4 * 512


def test_heads_are_as_wide_as_their_targets():
    model = tiny_model(mim={"target": "pixel"}, vis={"target": HogSettings(cell=2)})
    assert model.branches["mim"].decoder.head.out_features == 192
    assert model.branches["vis"].head.predictor.out_features == 16 * 9 * 3


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        (Reconstruction, {"loss": "l1"}, "unknown loss 'l1'; choose one of l2, smooth_l1"),
        (Distillation, {"loss": "huber"}, "unknown loss 'huber'"),
        (Reconstruction, {"decoder_dim": -4}, "decoder_dim must be at least 1, got -4"),
        (Reconstruction, {"decoder_depth": 1.5}, "decoder_depth must be int, got 1.5"),
        (Reconstruction, {"decoder_mlp_ratio": 0}, "decoder_mlp_ratio must be greater than 0"),
        (Distillation, {"projector_depth": 0}, "projector_depth must be at least 1, got 0"),
        (Distillation, {"theta": -1}, "theta must be at least 0, got -1"),
        (Distillation, {"theta": float("nan")}, "theta must be at least 0, got nan"),
        (HogSettings, {"bins": 0}, "hog_bins must lie between 1 and 255, got 0"),
        (HogSettings, {"bins": 300}, "hog_bins must lie between 1 and 255"),
        (Reconstruction, {"decode_ratio": 0.0}, "decode_ratio must be greater than 0 and at most 1, got 0.0"),
    ],
)
def test_settings_out_of_range(settings, options, message):
    with pytest.raises(ValueError, match=message):
        settings(**options)


@pytest.mark.parametrize(
    ("mim", "message"),
    [
        ({"decoder_dim": 30}, "decoder_dim 30 must be divisible by 4"),
        ({"decoder_heads": 3}, "decoder_heads 3"),
        ({"decoder_depth": 0}, "decoder_depth must be at least 1, got 0"),
    ],
)
def test_decoders_that_cannot_be_built(mim, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(mim=mim)
