"""The whole model: the loss equals the formula token by token, every setting affects it, and errors."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from tiny_models import KEYS, losses_of, smooth_images, tiny_model
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dmjd
from dmjd import ComplementaryMasks, DisjointMasks, Distillation, IndependentMasks, Reconstruction
from dmjd.encoders.registry import create_encoder
from dmjd.masking import Masks, MaskSampler, disjoint_masks
from dmjd.model import MaskedImageModel
from dmjd.nn.tokens import gather_views
from dmjd.targets.hog import HogSettings, HogTarget
from dmjd.targets.pixel import PixelTarget

BOTH = pytest.mark.parametrize("name", ["vit_tiny_patch8", "conv_vit_tiny_patch8"])


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
        ({"target": "pixel", "vis": {"theta": 0.3}}, PixelTarget, PixelTarget),
        ({"mim": {"target": "pixel", "loss": "smooth_l1"}, "vis": {"loss": "l2"}}, PixelTarget, HogTarget),
        ({"vis": {"target": "pixel"}, "masks": {"num_views": 3, "mask_ratio": 0.3}}, HogTarget, PixelTarget),
    ],
)
def test_loss_is_the_formula(name, options, mim_target, vis_target):
    model = tiny_model(name, **options).eval()
    normalized, raw = smooth_images()
    masks = model.draw_masks(KEYS)
    with torch.no_grad():
        out = model(normalized, raw, keys=KEYS)
        predictions = model.predict(normalized, masks)
    mim_values, vis_values = (kind(model.encoder)(normalized, raw) for kind in (mim_target, vis_target))
    kinds = {"mim": "l2", "vis": "smooth_l1"} | {k: v["loss"] for k, v in options.items() if "loss" in v}
    mim = loss_token_by_token(kinds["mim"], predictions["mim"], mim_values, masks.masked)
    vis = loss_token_by_token(kinds["vis"], predictions["vis"], vis_values, masks.visible)
    assert out["mim"].item() == pytest.approx(mim, rel=1e-4)
    assert out["vis"].item() == pytest.approx(vis, rel=1e-4)
    theta = options.get("vis", {}).get("theta", 1.0)
    assert out["loss"].item() == pytest.approx(mim + theta * vis, rel=1e-4)
    assert set(out) == {"loss", "mim", "vis"}


@BOTH
def test_loss_does_not_depend_on_the_order_of_visible_ids(name):
    """The published code compares shuffled visible tokens with targets in raster order."""
    model = tiny_model(name).eval()
    sorted_masks = model.draw_masks(KEYS)
    shuffle = torch.rand(sorted_masks.visible.shape, generator=torch.Generator().manual_seed(1)).argsort(-1)
    shuffled = Masks.from_visible(sorted_masks.visible.gather(-1, shuffle), num_tokens=16)
    assert not torch.equal(shuffled.visible, sorted_masks.visible)
    expected, actual = losses_of(model, masks=sorted_masks), losses_of(model, masks=shuffled)
    assert actual == pytest.approx(expected, rel=1e-5)

    normalized, raw = smooth_images()
    with torch.no_grad():
        prediction = model.predict(normalized, shuffled)["vis"]
        target = model.targets(normalized, raw)["vis"]
    misaligned = F.smooth_l1_loss(prediction, gather_views(target, sorted_masks.visible.flatten(0, 1)), beta=2.0).item()
    assert abs(misaligned - actual["vis"]) > 1e-4 * actual["vis"]  # so this test would detect the error


def test_training_fits_aligned_targets():
    """After a few steps with ids out of order, predictions are closest to the target of their own token."""
    model = tiny_model(target="pixel", masks={"mask_ratio": 0.5}, mim=None)
    normalized, raw = smooth_images()
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


# ---- no unused setting


@pytest.mark.parametrize(
    "options",
    [
        {"masks": {"num_views": 1}},
        {"masks": {"num_views": 3}},
        {"masks": {"mask_ratio": 0.3}},
        {"masks": {"pred_ratio": 0.8}},
        {"masks": {"block_size": 1}},
        {"masks": IndependentMasks()},
        {"masks": ComplementaryMasks(2)},
        {"target": "pixel"},
        {"target": HogSettings(cell=2)},
        {"target": HogSettings(bins=6)},
        {"mim": None},
        {"mim": {"loss": "smooth_l1"}},
        {"mim": {"target": "pixel"}},
        {"mim": {"decoder_dim": 16}},
        {"mim": {"decoder_depth": 2}},
        {"mim": {"decoder_heads": 4}},
        {"mim": {"decoder_mlp_ratio": 2.0}},
        {"mim": {"decode_ratio": 0.5}},
        {"vis": None},
        {"vis": {"loss": "l2"}},
        {"vis": {"target": "pixel"}},
        {"vis": {"theta": 0.5}},
        {"vis": {"projector_dim": 16}},
        {"vis": {"projector_depth": 1}},
    ],
)
def test_every_setting_changes_the_loss(options):
    assert losses_of(tiny_model(**options).eval())["loss"] != pytest.approx(
        losses_of(tiny_model().eval())["loss"], rel=1e-6
    )


def test_pred_ratio_reaches_the_masks():
    for p, units in ((None, 16), (1.0, 16), (0.75, 12), (0.625, 10)):
        masks = tiny_model(masks={"mask_ratio": 0.625, "pred_ratio": p, "block_size": 1}).draw_masks(KEYS)
        assert (masks.mask.any(0).sum(-1) == units).all()


# ---- masks, keys, precision


class EveryOther(MaskSampler):
    """A sampler as a user would add it: even tokens, then odd tokens."""

    num_views, mask_ratio, pred_ratio = 2, 0.5, 1.0

    def counts(self, grid):
        N = grid[0] * grid[1]
        return N // 2, N // 2, N

    def draw(self, keys, grid):
        ids = torch.arange(grid[0] * grid[1], device=keys.device)
        visible = torch.stack([ids[::2], ids[1::2]]).unsqueeze(1).expand(-1, len(keys), -1)
        return Masks.from_visible(visible, num_tokens=len(ids))


def test_a_user_defined_sampler():
    model = tiny_model(masks=EveryOther()).eval()
    assert model.counts == (8, 8, 16)
    assert model.draw_masks(KEYS).visible[:, 0].tolist() == [[0, 2, 4, 6, 8, 10, 12, 14], [1, 3, 5, 7, 9, 11, 13, 15]]
    masks = EveryOther().draw(KEYS, (4, 4))
    assert losses_of(model) == losses_of(tiny_model().eval(), masks=masks)
    assert model.flops() > 0


def test_the_defaults_are_the_papers():
    model = MaskedImageModel(create_encoder("vit_tiny_patch8", img_size=32))
    masks = DisjointMasks(num_views=2, mask_ratio=0.6).draw(KEYS, (4, 4))
    assert torch.equal(model.draw_masks(KEYS).mask, masks.mask)
    assert list(model.branches) == ["mim", "vis"]
    assert model.target("mim") is model.target("vis")
    assert model.target("mim").name == "hog"


def test_keys_make_the_loss_repeatable():
    model = tiny_model().eval()
    assert losses_of(model) == losses_of(model)
    assert losses_of(model)["loss"] != losses_of(model, keys=KEYS + 1)["loss"]
    torch.manual_seed(5)
    first = losses_of(model, keys=None)
    assert losses_of(model, keys=None) != first  # without keys: torch's random state
    torch.manual_seed(5)
    assert losses_of(model, keys=None) == first


def test_masks_passed_in_replace_the_models_own():
    model = tiny_model().eval()
    own = model.draw_masks(KEYS)
    assert losses_of(model, masks=own, keys=KEYS + 99) == losses_of(model)
    other = disjoint_masks(3, (4, 4), num_views=5, mask_ratio=0.25, keys=KEYS)
    expected = tiny_model(masks={"num_views": 5, "mask_ratio": 0.25, "block_size": 1}).eval()
    assert losses_of(model, masks=other) == losses_of(expected)


@BOTH
def test_views_and_images_are_independent_of_each_other(name):
    """Rows are view-major: the prediction for view k of image b is the one for it alone."""
    model = tiny_model(name).eval()
    normalized, _ = smooth_images()
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


@BOTH
def test_every_trainable_parameter_gets_a_gradient(name):
    model = tiny_model(name)
    model(*smooth_images(), keys=KEYS)["loss"].backward()
    assert [k for k, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())] == []
    frozen = {key for key, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"encoder.pos_embed", "branches.mim.decoder.pos_embed"}


@BOTH
def test_autocast_bf16(name):
    model = tiny_model(name)
    expected = losses_of(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(*smooth_images(), keys=KEYS)
    assert all(value.dtype == torch.float32 for value in out.values())
    assert {k: v.item() for k, v in out.items()} == pytest.approx(expected, rel=0.02)
    out["loss"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@BOTH
@pytest.mark.parametrize("channels", [1, 5])
def test_other_channels_and_shapes(name, channels):
    model = tiny_model(name, {"in_chans": channels, "img_size": (16, 40)}, masks={"block_size": 1})
    out = model(*smooth_images(2, channels, (16, 40)), keys=KEYS[:2])
    assert out["loss"].isfinite()


def test_fusion_belongs_to_pretraining_only():
    model = tiny_model("conv_vit_tiny_patch8")
    assert not [key for key in model.encoder.state_dict() if "fusion" in key]
    assert {key for key in model.state_dict() if key.startswith("fusion")} == {
        f"fusion.convs.{i}.{part}" for i in (0, 1) for part in ("weight", "bias")
    }
    normalized, _ = smooth_images()
    masks = model.draw_masks(KEYS)
    with torch.no_grad():
        x, (x1, x2) = model.encoder.forward_stages(normalized, masks.visible.flatten(0, 1))
        for conv, stage in zip(model.fusion.convs, (x1, x2), strict=True):
            R, V, s, _, d = stage.shape
            x = x + conv(stage.reshape(R * V, s, s, d).permute(0, 3, 1, 2)).reshape(R, V, -1)
        latent = model.encode(normalized, masks.visible)
        torch.testing.assert_close(latent, model.encoder.norm(x), rtol=1e-4, atol=1e-5)


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"target": "hog"}, "target"),
        ({"num_views": 2, "mask_ratio": 0.6}, "num_views, mask_ratio"),
        ({"decoder_dim": 32, "vis": False}, "decoder_dim, vis"),
        ({"mim": True}, "mim"),
        ({"masks": "pixel"}, "masks"),
    ],
)
def test_arguments_of_version_0_1_raise_one_error_that_shows_the_new_ones(arguments, named):
    encoder = create_encoder("vit_tiny_patch8", img_size=32, embed_dim=32, depth=1, num_heads=2)
    with pytest.raises(ValueError, match=f"MaskedImageModel does not take {named} like this") as caught:
        MaskedImageModel(encoder, **arguments)
    shown = str(caught.value).split("Write ")[1].split("; None")[0]
    names = {"MaskedImageModel": MaskedImageModel, "DisjointMasks": DisjointMasks, "encoder": encoder}
    built = eval(shown, names | {"Reconstruction": Reconstruction, "Distillation": Distillation})
    assert list(built.branches) == ["mim", "vis"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mim": None, "vis": None}, "both branches are off"),
        ({"target": "hgo"}, "did you mean 'hog'"),
        ({"target": HogSettings(cell=3)}, "hog_cell 3 does not divide the 8-pixel patch"),
        ({"masks": {"mask_ratio": 0.9}}, "leaves none of the 4 masking units visible"),
        ({"masks": {"block_size": 3}}, r"choose one of \[1, 2, 4\]"),
        ({"masks": ComplementaryMasks(3)}, "num_views 3 does not divide the 16 blocks of 1 x 1 tokens"),
    ],
)
def test_settings_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(**options)


def test_inputs_that_do_not_belong_together():
    model = tiny_model()
    normalized, raw = smooth_images()
    with pytest.raises(ValueError, match="masks are for 25 tokens, the model has 16"):
        model(normalized, raw, masks=disjoint_masks(3, (5, 5)))
    with pytest.raises(ValueError, match=r"images_normalized must be \[2, 3, 32, 32\] .* got \[3, 3, 32, 32\]"):
        model(normalized, raw, masks=disjoint_masks(2, (4, 4)))
    with pytest.raises(ValueError, match=r"images_normalized must be \[3, 3, 32, 32\] .* got \[3, 3, 64, 64\]"):
        model(*smooth_images(3, 3, (64, 64)), keys=KEYS)
    with pytest.raises(ValueError, match=r"images_normalized .* got \[3, 3, 16, 64\]"):
        model(*smooth_images(3, 3, (16, 64)), keys=KEYS)
    with pytest.raises(ValueError, match="images_0_255 must be"):
        model(normalized, smooth_images(3, 3, (64, 64))[1], keys=KEYS)
    with pytest.raises(ValueError, match=r"keys must be \[B\] int64, one for each image, got \[3\] torch.float32"):
        model(normalized, raw, keys=KEYS.float())


# ---- arithmetic and compilation


@contextmanager
def counted_products() -> Iterator[FlopCounterMode]:
    """torch's count with unfused attention, because not every version counts the fused form on a CPU."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


@pytest.mark.parametrize(
    ("name", "encoder", "options"),
    [
        ("vit_tiny_patch8", {}, {}),
        ("vit_tiny_patch8", {"class_token": True, "in_chans": 1}, {"masks": DisjointMasks(3, 0.3)}),
        ("vit_tiny_patch8", {}, {"masks": DisjointMasks(1, 0.75), "vis": None}),
        ("conv_vit_tiny_patch8", {}, {}),
        ("conv_vit_tiny_patch8", {}, {"mim": None}),
        (
            "vit_tiny_patch8",
            {},
            {"mim": Reconstruction(decode_ratio=0.4), "vis": Distillation(projector_depth=4)},
        ),
        ("conv_vit_tiny_patch16", {}, {"mim": Reconstruction(target="pixel")}),
    ],
)
def test_flops_are_what_runs(name, encoder, options):
    """Compare with torch's count of matrix products and convolutions, at realistic widths."""
    torch.manual_seed(0)
    channels = encoder.get("in_chans", 3)
    model = dmjd.MaskedImageModel(create_encoder(name, img_size=64, **encoder), **options).eval()
    with torch.no_grad(), counted_products() as counter:
        model(*smooth_images(1, channels, (64, 64)), keys=KEYS[:1])
    assert model.flops() == pytest.approx(counter.get_total_flops(), rel=0.03)


@BOTH
def test_stochastic_depth_does_not_depend_on_the_batch(name):
    model = tiny_model(name, {"drop_path": 0.6}).train()
    normalized, raw = smooth_images()
    whole = model(normalized, raw, keys=KEYS)["loss"]
    alone = [model(normalized[i : i + 1], raw[i : i + 1], keys=KEYS[i : i + 1])["loss"] for i in range(3)]
    torch.testing.assert_close(sum(alone) / 3, whole)
    assert not torch.equal(whole, model.eval()(normalized, raw, keys=KEYS)["loss"])


def test_an_empty_batch_has_no_loss():
    normalized, raw = smooth_images()
    with pytest.raises(ValueError, match="the batch holds no image"):
        tiny_model()(normalized[:0], raw[:0])
