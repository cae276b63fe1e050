"""Recipes: each differs from its base only in what it is named after, and builds a model that trains."""

import dataclasses
import inspect
import json

import pytest
import torch
from support import mistake

from dmjd.config import recipes
from dmjd.config.pretrain import PretrainConfig
from dmjd.config.resuming import resume_differences
from dmjd.pretraining.batch_size import base_rate
from dmjd.runs.build import build_masks, build_model

TINY = {"img_size": 32, "encoder": "vit_tiny_patch8", "embed_dim": 32, "depth": 1, "num_heads": 2, "class_token": False}
HYBRID = {
    "img_size": 32,
    "encoder": "conv_vit_tiny_patch4",
    "embed_dim": (16, 16, 32),
    "depth": (1, 1, 1),
    "num_heads": 2,
}


def differences_of(one: PretrainConfig, other: PretrainConfig) -> dict:
    return {key: value for key, value in dataclasses.asdict(one).items() if value != getattr(other, key)}


def differences(name: str, base: str) -> dict:
    found = differences_of(*(recipes.get_recipe(n)() for n in (name, base)))
    return {key: value for key, value in found.items() if key != "recipe"}


@pytest.mark.parametrize(
    ("name", "base", "expected"),
    [
        ("maskfeat", "dmjd", {"num_views": 1, "vis": False}),
        ("dm", "maskfeat", {"num_views": 2}),
        ("jd", "maskfeat", {"vis": True}),
        ("dmjd", "dm", {"vis": True}),
        ("dmjd", "jd", {"num_views": 2}),
        ("complementary", "dmjd", {"masks": "complementary", "num_views": 4, "mask_ratio": 0.75, "block_size": 1}),
        ("independent", "dmjd", {"masks": "independent"}),
        (
            "convmae",
            "mae",
            {
                "encoder": "conv_vit_base_patch16",
                "class_token": False,
                "mlp_ratio": (4.0, 4.0, 4.0),
                "decoder_mlp_ratio": 4.0,
                "epochs": 1600.0,
            },
        ),
    ],
)
def test_it_differs_only_in_what_it_is_named_after(name, base, expected):
    assert differences(name, base) == expected


def test_folder_depends_on_the_image_size():
    """Small images have smaller tokens, each one HOG cell, and nothing else differs; overrides win."""
    large = recipes.folder(img_size=(64, 80))
    assert large == recipes.folder().replace(img_size=(64, 80))
    assert differences_of(large, recipes.dmjd(img_size=(64, 80))) == {
        "recipe": "folder",
        "encoder": "vit_tiny_patch16",
        "hog_color": True,
        "mask_ratio": 0.85,
        "block_size": 1,
        "crop_scale": (0.8, 1.0),
        "projector_depth": 1,
        "optimizer": "muon",
        "clip_grad": 3.0,
        "epochs": 200,
    }
    for size in (32, (64,), [32, 64]):
        small = recipes.folder(img_size=size)
        changed = differences_of(small, large)
        assert changed.pop("img_size") == small.img_size
        assert changed == {"encoder": "vit_tiny_patch4", "hog_cell": 4}
    assert recipes.folder(img_size=32, optimizer="adamw", blr=1e-3).optimizer == "adamw"
    assert recipes.folder(img_size=32, target="ema").branch_targets == {"mim": "ema", "vis": "ema"}
    assert recipes.folder(img_size=32, vis_target="ema").branch_targets == {"mim": "hog", "vis": "ema"}
    for patch, ratio in ((2, 0.85), (8, 0.85), (16, 0.75)):
        larger = recipes.folder(img_size=32, encoder=f"vit_tiny_patch{patch}")
        assert (larger.mask_ratio, build_model(larger).target("vis").name) == (ratio, "hog")
    assert (small.recipe, recipes.folder(img_size=32, minutes=3).epochs) == ("folder", None)


def test_naming_a_default_of_folder_changes_nothing():
    for size in (32, 128):
        config = recipes.folder(img_size=size)
        for name in ("masks", "block_size", "num_views", "target", "mask_ratio", "hog_cell", "init", "encoder"):
            assert recipes.folder(img_size=size, **{name: getattr(config, name)}) == config
        assert recipes.folder(img_size=size, masks="independent") == config.replace(masks="independent")
        assert recipes.folder(img_size=size, pred_ratio=1.0) == config.replace(pred_ratio=1.0)


def test_what_follows_the_tokens_is_left_to_the_weights_of_init():
    left = recipes.folder(init="runs/first").from_init
    assert {"encoder", "img_size", "mask_ratio", "hog_cell"} <= set(left or ())
    assert "mask_ratio" not in (recipes.folder(init="runs/first", mask_ratio=0.5).from_init or ())
    assert "mask_ratio" not in (recipes.folder(init="runs/first").replace(mask_ratio=0.5).from_init or ())
    known = recipes.folder(init="runs/first", encoder="vit_tiny_patch4", img_size=32)
    assert (known.mask_ratio, known.hog_cell, known.from_init) == (0.85, 4, ("in_chans",))
    assert "mask_ratio" not in (recipes.distill(init="runs/first").from_init or ())


@pytest.mark.parametrize(
    ("settings", "mask_ratio"),
    [
        ({"img_size": 16}, 0.85),
        ({"img_size": 64}, 0.85),
        ({"img_size": (32, 64), "num_views": 4}, 0.85),
        ({"img_size": 32, "encoder": "conv_vit_tiny_patch4"}, 0.85),
        ({"img_size": 224}, 0.85),
        ({"img_size": 112, "encoder": "timm/vit_small_patch14_dinov2"}, 0.85),
        ({"img_size": (96, 32)}, 0.75),
        ({"img_size": 8}, 0.75),
        ({"img_size": (4, 24)}, 0.75),
        ({"img_size": 16, "block_size": 2}, 0.75),
        ({"img_size": 32, "block_size": 2}, 0.85),
        ({"img_size": 128, "block_size": None, "masks": "independent"}, 0.85),
        ({"img_size": (96, 32), "encoder": "timm/vit_base_patch32_224"}, 0.5),
        ({"img_size": (4, 8)}, 0.5),
        ({"img_size": 128, "pred_ratio": 0.7}, 0.7),
        ({"img_size": 128, "pred_ratio": 0.9}, 0.85),
        ({"img_size": 128, "masks": "complementary", "num_views": 2}, 0.5),
        ({"img_size": 96, "encoder": "timm/flexivit_small"}, 0.75),
        ({"img_size": 32, "masks": "complementary", "num_views": 4}, 0.75),
        ({"img_size": 32, "num_views": 1, "pred_ratio": 0.75}, 0.75),
    ],
    ids=str,
)
def test_folder_masks_what_the_tokens_allow(settings, mask_ratio):
    config = recipes.folder(**settings)
    assert config.mask_ratio == mask_ratio
    with torch.device("meta"):
        build_model(config)


def test_a_recipes_learning_rate_is_for_its_own_optimizer():
    for name in ("mae", "adapt", "digits"):
        recipe = recipes.get_recipe(name)
        assert recipe().blr is not None
        assert recipe(optimizer="muon").blr is None
        assert recipe(optimizer="muon", blr=1e-2).blr == 1e-2


def test_digits_leaves_the_sizes_of_another_encoder_to_its_name():
    own = recipes.digits(encoder="conv_vit_tiny_patch4", depth=(1, 1, 2))
    assert (own.embed_dim, own.depth, own.num_heads) == (None, (1, 1, 2), None)
    for name in ("vit_huge_patch8", "vit_small_patch4", "timm/vit_tiny_patch16_224"):
        other = recipes.digits(encoder=name)
        assert (other.embed_dim, other.depth, other.num_heads) == (None, None, None)
    assert recipes.digits(encoder="vit_small_patch4", embed_dim=(32,)).embed_dim == (32,)
    assert recipes.digits(encoder="vit_tiny_patch4").embed_dim == recipes.digits().embed_dim == (96,)


def test_the_default_recipe_has_the_papers_settings():
    assert dataclasses.replace(PretrainConfig(), recipe="dmjd") == recipes.dmjd()
    config = recipes.dmjd()
    assert (config.num_views, config.mask_ratio, config.target, config.theta) == (2, 0.6, "hog", 1.0)
    assert (config.epochs, config.crop_scale, config.weight_decay) == (400.0, (0.5, 1.0), 0.05)
    assert base_rate(config, 512) == base_rate(config, 4096) == 6e-4
    pixels = recipes.mae()
    assert (pixels.target, pixels.num_views, pixels.mask_ratio, pixels.vis) == ("pixel", 1, 0.75, False)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_docstring_holds_the_command(name):
    text = inspect.getdoc(recipes.RECIPES[name])
    assert f"dmjd pretrain {'' if name == 'dmjd' else name + ' '}" in text
    assert len(text.splitlines()[0]) < 105  # the help shows it


def test_the_teacher_of_distill_sees_images_of_the_students_size():
    assert recipes.distill(img_size=(96, 128)).teacher_size == (0,)  # the student's, whatever it starts from
    assert recipes.distill(img_size=96, teacher_size=224).teacher_size == (224,)
    assert recipes.distill(teacher_size=None).teacher_size is None


@pytest.mark.parametrize("encoder", [None, 5])
def test_an_encoder_that_is_no_name_is_refused(encoder):
    for recipe in recipes.RECIPES.values():
        with pytest.raises(ValueError, match="encoder"):
            recipe(img_size=32, encoder=encoder)


@pytest.mark.parametrize("name", ["mae", "maskfeat", "dm", "jd", "dmjd", "complementary", "independent"])
def test_models_of_the_recipes(name):
    model = build_model(recipes.get_recipe(name)(**TINY))
    raw = torch.randint(0, 256, (4, 3, 32, 32)).float()
    out = model(raw / 128 - 1, raw, keys=torch.arange(4))
    assert set(out) == {"loss", "mim"} | ({"vis"} if name not in ("mae", "maskfeat", "dm") else set())
    assert bool(out["loss"].isfinite())
    visible = (~model.draw_masks(torch.arange(50)).mask).sum(dim=0)  # how often each token is visible
    if name == "complementary":
        assert bool((visible == 1).all())
    if name in ("dm", "dmjd"):
        assert int(visible.max()) == 1
    if name == "independent":
        assert int(visible.max()) == 2


def test_convmaes_own_ratios_and_dmjds():
    own = build_model(recipes.convmae(**HYBRID))
    assert own.encoder.mlp_ratios == (4.0, 4.0, 4.0)
    assert own.branches["mim"].decoder.mlp_ratio == 4.0
    same = build_model(recipes.convmae(mlp_ratio=(8, 8, 4), decoder_mlp_ratio=8, **HYBRID))
    theirs = build_model(recipes.dmjd(**HYBRID))
    assert same.encoder.mlp_ratios == theirs.encoder.mlp_ratios == (8.0, 8.0, 4.0)
    assert same.branches["mim"].decoder.mlp_ratio == theirs.branches["mim"].decoder.mlp_ratio == 8.0


def test_the_former_field_of_masks_is_an_error_with_the_new_name():
    with pytest.raises(ValueError, match=r"disjoint is now masks: .*--masks independent"):
        recipes.dmjd(disjoint=False)


@pytest.mark.parametrize("flag", ["--no-disjoint", "--disjoint"])
def test_the_former_flag_of_masks_is_an_error_with_the_new_name(flag, capsys):
    assert "setting disjoint is now masks" in mistake(capsys, "pretrain", flag)


@pytest.mark.parametrize(
    ("recipe", "changes", "disjoint", "masks"),
    [
        ("dmjd", {}, True, "disjoint"),
        ("independent", {}, False, "independent"),
        ("complementary", {}, True, "disjoint"),
        ("complementary", {"masks": "disjoint", "mask_ratio": 0.8}, True, "disjoint"),
    ],
)
def test_masks_of_a_configuration_of_version_0_1(recipe, changes, disjoint, masks):
    config = recipes.get_recipe(recipe)(**changes)
    former = json.loads(config.to_json())
    del former["masks"]
    assert PretrainConfig.from_json(json.dumps(former | {"disjoint": disjoint})) == config.replace(masks=masks)


@pytest.mark.parametrize("changes", [{}, {"num_views": 3, "mask_ratio": 2 / 3}])
def test_a_complementary_run_of_version_0_1_resumes(changes):
    config = recipes.complementary(**changes)
    former = json.loads(config.to_json())
    del former["masks"]
    before = PretrainConfig.from_json(json.dumps(former | {"disjoint": True}))
    assert resume_differences(before, config) == []
    assert resume_differences(before, config.replace(masks="independent")) == ["masks: disjoint -> independent"]
    keys = torch.arange(5)
    masks = [build_masks(c).draw(keys, (6, 6)) for c in (before, config)]
    assert torch.equal(masks[0].mask, masks[1].mask)


def test_a_changed_setting_that_the_masks_do_not_take_is_an_error():
    with pytest.raises(ValueError, match="pred_ratio has no meaning with independent masks"):
        build_model(recipes.dmjd(masks="independent", pred_ratio=0.9, **TINY))


def test_unknown_masks_are_named():
    with pytest.raises(ValueError, match=r"unknown masks 'disjiont'; did you mean 'disjoint'\?"):
        build_model(recipes.dmjd(masks="disjiont", **TINY))
    with pytest.raises(ValueError, match=r"complementary masks of 2 views have mask_ratio 0.5, .* got 0.6"):
        build_model(recipes.dmjd(masks="complementary", **TINY))
