"""Sets of ``convergence.py`` around HOG with colors."""

import dataclasses
from typing import Any

from convergence_variant import BEST, BEST_FACTOR, Variant

COLOR = BEST | {"mim_target": "hog", "hog_color": True}


def card() -> dict[str, Variant]:
    """What is compared on a GPU: HOG with colors, MAE with its other settings, MAE; all with the batch of the study.

    The factors move the candidates of the learning rate to where those of each were best, at the edges.
    """
    best = {name: value for name, value in COLOR.items() if name != "batch_size"}
    of_pixels = {name: best[name] for name in ("optimizer", "mask_ratio", "crop_scale")}
    return {
        "mae": Variant("mae", blr_factor=0.5),
        "mae_best": Variant("mae", of_pixels, blr_factor=2.0),
        "hog_color": Variant("dmjd", best, blr_factor=2.0),
    }


def colors() -> dict[str, Variant]:
    """HOG with colors: their weight, other cells, views and masks, layer-wise learning rates."""
    own: dict[str, dict[str, Any]] = {"cell_2": {"hog_cell": 2}, "one_view": {"num_views": 1}}
    own |= {"four_views": {"num_views": 4, "batch_size": 16}, "c_90": {"mask_ratio": 0.9}, "c_75": {"mask_ratio": 0.75}}
    own |= {"theta_2": {"theta": 2.0}, "crop_50": {"crop_scale": (0.5, 1.0)}, "block_2": {"block_size": 2}}
    own |= {"layer_decay_90": {"layer_decay": 0.9}, "layer_decay_75": {"layer_decay": 0.75}}
    start = Variant("dmjd", COLOR, blr_factor=BEST_FACTOR)
    weights = {f"weight_{weight:g}": dataclasses.replace(start, color_weight=weight) for weight in (0.5, 2.0, 4.0)}
    others = {key: dataclasses.replace(start, overrides=COLOR | each) for key, each in own.items()}
    return {"hog_color": start, "windows": dataclasses.replace(start, windows=True)} | weights | others


def photos() -> dict[str, Variant]:
    """MAE and the paper's recipe at the default rate of AdamW, and what was found best for small images, in tokens of
    16 pixels.
    """
    adamw = 0.28  # of Muon's base learning rate for 64 images
    color = COLOR | {"hog_cell": None}  # 2 x 2 cells per token
    own: dict[str, dict[str, Any]] = {
        "color": {},
        "color_cell_4": {"hog_cell": 4},
        "color_c_75": {"mask_ratio": 0.75},
        "color_crop_20": {"crop_scale": (0.2, 1.0)},
        "mixed": {"mim_target": "pixel", "hog_color": False},
        "color_teacher": {"vis_target": "teacher", "teacher_size": (128,)},
    }
    of_pixels = {name: BEST[name] for name in ("optimizer", "mask_ratio", "crop_scale")}
    return {
        "mae": Variant("mae", blr_factor=adamw),
        "mae_best": Variant("mae", of_pixels, blr_factor=BEST_FACTOR),
        "paper": Variant("dmjd", blr_factor=adamw),
        "paper_color": Variant("dmjd", {"hog_color": True}, blr_factor=adamw),
    } | {key: Variant("dmjd", color | each, blr_factor=BEST_FACTOR) for key, each in own.items()}


def ema() -> dict[str, Variant]:
    """HOG with colors, and features of a moving copy for one branch or both: other momenta, blocks, views."""
    color = COLOR | {"vis_target": "hog"}
    vis, mim, mean = {"vis_target": "ema"}, {"mim_target": "ema"}, {"ema_joined": False}
    fast, slow, blocks = {"ema_momentum": 0.99}, {"ema_momentum": 0.999}, {"ema_layers": 4}
    one, few, four = {"num_views": 1}, {"batch_size": 16}, {"num_views": 4, "batch_size": 16}
    own: dict[str, dict[str, Any]] = {
        "hog_color": {},
        "vis": vis | fast | mean,
        "vis_slow": vis | slow | mean,
        "vis_instance": vis | fast | blocks | mean,
        "vis_joined": vis | fast | blocks,
        "mim": mim | fast | mean,
        "mim_joined": mim | fast | blocks,
        "mim_joined_one_view": mim | fast | blocks | one,
        "mim_joined_one_view_16": mim | fast | blocks | one | few,
        "mim_joined_four_views": mim | fast | blocks | four,
        "both": vis | mim | fast | mean,
        "both_instance": vis | mim | fast | blocks | mean,
        "both_joined": vis | mim | fast | blocks,
        "both_joined_half": vis | mim | fast,
        "vis_four_views": vis | fast | four | mean,
    }
    return {
        key: Variant("dmjd", color | change, blr_factor=BEST_FACTOR, instance_mean=key.endswith("_instance"))
        for key, change in own.items()
    }
