"""The method as a whole: every setting reaches the loss, and the loss is the formula computed token by token."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dmjd.encoders.registry import create_encoder
from dmjd.masking import Masks, disjoint_masks
from dmjd.model import MaskedImageModel
from dmjd.nn.tokens import gather_views
from dmjd.targets.base import Target
from dmjd.targets.hog import HogTarget
from dmjd.targets.pixel import PixelTarget

torch.set_num_threads(2)
SIZES = {
    "vit_tiny_patch8": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "conv_vit_tiny_patch8": {"embed_dims": (8, 12, 16), "depths": (1, 1, 1), "num_heads": 2},
}
BOTH = pytest.mark.parametrize("name", list(SIZES))
DECODER = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}


def make(name: str = "vit_tiny_patch8", encoder: dict | None = None, **options) -> MaskedImageModel:
    torch.manual_seed(0)
    return MaskedImageModel(
        create_encoder(name, **{"img_size": 32} | SIZES[name] | (encoder or {})), **DECODER | options
    )


def make_images(B: int = 3, channels: int = 3, size: tuple[int, int] = (32, 32)) -> tuple[Tensor, Tensor]:
    """(normalized, raw) of smooth random images."""
    generator = torch.Generator().manual_seed(B)
    coarse = torch.rand(B, channels, 5, 5, generator=generator)
    raw = (F.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1) * 255).round()
    return (raw / 255 - 0.5) / 0.25, raw


KEYS = torch.tensor([3, 14, 159])


def losses(model: MaskedImageModel, **arguments) -> dict[str, float]:
    with torch.no_grad():
        return {k: v.item() for k, v in model(*make_images(), **{"keys": KEYS} | arguments).items()}


# ---- the formula


def loss_token_by_token(kind: str, prediction: Tensor, target: Tensor, ids: Tensor) -> float:
    """Mean over views, images and tokens; ids [K, B, n], prediction [R, n, C] in their order, target [B, N, C]."""
    K, B, n = ids.shape
    total = 0.0
    for k in range(K):
        for b in range(B):
            for i in range(n):
                error = (prediction[k * B + b, i] - target[b, ids[k, b, i]]).double().abs()
                smooth = torch.where(error < 2, 0.5 * error**2 / 2, error - 1)
                total += (error**2 if kind == "l2" else smooth).mean().item()
    return total / (K * B * n)


@BOTH
@pytest.mark.parametrize(
    ("options", "mim_target", "vis_target"),
    [
        ({}, HogTarget, HogTarget),
        ({"target": "pixel", "theta": 0.3}, PixelTarget, PixelTarget),
        ({"mim_target": "pixel", "mim_loss": "smooth_l1", "vis_loss": "l2"}, PixelTarget, HogTarget),
        ({"vis_target": "pixel", "num_views": 3, "mask_ratio": 0.3}, HogTarget, PixelTarget),
    ],
)
def test_loss_is_the_formula(name, options, mim_target, vis_target):
    model = make(name, **options).eval()
    normalized, raw = make_images()
    masks = model.draw_masks(KEYS)
    with torch.no_grad():
        out = model(normalized, raw, keys=KEYS)
        predictions = model.predict(normalized, masks)
    sizes = {"patch_size": 8, "in_chans": 3}
    mim_truth, vis_truth = mim_target(**sizes)(normalized, raw), vis_target(**sizes)(normalized, raw)
    mim = loss_token_by_token(options.get("mim_loss", "l2"), predictions["mim"], mim_truth, masks.masked)
    vis = loss_token_by_token(options.get("vis_loss", "smooth_l1"), predictions["vis"], vis_truth, masks.visible)
    assert out["mim"].item() == pytest.approx(mim, rel=1e-4)
    assert out["vis"].item() == pytest.approx(vis, rel=1e-4)
    assert out["loss"].item() == pytest.approx(mim + options.get("theta", 1.0) * vis, rel=1e-4)
    assert set(out) == {"loss", "mim", "vis"}


@BOTH
def test_a_decoder_asked_for_a_part_is_the_whole_method_with_fewer_masked_tokens(name):
    """The loss is that of the tokens asked for; visible branch and full predictions are untouched."""
    model, whole = make(name, decode_ratio=0.4).eval(), make(name).eval()
    masks = model.draw_masks(KEYS)
    asked = masks.asked(0.4)
    assert asked.masked.shape[-1] == round(0.4 * masks.masked.shape[-1])
    found, expected, all_asked = losses(model), losses(whole, masks=asked), losses(whole)
    assert found == pytest.approx(expected, rel=1e-6)
    assert found["vis"] == pytest.approx(all_asked["vis"], rel=1e-6)
    assert found["mim"] != pytest.approx(all_asked["mim"], rel=1e-4)
    normalized, _ = make_images()
    with torch.no_grad():
        assert torch.equal(model.predict(normalized, masks)["mim"], whole.predict(normalized, masks)["mim"])


@BOTH
def test_loss_does_not_depend_on_the_order_of_visible_ids(name):
    """The trap of the published code: shuffled visible tokens against targets in raster order."""
    model = make(name).eval()
    sorted_masks = model.draw_masks(KEYS)
    shuffle = torch.rand(sorted_masks.visible.shape, generator=torch.Generator().manual_seed(1)).argsort(-1)
    shuffled = Masks.from_visible(sorted_masks.visible.gather(-1, shuffle), num_tokens=16)
    assert not torch.equal(shuffled.visible, sorted_masks.visible)
    expected, found = losses(model, masks=sorted_masks), losses(model, masks=shuffled)
    assert found == pytest.approx(expected, rel=1e-5)

    normalized, raw = make_images()
    with torch.no_grad():
        prediction = model.predict(normalized, shuffled)["vis"]
        target = model.targets(normalized, raw)["vis"]
    misaligned = F.smooth_l1_loss(prediction, gather_views(target, sorted_masks.visible.flatten(0, 1)), beta=2.0).item()
    assert abs(misaligned - found["vis"]) > 1e-4 * found["vis"]  # such a mistake would be seen here


def test_training_fits_aligned_targets():
    """A few steps on one batch with ids out of order: predictions come near to the target of their own token."""
    model = make(target="pixel", num_views=2, mask_ratio=0.5, mim=False)
    normalized, raw = make_images()
    drawn = model.draw_masks(KEYS)
    masks = Masks.from_visible(drawn.visible.flip(-1), num_tokens=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(normalized, raw, masks=masks)["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        prediction = model.predict(normalized, masks)["vis"]
        target = model.targets(normalized, raw)["vis"]
    own = F.mse_loss(prediction, gather_views(target, masks.visible.flatten(0, 1)))
    raster = F.mse_loss(prediction, gather_views(target, drawn.visible.flatten(0, 1)))
    assert own < 0.7 * raster


# ---- no dead setting


@pytest.mark.parametrize(
    "options",
    [
        {"num_views": 1},
        {"num_views": 3},
        {"mask_ratio": 0.3},
        {"pred_ratio": 0.8},
        {"block_size": 1},
        {"disjoint": False},
        {"theta": 0.5},
        {"mim_loss": "smooth_l1"},
        {"vis_loss": "l2"},
        {"target": "pixel"},
        {"mim_target": "pixel"},
        {"vis_target": "pixel"},
        {"hog_cell": 2},
        {"vis": False},
        {"mim": False},
        {"decoder_dim": 16},
        {"decoder_depth": 2},
        {"decoder_heads": 4},
        {"decoder_mlp_ratio": 2.0},
        {"decode_ratio": 0.5},
        {"projector_depth": 1},
    ],
)
def test_every_setting_changes_the_loss(options):
    assert losses(make(**options).eval())["loss"] != pytest.approx(losses(make().eval())["loss"], rel=1e-6)


def test_theta_weighs_the_visible_branch_alone():
    a, b = losses(make(theta=1.0).eval()), losses(make(theta=2.5).eval())
    assert (a["mim"], a["vis"]) == (b["mim"], b["vis"])
    assert b["loss"] == pytest.approx(a["mim"] + 2.5 * a["vis"], rel=1e-6)


def test_pred_ratio_reaches_the_masks():
    for p, units in ((None, 16), (1.0, 16), (0.75, 12), (0.625, 10)):
        masks = make(mask_ratio=0.625, pred_ratio=p, block_size=1).draw_masks(KEYS)
        assert (masks.mask.any(0).sum(-1) == units).all()


@BOTH
@pytest.mark.parametrize(("off", "gone"), [("vis", "distillation"), ("mim", "decoder")])
def test_a_branch_switched_off_is_not_built(name, off, gone):
    model = make(name, **{off: False})
    assert getattr(model, gone) is None
    assert getattr(model, f"{off}_target") is None
    assert not [key for key in model.state_dict() if key.startswith(gone)]
    out = model(*make_images(), keys=KEYS)
    kept = "mim" if off == "vis" else "vis"
    assert set(out) == {"loss", kept}
    assert torch.equal(out["loss"], out[kept] if kept == "mim" else model.theta * out[kept])
    out["loss"].backward()  # every trainable parameter takes part: data-parallel training waits for all of them
    assert [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@BOTH
def test_theta_0_gives_the_gradient_of_reconstruction_alone(name):
    both, alone = make(name, theta=0.0), make(name, vis=False)
    both.load_state_dict(alone.state_dict(), strict=False)
    for model in (both, alone):
        model(*make_images(), keys=KEYS)["loss"].backward()
    gradients = {key: p.grad for key, p in both.named_parameters() if p.requires_grad}
    assert not any(gradient.any() for key, gradient in gradients.items() if key.startswith("distillation"))
    for key, parameter in alone.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[key], parameter.grad, msg=key)


@BOTH
def test_every_trainable_parameter_gets_a_gradient(name):
    model = make(name)
    model(*make_images(), keys=KEYS)["loss"].backward()
    assert [k for k, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())] == []
    frozen = {key for key, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"encoder.pos_embed", "decoder.pos_embed"}


# ---- views, keys, masks, prefix tokens, precision


@BOTH
@pytest.mark.parametrize("K", [1, 4])
def test_number_of_views(name, K):
    model = make(name, num_views=K, mask_ratio=0.5)
    normalized, raw = make_images()
    masks = model.draw_masks(KEYS)
    predictions = model.predict(normalized, masks)
    assert predictions["mim"].shape == (K * 3, 8, model.mim_target.dim)
    assert predictions["vis"].shape == (K * 3, 8, model.vis_target.dim)
    assert model(normalized, raw, keys=KEYS)["loss"].isfinite()


@BOTH
def test_views_and_images_are_independent_of_each_other(name):
    """View-major rows: what the model says of view k of image b is what it says of it alone."""
    model = make(name).eval()
    normalized, _ = make_images()
    masks = model.draw_masks(KEYS)
    with torch.no_grad():
        together = model.predict(normalized, masks)
        for k in range(2):
            for b in range(3):
                alone = model.predict(
                    normalized[b : b + 1], Masks.from_visible(masks.visible[k : k + 1, b : b + 1], num_tokens=16)
                )
                for branch, prediction in alone.items():
                    torch.testing.assert_close(prediction[0], together[branch][k * 3 + b], rtol=1e-4, atol=1e-5)


def test_reconstruction_predicts_each_place_apart():
    """Positions tell the mask tokens apart, and predictions come in the order of the masked ids."""
    model = make().eval()
    normalized, _ = make_images()
    masks = model.draw_masks(KEYS)
    swapped = Masks(masks.visible, masks.masked.flip(-1), masks.mask)
    with torch.no_grad():
        a, b = model.predict(normalized, masks)["mim"], model.predict(normalized, swapped)["mim"]
    torch.testing.assert_close(a.flip(1), b, rtol=1e-4, atol=1e-5)
    assert (a[:, 0] - a[:, 1]).abs().max() > 1e-3


def test_keys_make_the_loss_repeatable():
    model = make().eval()
    assert losses(model) == losses(model)
    assert losses(model)["loss"] != losses(model, keys=KEYS + 1)["loss"]
    torch.manual_seed(5)
    first = losses(model, keys=None)
    assert losses(model, keys=None) != first  # without keys: torch's own randomness
    torch.manual_seed(5)
    assert losses(model, keys=None) == first


def test_the_callers_masks_override_the_models_own():
    model = make().eval()
    own = model.draw_masks(KEYS)
    assert losses(model, masks=own, keys=KEYS + 99) == losses(model)
    other = disjoint_masks(3, (4, 4), num_views=5, mask_ratio=0.25, keys=KEYS)
    expected = make(num_views=5, mask_ratio=0.25, block_size=1).eval()
    assert losses(model, masks=other) == losses(expected)


def test_class_token_passes_through_and_is_never_predicted():
    model = make(encoder={"class_token": True}).eval()
    normalized, raw = make_images()
    masks = model.draw_masks(KEYS)
    with torch.no_grad():
        latent = model.encode(normalized, masks.visible)
        assert latent.shape[1] == 1 + masks.visible.shape[-1]
        predictions = model.predict(normalized, masks)
        assert predictions["vis"].shape[1] == masks.visible.shape[-1]
        assert predictions["mim"].shape[1] == masks.masked.shape[-1]
        visible, masked = masks.visible.flatten(0, 1), masks.masked.flatten(0, 1)
        changed = torch.cat([latent[:, :1] + 3 * torch.randn_like(latent[:, :1]), latent[:, 1:]], dim=1)
        assert not torch.allclose(
            model.decoder(changed, visible, masked), predictions["mim"], atol=1e-4
        )  # it runs along
        torch.testing.assert_close(model.distillation(latent[:, 1:]), predictions["vis"])
        everything = model.decoder(latent, visible, masked, all_tokens=True)
    assert everything.shape[1] == 16
    torch.testing.assert_close(everything[:, visible.shape[1] :], predictions["mim"])
    assert not model.decoder.pos_embed[:, 0].any()
    out = model(normalized, raw, keys=KEYS)
    out["loss"].backward()
    assert model.encoder.cls_token.grad.any()


@BOTH
def test_autocast_bf16(name):
    model = make(name)
    expected = losses(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(*make_images(), keys=KEYS)
    assert all(value.dtype == torch.float32 for value in out.values())
    assert {k: v.item() for k, v in out.items()} == pytest.approx(expected, rel=0.02)
    out["loss"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@BOTH
@pytest.mark.parametrize("channels", [1, 5])
def test_other_channels_and_shapes(name, channels):
    model = make(name, encoder={"in_chans": channels, "img_size": (16, 40)}, block_size=1)
    out = model(*make_images(2, channels, (16, 40)), keys=KEYS[:2])
    assert out["loss"].isfinite()


def test_default_decoders_grow_with_the_encoder():
    for size, expected in (
        ("tiny", (128, 2, 4)),
        ("small", (256, 2, 8)),
        ("base", (512, 8, 16)),
        ("large", (512, 8, 16)),
    ):
        with torch.device("meta"):
            model = MaskedImageModel(create_encoder(f"conv_vit_{size}_patch16", img_size=64))
        block = model.decoder.blocks[0]
        assert (model.decoder.embed.out_features, len(model.decoder.blocks), block.attn.num_heads) == expected
        assert block.mlp.fc1.out_features == 8 * expected[0]
        assert model.distillation.predictor.in_features == expected[0]
    with torch.device("meta"):
        vit = MaskedImageModel(create_encoder("vit_base_patch16", img_size=64))
    assert vit.decoder.blocks[0].mlp.fc1.out_features == 4 * 512


def test_fusion_belongs_to_pretraining_only():
    model = make("conv_vit_tiny_patch8")
    assert not [key for key in model.encoder.state_dict() if "fusion" in key]
    assert {key for key in model.state_dict() if key.startswith("fusion")} == {
        f"fusion.convs.{i}.{part}" for i in (0, 1) for part in ("weight", "bias")
    }
    normalized, _ = make_images()
    masks = model.draw_masks(KEYS)
    with torch.no_grad():
        x, (x1, x2) = model.encoder.forward_stages(normalized, masks.visible.flatten(0, 1))
        for conv, stage in zip(model.fusion.convs, (x1, x2), strict=True):
            R, V, s, _, d = stage.shape
            x = x + conv(stage.reshape(R * V, s, s, d).permute(0, 3, 1, 2)).reshape(R, V, -1)
        latent = model.encode(normalized, masks.visible)
        torch.testing.assert_close(latent, model.encoder.norm(x), rtol=1e-4, atol=1e-5)


# ---- targets of the caller's own


class MeanColor(Target):
    """A target as a user would add it: the mean of each patch's channels, and a count of its uses."""

    name = "mean_color"

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.dim = channels
        self.uses = 0
        self.steps: list[int] = []

    def forward(self, normalized: Tensor, raw: Tensor) -> Tensor:
        self.uses += 1
        assert not torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")  # targets are float32 whatever the model runs in
        return F.avg_pool2d(normalized, 8).flatten(2).transpose(1, 2)

    def after_step(self, encoder: nn.Module, step: int, progress: float) -> None:
        self.steps.append(step)


def test_a_target_of_ones_own_is_computed_once_for_both_branches():
    target = MeanColor()
    model = make(target=target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(*make_images(), keys=KEYS)
    assert out["loss"].requires_grad
    assert target.uses == 1
    model.after_step(7)
    assert target.steps == [7]
    assert model.decoder.head.out_features == model.distillation.predictor.out_features == 3


def test_branches_with_targets_apart():
    mim, vis = MeanColor(), MeanColor()
    model = make(mim_target=mim, vis_target=vis)
    model(*make_images(), keys=KEYS)
    model.after_step(1)
    assert (mim.uses, vis.uses, mim.steps, vis.steps) == (1, 1, [1], [1])
    mixed = make(mim_target="pixel", vis_target="hog", hog_cell=2)
    assert mixed.decoder.head.out_features == 192
    assert mixed.distillation.predictor.out_features == 16 * 9 * 3


# ---- what cannot be


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mim": False, "vis": False}, "both branches are off"),
        ({"mim_loss": "l1"}, "unknown loss 'l1'; choose one of l2, smooth_l1"),
        ({"vis_loss": "huber"}, "unknown loss 'huber'"),
        ({"target": "hgo"}, "did you mean 'hog'"),
        ({"num_views": 0}, "num_views must be at least 1"),
        ({"mask_ratio": 1.0}, "mask_ratio must lie between 0 and 1"),
        ({"mask_ratio": float("nan")}, "mask_ratio must lie between 0 and 1"),
        ({"mask_ratio": 0.9}, "leaves none of the 4 masking units visible"),
        ({"pred_ratio": 0.5}, r"pred_ratio must lie in \[0.6, 1\]"),
        ({"pred_ratio": 0.8, "disjoint": False}, "no meaning with disjoint=False"),
        ({"block_size": 3}, r"choose one of \[1, 2, 4\]"),
        ({"decoder_dim": 30}, "decoder_dim 30 must be divisible by 4"),
        ({"decoder_heads": 3}, "decoder_heads 3"),
        ({"decoder_depth": 0}, "decoder_depth 0 at least 1"),
        ({"decode_ratio": 0.0}, "decode_ratio must be greater than 0 and at most 1, got 0.0"),
        ({"hog_cell": 3}, "hog_cell 3 does not divide the 8-pixel patch"),
    ],
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_inputs_that_do_not_belong_together():
    model = make()
    normalized, raw = make_images()
    with pytest.raises(ValueError, match="masks are for 25 tokens, the model has 16"):
        model(normalized, raw, masks=disjoint_masks(3, (5, 5)))
    with pytest.raises(ValueError, match=r"images_normalized must be \[2, 3, 32, 32\] .* got \[3, 3, 32, 32\]"):
        model(normalized, raw, masks=disjoint_masks(2, (4, 4)))
    with pytest.raises(ValueError, match=r"images_normalized must be \[3, 3, 32, 32\] .* got \[3, 3, 64, 64\]"):
        model(*make_images(3, 3, (64, 64)), keys=KEYS)
    with pytest.raises(ValueError, match=r"images_normalized .* got \[3, 3, 16, 64\]"):
        model(*make_images(3, 3, (16, 64)), keys=KEYS)
    with pytest.raises(ValueError, match="images_0_255 must be"):
        model(normalized, make_images(3, 3, (64, 64))[1], keys=KEYS)
    with pytest.raises(ValueError, match=r"keys must be \[3\] int64|images_normalized must be"):
        model(normalized, raw, keys=KEYS.float())


# ---- arithmetic


@contextmanager
def counted_products() -> Iterator[FlopCounterMode]:
    """Torch's count, attention by plain products: its fused form on CPU is not counted by every version."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


@pytest.mark.parametrize(
    ("name", "encoder", "options"),
    [
        ("vit_tiny_patch8", {}, {}),
        ("vit_tiny_patch8", {"class_token": True, "in_chans": 1}, {"num_views": 3, "mask_ratio": 0.3}),
        ("vit_tiny_patch8", {}, {"vis": False, "num_views": 1, "mask_ratio": 0.75}),
        ("conv_vit_tiny_patch8", {}, {}),
        ("conv_vit_tiny_patch8", {}, {"mim": False}),
        ("vit_tiny_patch8", {}, {"decode_ratio": 0.4, "projector_depth": 4}),
        ("conv_vit_tiny_patch16", {}, {"target": "pixel"}),
    ],
)
def test_flops_are_what_runs(name, encoder, options):
    """Against torch's own count of matrix products and convolutions, at the real widths."""
    torch.manual_seed(0)
    channels = encoder.get("in_chans", 3)
    model = MaskedImageModel(create_encoder(name, img_size=64, **encoder), **options).eval()
    with torch.no_grad(), counted_products() as counter:
        model(*make_images(1, channels, (64, 64)), keys=KEYS[:1])
    assert model.flops() == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.parametrize("name", ["vit_tiny_patch8", "conv_vit_tiny_patch8"])
def test_encoder_flops_of_the_dense_form(name):
    encoder = create_encoder(name, img_size=64).eval()
    with torch.no_grad(), counted_products() as counter:
        encoder(torch.randn(1, 3, 64, 64))
    assert encoder.flops() == pytest.approx(counter.get_total_flops(), rel=0.03)
