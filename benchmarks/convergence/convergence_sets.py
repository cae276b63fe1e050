"""What ``convergence.py`` compares: named sets of variants, each a recipe of the library with a few overrides."""

import dataclasses
import json
import random
from fractions import Fraction
from typing import Any

import convergence_color_sets as color_sets
from convergence_agreement import Agreement
from convergence_variant import BEST, BEST_FACTOR, SMALL_IMAGES, Variant

# The lite encoders learn something within minutes on one core.
ENCODERS: dict[str, dict[str, Any]] = {
    "vit": {"encoder": "vit_tiny_patch4"},
    "conv": {"encoder": "conv_vit_tiny_patch4"},
    "vit_lite": {"encoder": "vit_tiny_patch4", "embed_dim": 128, "depth": 5, "num_heads": 4}
    | {"decoder_dim": 64, "decoder_depth": 1, "decoder_heads": 2},
    "conv_lite": {"encoder": "conv_vit_tiny_patch4", "embed_dim": (32, 64, 128), "depth": (1, 1, 4), "num_heads": 4}
    | {"decoder_dim": 64, "decoder_depth": 1, "decoder_heads": 2},
    "vit16": {"encoder": "vit_tiny_patch16"},
    "vit16_lite": {"encoder": "vit_tiny_patch16", "embed_dim": 128, "depth": 5, "num_heads": 4}
    | {"decoder_dim": 64, "decoder_depth": 1, "decoder_heads": 2},
}
SETS = ("main", "speed", "alignment", "rule", "views", "ratio", "block", "theta", "hog", "projector", "decode")
SETS += ("targets", "beyond", "distill", "adapt", "schedule", "sharing", "space", "agreement", "best")
SETS += ("photos", "colors", "ema", "card")

# Where the set space looks, besides the base learning rate: around what was found best for small images,
# and around MAE, which is searched as thoroughly.
SHARED_SPACE: dict[str, tuple[Any, ...]] = {
    "schedule": ("cosine", "wsd"),
    "batch_size": (16, 32, 64),
    "mask_ratio": (0.75, 0.85, 0.9),
    "decode_ratio": (0.5, 1.0),
    "decoder_depth": (1, 2),
    "crop_scale": ((0.2, 1.0), (0.5, 1.0), (0.8, 1.0)),
}
SPACE = SHARED_SPACE | {"num_views": (1, 2, 4), "theta": (0.5, 1.0, 2.0), "hog_cell": (2, 4), "projector_depth": (1, 3)}
SPACE_MAE = SHARED_SPACE | {"optimizer": ("adamw", "muon")}
POINTS, LEAST_FACTOR, MOST_FACTOR = 24, 0.5, 4.0  # settings around each; of the base learning rate

GIVEN = "given"  # stands for the weights that are given


def of_dmjd(**overrides: Any) -> Variant:
    """The paper's recipe with overrides, at its base learning rate."""
    return Variant("dmjd", overrides, blr_of="dmjd")


def _targets() -> dict[str, Variant]:
    """Other targets for one or both branches."""
    by = {"pixel": ("pixel", "pixel"), "ema": ("ema", "ema"), "pixel_hog": ("pixel", "hog")}
    mean = {"ema_joined": False}
    by |= {"hog_pixel": ("hog", "pixel"), "hog_ema": ("hog", "ema")}
    with_teacher = {
        "teacher": ("teacher", "teacher"),
        "hog_teacher": ("hog", "teacher"),
        "pixel_teacher": ("pixel", "teacher"),
    }
    return (
        {"dmjd": Variant("dmjd")}
        | {key: Variant("dmjd", mean | {"mim_target": mim, "vis_target": vis}) for key, (mim, vis) in by.items()}
        | {
            key: Variant("dmjd", {"mim_target": mim, "vis_target": vis}, teacher="dmjd")
            for key, (mim, vis) in with_teacher.items()
        }
    )


def _beyond(pixels: str) -> dict[str, Variant]:
    """What goes beyond the paper: Muon, mixed targets, three quarters masked."""
    muon, mixed = {"optimizer": "muon"}, {"mim_target": "pixel", "vis_target": "hog"}
    c75 = mixed | {"mask_ratio": 0.75, "block_size": 1, "hog_cell": 4}
    return {
        pixels: Variant(pixels),
        f"{pixels}_muon": Variant(pixels, muon),
        "dmjd": Variant("dmjd"),
        "dmjd_muon": Variant("dmjd", muon),
        "pixel_hog_muon": Variant("dmjd", mixed | muon),
        "pixel_hog_c75": Variant("dmjd", c75),
        "pixel_hog_muon_c75": Variant("dmjd", c75 | muon),
        "pixel_hog_muon_c75_one_view": Variant("jd", c75 | muon),
        "pixel_hog_muon_c75_two_stage": Variant(
            "dmjd", c75 | muon | {"vis_target": "teacher"}, teacher="pixel_hog_muon_c75"
        ),
    }


def _distill() -> dict[str, Variant]:
    """What to learn from a given teacher and from the image itself; all with Muon and single tokens masked.

    The teacher sees images of the student's size, which is cheaper, unless the name says 224.
    """
    common = {"optimizer": "muon", "block_size": 1, "mask_ratio": 0.75, "teacher_size": (128,)}
    one, alone = {"num_views": 1}, {"mim": False, "vis_target": "teacher"}
    mixed = {"mim_target": "pixel", "vis_target": "teacher"}

    def of(*changes: dict[str, Any]) -> Variant:
        return Variant("dmjd", {name: value for change in (common, *changes) for name, value in change.items()})

    without_teacher = {"mim_target": "pixel", "vis_target": "hog", "teacher_size": None}
    return {
        "mae": Variant("mae", {"optimizer": "muon"}),
        "pixel_hog": of(without_teacher),
        "pixel_teacher": of(mixed),
        "pixel_teacher_stride16": of(mixed, {"teacher_skip": 1}),
        "pixel_teacher_224": of(mixed, {"teacher_size": None}),
        "pixel_teacher_224_one_view": of(mixed, one, {"teacher_size": None}),
        "teacher": of({"target": "teacher"}),
        "teacher_stride16": of({"target": "teacher", "teacher_skip": 1}),
        "teacher_224": of({"target": "teacher", "teacher_size": None}),
        "teacher_224_one_view": of({"target": "teacher", "teacher_size": None}, one),
        "teacher_224_four_views": of({"target": "teacher", "teacher_size": None}, {"num_views": 4}),
        "teacher_224_independent": of({"target": "teacher", "teacher_size": None}, {"masks": "independent"}),
        "teacher_one_view": of({"target": "teacher"}, one),
        "teacher_one_view_16": of({"target": "teacher"}, one, {"batch_size": 16}),
        "teacher_two_views_32": of({"target": "teacher"}, {"batch_size": 32}),
        "teacher_four_views_16": of({"target": "teacher"}, {"batch_size": 16, "num_views": 4}),
        "teacher_c50": of({"target": "teacher", "mask_ratio": 0.5}),
        "teacher_decode50": of({"target": "teacher", "decode_ratio": 0.5}),
        "visible_teacher_c75": of(alone),
        "visible_teacher_c50": of(alone, one, {"mask_ratio": 0.5}),
        "visible_teacher_c25": of(alone, one, {"mask_ratio": 0.25}),
        "visible_teacher_c50_224": of(alone, one, {"mask_ratio": 0.5, "teacher_size": None}),
    }


def _adapt() -> dict[str, Variant]:
    """Ways on from weights that are given: the settings of new runs, and those of the recipe with parts left out."""
    new = {"optimizer": "muon", "block_size": 1, "mask_ratio": 0.75, "mim_target": "pixel", "vis_target": "hog"}
    plain = {"layer_decay": 1.0, "init_freeze": 0.0}
    return {
        "scratch": Variant("dmjd", new),
        "continue": Variant("dmjd", new | {"init": GIVEN}),
        "adapt": Variant("adapt", {"init": GIVEN}),
        "adapt_hog": Variant("adapt", {"init": GIVEN, "mim_target": "hog"}),
        "adapt_muon": Variant("adapt", {"init": GIVEN, "optimizer": "muon"}),
        "adapt_without_care": Variant("adapt", plain | {"init": GIVEN}),
        "adapt_muon_without_care": Variant("adapt", plain | {"init": GIVEN, "optimizer": "muon"}),
        "adapt_without_copy": Variant("adapt", {"init": GIVEN, "vis_target": "hog"}),
        "adapt_moving_copy": Variant("adapt", {"init": GIVEN, "ema_momentum": 0.996}),
    }


def _schedule() -> dict[str, Variant]:
    """A cosine, and a constant learning rate with a cooldown of several lengths."""
    wsd = SMALL_IMAGES | {"schedule": "wsd"}
    return {"cosine": Variant("dmjd", SMALL_IMAGES), "wsd": Variant("dmjd", wsd)} | {
        f"wsd_{100 * part:.0f}": Variant("dmjd", wsd | {"cooldown": part}) for part in (0.1, 0.4)
    }


def _sharing() -> dict[str, Variant]:
    """Numbers of views, which share what is computed once for each image; see ``--once-share``. Names end with the
    images per step if there are fewer than in the other ones: more views of fewer images are as many views.
    """
    disjoint = {"one_view": (1, None), "two_views": (2, None), "four_views": (4, None)}
    disjoint |= {"one_view_32": (1, 32), "one_view_16": (1, 16), "two_views_32": (2, 32), "four_views_16": (4, 16)}
    independent = {"two_independent": (2, None), "four_independent": (4, None), "four_independent_16": (4, 16)}

    def of(views: int, images: int | None = None, **own: Any) -> Variant:
        return Variant("dmjd", SMALL_IMAGES | own | {"num_views": views} | ({"batch_size": images} if images else {}))

    return {key: of(views, images) for key, (views, images) in disjoint.items()} | {
        key: of(views, images, masks="independent") for key, (views, images) in independent.items()
    }


def _space() -> dict[str, Variant]:
    """Settings drawn at random, always the same: ``mixed`` and what varies it, ``mae`` and what varies it."""
    points: dict[str, Variant] = {}
    starts = {"mixed": (Variant("dmjd", SMALL_IMAGES), SPACE), "mae": (Variant("mae"), SPACE_MAE)}
    for name, (start, space) in starts.items():
        points[name], draw = start, random.Random(0)
        for number in range(1, POINTS):
            own = {setting: draw.choice(values) for setting, values in space.items()}
            factor = LEAST_FACTOR * (MOST_FACTOR / LEAST_FACTOR) ** draw.random()
            key = f"{name}_{number:02d}"
            points[key] = Variant(start.recipe, start.overrides | own, blr_factor=round(factor, 2))
    return points


def _agreement() -> dict[str, Variant]:
    """Losses on pooled features beside the mixed targets."""
    losses = {
        "contrast_0.1": Agreement("contrast", 0.1),
        "contrast_0.5": Agreement("contrast", 0.5),
        "contrast_0.1_color": Agreement("contrast", 0.1, color=0.4),
        "spread_0.3": Agreement("spread", 0.3),
    }
    return {"mixed": Variant("dmjd", SMALL_IMAGES)} | {
        key: Variant("dmjd", SMALL_IMAGES, agreement=each) for key, each in losses.items()
    }


def _best(pixels: str) -> dict[str, Variant]:
    """What the set space found best, each of its settings undone, other targets, and MAE and the paper's recipe with
    those settings that they have, too; the paper's recipe keeps its masks.
    """
    undone = {"batch_64": {"batch_size": 64}, "c_75": {"mask_ratio": 0.75}, "projector_3": {"projector_depth": 3}}
    undone |= {"crop_50": {"crop_scale": (0.5, 1.0)}}
    undone |= {"hog": {"mim_target": "hog"}, "pixel": {"vis_target": "pixel"}}  # one target for both branches
    color = {"hog_color": True}
    undone |= {"color": color, "hog_color": {"mim_target": "hog"} | color}
    paper = {name: BEST[name] for name in ("optimizer", "batch_size", "projector_depth", "crop_scale")}
    of_pixels = {name: BEST[name] for name in ("optimizer", "batch_size", "mask_ratio", "crop_scale")}
    return (
        {pixels: Variant(pixels), f"{pixels}_best": Variant(pixels, of_pixels, blr_factor=BEST_FACTOR)}
        | {"mixed": Variant("dmjd", SMALL_IMAGES), "best": Variant("dmjd", BEST, blr_factor=BEST_FACTOR)}
        | {"best_low_rate": Variant("dmjd", BEST)}
        | {f"best_{key}": Variant("dmjd", BEST | own, blr_factor=BEST_FACTOR) for key, own in undone.items()}
        | {"dmjd": Variant("dmjd"), "dmjd_color": Variant("dmjd", color)}
        | {"dmjd_best": Variant("dmjd", paper, blr_factor=BEST_FACTOR)}
        | {"dmjd_best_color": Variant("dmjd", paper | color, blr_factor=BEST_FACTOR)}
    )


_BY_FUNCTION = {"targets": _targets, "distill": _distill, "adapt": _adapt, "schedule": _schedule}
_BY_FUNCTION |= {"sharing": _sharing, "space": _space, "agreement": _agreement, "photos": color_sets.photos}
_BY_FUNCTION |= {"colors": color_sets.colors, "ema": color_sets.ema, "card": color_sets.card}


def variants_of(name: str, convolutional: bool) -> dict[str, Variant]:
    """The variants of a set, the baseline first."""
    pixels = "convmae" if convolutional else "mae"
    own = {each: Variant(each) for each in ("maskfeat", "dm", "jd", "dmjd", "complementary", "independent")}
    if name == "main":
        ratios = {"mlp_ratio": (8, 8, 4), "decoder_mlp_ratio": 8}
        fair = {"convmae_dmjd_ratios": Variant("convmae", ratios)} if convolutional else {}
        return {pixels: Variant(pixels)} | fair | own
    if name == "speed":
        return {pixels: Variant(pixels), "maskfeat": own["maskfeat"]} | {
            f"dmjd@{share}": Variant("dmjd", blr_of="dmjd", share=float(Fraction(share)))
            for share in ("1", "10/18", "10/30", "10/37")
        }
    if name == "alignment":
        misaligned = {f"{each}_misaligned": Variant(each, misaligned=True) for each in ("jd", "dmjd")}
        return {each: own[each] for each in ("maskfeat", "dm", "jd", "dmjd")} | misaligned
    if name == "rule":  # a learning rate found for one view, where the rule changes nothing
        return {"jd": own["jd"]} | {
            f"{recipe}{'' if rule else '_no_rule'}": Variant(recipe, scale_rule=rule, blr_of="jd")
            for recipe in ("dmjd", "complementary")
            for rule in (True, False)
        }
    if name in _BY_FUNCTION:
        return _BY_FUNCTION[name]()
    if name in ("beyond", "best"):
        return (_beyond if name == "beyond" else _best)(pixels)
    changes: dict[str, dict[str, dict[str, Any]]] = {
        "views": {f"views_{k}": {"num_views": k} for k in (1, 3, 4)},
        "ratio": {f"c_{c}": {"mask_ratio": c} for c in (0.4, 0.5, 0.75, 0.9)}
        | {f"p_{p}": {"pred_ratio": p} for p in (0.6, 0.7, 0.8, 0.9)},
        "block": {"block_1": {"block_size": 1}},
        "theta": {f"theta_{theta:g}": {"theta": theta} for theta in (0.3, 3.0, 10.0)},
        "hog": {f"cell_{cell}": {"hog_cell": cell} for cell in (1, 4)}
        | {f"bins_{bins}": {"hog_bins": bins} for bins in (4, 18)},
        "projector": {f"projector_{depth}": {"projector_depth": depth} for depth in (1, 2, 5)},
        "decode": {f"decode_{ratio}": {"decode_ratio": ratio} for ratio in (0.25, 0.5)},
    }
    return {"dmjd": own["dmjd"]} | {key: of_dmjd(**change) for key, change in changes[name].items()}


def base_name(name: str) -> str:
    """A variant's name without ``@share``."""
    return name.partition("@")[0]


def with_share(name: str, available: dict[str, Variant]) -> Variant:
    """The variant called ``name`` or ``name@share``; share is a number or a fraction of the time, e.g. 10/37.

    Raises:
        ValueError: for an unknown name, or a share that is not a number.
    """
    base, at, share = name.partition("@")
    if name in available:
        return available[name]
    if base not in available:
        raise ValueError(f"no variant '{base}' in this set; there are: {', '.join(available)}")
    variant = available[base]
    return dataclasses.replace(variant, share=float(Fraction(share)), blr_of=variant.blr_of or base) if at else variant


def shuffled(jobs: list[Any]) -> list[Any]:
    """A fixed random order, so that a drifting machine favors no variant and the study can be resumed."""
    return random.Random(0).sample(jobs, len(jobs))


def override(text: str) -> tuple[str, Any]:
    """Parse ``name=value``, the value as JSON or a string."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
