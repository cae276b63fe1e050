"""Recipes: functions ``recipe(data=None, out=None, **overrides) -> PretrainConfig``. Imports no torch."""

from collections.abc import Callable
from typing import Any

from dmjd.config.checks import shown
from dmjd.config.pretrain import PretrainConfig
from dmjd.config.tokens import TOKEN_SETTINGS, default_block, patch_of
from dmjd.suggest import did_you_mean

Recipe = Callable[..., PretrainConfig]

SMALL_SIDE = 64  # pixels; up to this size the tokens of `folder` have 4 pixels

FEW_TOKENS = 16  # with fewer, or fewer blocks of them, `folder` masks three quarters


def _with(config: PretrainConfig, overrides: dict[str, Any]) -> PretrainConfig:
    """The configuration with overrides; a recipe's learning rate is for its own optimizer."""
    other = overrides.get("optimizer", config.optimizer) != config.optimizer
    return config.replace(**({"blr": None} if other else {}) | overrides)


def dmjd(data: str | tuple[str, ...] | None = None, out: str | None = None, **overrides: Any) -> PretrainConfig:
    """The paper's recipe: two disjoint views, both branches, HOG.

    ``dmjd pretrain --data imagenet/train --out runs/dmjd --batch-size 512``. Published for ConvViT-B on ImageNet-1K,
    400 epochs at 512 images per step: fine-tuning 85.2, linear probe 76.7, 101 hours on 8 A100-40GB (Ma et al. 2023;
    not measured by us). Large: ``--encoder conv_vit_large_patch16 --clip-grad 3``.
    """
    return PretrainConfig(recipe="dmjd", data=data, out=out).replace(**overrides)


def mae(data: str | tuple[str, ...] | None = None, out: str | None = None, **overrides: Any) -> PretrainConfig:
    """Masked autoencoder: one view, three quarters masked, pixel targets, class token.

    ``dmjd pretrain mae --data imagenet/train --out runs/mae --batch-size 4096 --epochs 1600``. Published for ViT-B
    on ImageNet-1K, 1600 epochs: fine-tuning 83.6, linear probe 67.8 (He et al. 2022; not measured by us).
    """
    config = PretrainConfig(
        recipe="mae",
        data=data,
        out=out,
        encoder="vit_base_patch16",
        class_token=True,
        target="pixel",
        num_views=1,
        mask_ratio=0.75,
        block_size=1,
        vis=False,
        epochs=800,
        blr=1.5e-4,
        crop_scale=(0.2, 1.0),
    )
    return _with(config, overrides)


def convmae(data: str | tuple[str, ...] | None = None, out: str | None = None, **overrides: Any) -> PretrainConfig:
    """ConvMAE: ``mae`` on the hybrid encoder with ConvMAE's MLP ratios.

    ``dmjd pretrain convmae --data imagenet/train --out runs/convmae --batch-size 1024``. Published for ConvViT-B on
    ImageNet-1K, 1600 epochs: fine-tuning 85.0, linear probe 70.9 (Gao et al. 2022), 300 hours on 8 GPUs (as Ma et al.
    2023 report it; not measured by us). With DMJD's ratios, so that the encoder is the same:
    ``--mlp-ratio 8 8 4 --decoder-mlp-ratio 8``.
    """
    config = PretrainConfig(
        recipe="convmae",
        data=data,
        out=out,
        encoder="conv_vit_base_patch16",
        mlp_ratio=(4.0, 4.0, 4.0),
        decoder_mlp_ratio=4.0,
        target="pixel",
        num_views=1,
        mask_ratio=0.75,
        block_size=1,
        vis=False,
        epochs=1600,
        blr=1.5e-4,
        crop_scale=(0.2, 1.0),
    )
    return _with(config, overrides)


def maskfeat(data: str | tuple[str, ...] | None = None, out: str | None = None, **overrides: Any) -> PretrainConfig:
    """``dmjd`` with one view and without the branch on visible tokens: HOG of masked tokens (MaskFeat).

    ``dmjd pretrain maskfeat --encoder vit_base_patch16 --data imagenet/train --out runs/maskfeat --epochs 1600``.
    Published for ViT-B on ImageNet-1K, 1600 epochs: fine-tuning 84.0, linear probe 68.5, 240 hours on 8 GPUs (as Ma et
    al. 2023 report it; MaskFeat's own HOG, Wei et al. 2022, is normalized by blocks; not measured by us).
    """
    return dmjd(data, out, **{"recipe": "maskfeat", "num_views": 1, "vis": False} | overrides)


def dm(data: str | tuple[str, ...] | None = None, out: str | None = None, **overrides: Any) -> PretrainConfig:
    """Disjoint masking alone: ``maskfeat`` with two disjoint views.

    ``dmjd pretrain dm --data imagenet/train --out runs/dm``. Published: competitive with one view in up to 3.7 times
    less time (Ma et al. 2023, abstract; not measured by us).
    """
    return dmjd(data, out, **{"recipe": "dm", "vis": False} | overrides)


def jd(data: str | tuple[str, ...] | None = None, out: str | None = None, **overrides: Any) -> PretrainConfig:
    """Joint distillation alone: ``maskfeat`` with the branch on visible tokens, one view.

    ``dmjd pretrain jd --data imagenet/train --out runs/jd``. Published: up to 3.4 points more in linear probing (Ma et
    al. 2023, abstract; not measured by us).
    """
    return dmjd(data, out, **{"recipe": "jd", "num_views": 1} | overrides)


def complementary(
    data: str | tuple[str, ...] | None = None, out: str | None = None, **overrides: Any
) -> PretrainConfig:
    """``dmjd`` with four views whose visible quarters partition the image.

    ``dmjd pretrain complementary --data imagenet/train --out runs/complementary``. Single-token masks, because the
    number of 2 x 2 blocks is not divisible by four. The masks are FastConvMAE's, for which 84.4 fine-tuning in 50
    epochs is published with pixel targets and without the visible branch (ConvViT-B, ImageNet-1K, its README; not
    measured by us).
    """
    masks = {"masks": "complementary", "num_views": 4, "mask_ratio": 0.75, "block_size": 1}
    return dmjd(data, out, **{"recipe": "complementary"} | masks | overrides)


def independent(data: str | tuple[str, ...] | None = None, out: str | None = None, **overrides: Any) -> PretrainConfig:
    """``dmjd`` with two views that are masked independently of each other.

    ``dmjd pretrain independent --data imagenet/train --out runs/independent``. Two such views mask 84 % of the tokens
    at least once, two disjoint ones all. No published result that we know of.
    """
    return dmjd(data, out, **{"recipe": "independent", "masks": "independent"} | overrides)


def folder(data: str | tuple[str, ...] | None = None, out: str | None = None, **overrides: Any) -> PretrainConfig:
    """Your own images on one machine: the settings our studies found best, and an encoder that timm can load.

    ``dmjd pretrain folder --data ~/images --out runs/mine``. Two disjoint views with 85 % of the tokens masked, HOG
    with the mean color of each cell, Muon: what did best in minutes on small images, and is among the best on
    photographs of 128 pixels (docs/evidence.md); runs of hours were not measured. With ``--img-size`` up to 64, tokens
    have 4 pixels instead of 16. Fewer than 16 tokens have a lower mask ratio.
    """
    config = PretrainConfig(
        recipe="folder",
        data=data,
        out=out,
        encoder="vit_tiny_patch16",
        block_size=1,
        crop_scale=(0.8, 1.0),
        projector_depth=1,
        optimizer="muon",
        hog_color=True,
        epochs=200,
        clip_grad=3.0,
    )
    if max(config.replace(**{k: v for k, v in overrides.items() if k == "img_size"}).size) <= SMALL_SIDE:
        config = config.replace(encoder="vit_tiny_patch4")
    config = config.replace(**overrides)
    left = tuple(name for name in TOKEN_SETTINGS if name not in overrides)
    if {"encoder", "img_size"} & set(config.from_init or ()):  # the tokens are not known yet
        return config.replace(from_init=(*(config.from_init or ()), *left))
    own = settings_of_tokens(config)
    return config.replace(**{name: own[name] for name in left})


def settings_of_tokens(config: PretrainConfig) -> dict[str, Any]:
    """The settings of ``folder`` that follow the size and number of tokens: mask ratio, and one HOG cell in tokens of 4
    pixels.
    """
    patch, views, (height, width) = patch_of(config.encoder), config.num_views, config.size
    ratio = 0.75
    if config.masks == "complementary":
        ratio = 1.0 - 1.0 / max(2, views)
    elif patch:
        grid = (height // patch, width // patch)
        block = default_block(grid) if config.block_size is None else config.block_size
        units = (grid[0] // block) * (grid[1] // block)
        ratio = 0.85 if units >= FEW_TOKENS else 0.75 if units >= 4 else 0.5
    if config.pred_ratio is not None:
        ratio = config.pred_ratio if views == 1 else min(ratio, config.pred_ratio)
    return {"mask_ratio": ratio, "hog_cell": 4 if patch == 4 else None}


def distill(data: str | tuple[str, ...] | None = None, out: str | None = None, **overrides: Any) -> PretrainConfig:
    """A new encoder for your images that learns the features of a trained model, on masked and visible tokens.

    ``dmjd pretrain distill --data ~/images --teacher tf_efficientnet_lite0 --img-size 128 --out runs/student``. For a
    few thousand images, or minutes instead of days: there it learns far more than from the images alone
    (docs/evidence.md). The teacher sees images of the student's size, which makes its part of a step cheap, or larger
    ones where its map would have less than half of the student's tokens in a direction (``--teacher-size``).
    """
    config = PretrainConfig(
        recipe="distill",
        data=data,
        out=out,
        encoder="vit_tiny_patch16",
        target="teacher",
        teacher_size=(0,),
        mask_ratio=0.75,
        block_size=1,
        optimizer="muon",
        epochs=100,
        clip_grad=3.0,
    )
    return _with(config, overrides)


def adapt(data: str | tuple[str, ...] | None = None, out: str | None = None, **overrides: Any) -> PretrainConfig:
    """Trained weights, adapted to your images; a frozen copy of them is one of the targets.

    ``dmjd pretrain adapt --data ~/images --init vit_small_patch16_224 --out runs/adapted``.
    """
    config = PretrainConfig(
        recipe="adapt",
        data=data,
        out=out,
        encoder="vit_tiny_patch16",
        mim_target="pixel",
        vis_target="ema",
        ema_momentum=1.0,
        ema_joined=False,
        mask_ratio=0.75,
        block_size=1,
        layer_decay=0.75,
        init_freeze=0.1,
        epochs=20,
        batch_size=64,
        blr=6e-4,
        clip_grad=3.0,
    )
    return _with(config, overrides)


def digits(data: str | tuple[str, ...] | None = None, out: str | None = None, **overrides: Any) -> PretrainConfig:
    """Handwritten digits on colored gradients, 32 x 32, rendered on the fly: nothing to download.

    ``dmjd pretrain digits --out runs/first``: two to seven minutes on 2 cores. Its length is in steps, so a slower
    machine reaches the accuracy of README's table, too. Another ``--encoder`` than vit_tiny has the width, depth and
    heads of its name.
    """
    config = PretrainConfig(
        recipe="digits",
        data=data if data is not None else "digits",
        out=out,
        img_size=(32,),
        flip=False,
        encoder="vit_tiny_patch8",
        embed_dim=(96,),
        depth=(4,),
        num_heads=3,
        decoder_dim=64,
        decoder_depth=1,
        decoder_heads=2,
        mask_ratio=0.5,
        block_size=1,
        theta=4.0,
        epochs=None,
        steps=2500,
        batch_size=64,
        blr=6e-3,
    )
    size, given = config.encoder.rpartition("_patch")[0], str(overrides.get("encoder", config.encoder))
    if given.rpartition("_patch")[0] != size:  # width and depth above are for this one
        overrides = {"embed_dim": None, "depth": None, "num_heads": None} | overrides
    return _with(config, overrides)


NEED_INIT = ("adapt",)  # recipes that make no sense with random weights

RECIPES: dict[str, Recipe] = {
    "dmjd": dmjd,
    "folder": folder,
    "adapt": adapt,
    "distill": distill,
    "digits": digits,
    "mae": mae,
    "convmae": convmae,
    "maskfeat": maskfeat,
    "dm": dm,
    "jd": jd,
    "complementary": complementary,
    "independent": independent,
}


def get_recipe(name: str) -> Recipe:
    """Look up a recipe by name; ValueError with a suggestion for an unknown one."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {shown(name)}{did_you_mean(name, RECIPES)} Recipes: {', '.join(RECIPES)}")
    return RECIPES[name]
