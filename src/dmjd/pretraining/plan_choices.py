"""What a plan recommends, and why: rules on the size of the set, the size of its images, the time and the speed.

docs/plan.md lists them with what each is based on. Numbers that no measurement of ours supports say so there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dmjd.config.fields import CACHE_SETTINGS
from dmjd.config.plan import PlanConfig
from dmjd.config.pretrain import PretrainConfig
from dmjd.config.recipes import get_recipe
from dmjd.data.overview import Overview
from dmjd.pretraining.batch_size import LEAST_DEFAULT, default_batch_size

SHARE = 0.9  # of the time that is for training; evaluations get the rest

TINY_IMAGES, SMALL_IMAGES = 48, 96  # shorter side in pixels, up to which an input of 32, or 64, pixels has all detail

LOW, HIGH = 128, 224  # pixels, of larger images

HIGH_EPOCHS = 100  # that must fit for the high resolution; half of them at the low one is far ahead in fewer

ENCODERS = ("vit_base_patch16", "vit_small_patch16", "vit_tiny_patch16")

LARGER_EPOCHS = 100  # that must fit for an encoder larger than tiny

LARGER_IMAGES = {"vit_base_patch16": 100_000, "vit_small_patch16": 10_000}  # that it needs

GOOD_STEPS, FEW_STEPS = 500, 300  # that a smaller batch is to reach; below the second number a plan warns

SMALLEST_BATCH = 8

MORE_VIEWS = 4  # of half as many images as the two of the recipes, where that makes a step much shorter

MUCH_SHORTER = 0.7  # of the time; such steps spend most of it on what an image costs once for all views

# settings of a run that a plan keeps if they are given
GIVEN = (
    *("encoder", "img_size", "teacher_size", "device", "in_chans", "value_range", "nodata", "alpha"),
    *("num_workers", "batch_size"),
)

# settings of a list of images, or a remote set
LISTED = ("root", "path_column", "max_unreadable", *CACHE_SETTINGS)


@dataclass
class Choices:
    """Settings of a run with their reasons.

    Attributes:
        recipe: name of the recipe.
        settings: settings that differ from it, without data, folder and length.
        reasons: setting -> why it has its value, in words.
    """

    recipe: str
    settings: dict[str, Any]
    reasons: dict[str, str]

    def config(self, asked: PlanConfig, **more: Any) -> PretrainConfig:
        """The configuration of the run; its length is that of the recipe unless ``more`` has one."""
        shared = {name: getattr(asked, name) for name in ("data", *LISTED, *GIVEN)}
        given = {name: value for name, value in shared.items() if value is not None}
        return get_recipe(self.recipe)(**given | self.settings | more)


# (encoder, size of its input) -> images that it can be trained on in the time, counting each as often as it is seen
Reach = Callable[[str, tuple[int, ...]], float]


def choose_start(asked: PlanConfig) -> Choices:
    """The recipe."""
    if asked.init is not None:
        return Choices("adapt", {"init": asked.init}, {"recipe": "adapt: the run starts from trained weights (--init)"})
    if asked.teacher is not None:
        reason = "distill: a trained model is there to learn from (--teacher)"
        return Choices("distill", {"teacher": asked.teacher}, {"recipe": reason})
    reason = "folder: new weights; with a trained model (--teacher NAME, or --init) few images teach far more"
    return Choices("folder", {}, {"recipe": reason})


def choose_model(choices: Choices, asked: PlanConfig, seen: Overview, reach: Reach) -> None:
    """Image size and encoder, unless they are given or come from the weights."""
    if asked.init is not None:
        choices.reasons["encoder"] = "that of the weights (--init)"
        return
    side = max(asked.img_size) if asked.img_size is not None else _side_of(min(seen.typical))
    encoder = asked.encoder or ("vit_tiny_patch4" if (side or HIGH) <= 64 else None)
    if side is None:
        tried = encoder or ENCODERS[-1]
        epochs = reach(tried, (HIGH,)) / seen.num_images
        side = HIGH if epochs >= HIGH_EPOCHS else LOW
        fits = f"{epochs:.0f} epochs of {HIGH} x {HIGH} fit"
        why = f"{fits}, enough for it" if side == HIGH else f"only {fits}, and {HIGH_EPOCHS} make it worth it"
        choices.reasons["img_size"] = f"{side} x {side}: {why}"
    elif asked.img_size is None:
        h, w = seen.typical
        choices.reasons["img_size"] = f"{side} x {side}: images of about {h} x {w} hold no more detail"
    size = asked.img_size or (side,)
    if encoder is None:
        encoder = next(e for e in ENCODERS if _suits(e, size, seen.num_images, reach))
        larger = "the largest that suits the number of images and the time"
        smallest = "larger ones need more images or more time"
        choices.reasons["encoder"] = f"{encoder}: {smallest if encoder == ENCODERS[-1] else larger}"
    elif asked.encoder is None:
        choices.reasons["encoder"] = f"{encoder}: tokens of 4 pixels for small images"
    choices.settings |= {"encoder": encoder, "img_size": size}


def _side_of(shorter: int) -> int | None:
    """The input for images of this shorter side; None if it depends on the speed."""
    if shorter <= TINY_IMAGES:
        return 32
    return 64 if shorter <= SMALL_IMAGES else None


def _suits(encoder: str, size: tuple[int, ...], num_images: int, reach: Reach) -> bool:
    if encoder not in LARGER_IMAGES:
        return True
    return num_images >= LARGER_IMAGES[encoder] and reach(encoder, size) / num_images >= LARGER_EPOCHS


def choose_batch(choices: Choices, asked: PlanConfig, seen: Overview, images: float, cpu: bool) -> None:
    """The batch size, unless it is given, for a run of about ``images`` images in all.

    A recipe's own stays, even if few steps fit: its learning rate is for it.
    """
    if asked.batch_size is not None:
        return
    if (own := get_recipe(choices.recipe)().batch_size) is not None:
        choices.settings["batch_size"] = own
        choices.reasons["batch_size"] = f"{own}: that of the recipe {choices.recipe}, which its learning rate is for"
        return
    whole = size = default_batch_size(seen.num_images, cpu=cpu, minutes=60 * SHARE * (asked.hours or 0))
    while size // 2 >= SMALLEST_BATCH and images / size < GOOD_STEPS:
        size //= 2
    why = f"smaller than {whole}, for more steps" if size < whole else "the default for this set and device"
    choices.reasons["batch_size"] = f"{size}: {why}"
    choices.settings["batch_size"] = size


def more_views(choices: Choices, asked: PlanConfig, batch_size: int) -> dict[str, int]:
    """Settings for more views of fewer images per step; none if the batch is given, or the recipe's own, or small."""
    fixed = asked.batch_size is not None or get_recipe(choices.recipe)().batch_size is not None
    return {} if fixed or batch_size < 2 * SMALLEST_BATCH else {"num_views": MORE_VIEWS, "batch_size": batch_size // 2}


def choose_views(choices: Choices, settings: Mapping[str, int], part: float) -> None:
    """Take ``settings``, those of :func:`more_views`, if a step with them takes a small enough part of the time."""
    if part > MUCH_SHORTER:
        return
    choices.settings |= settings
    choices.reasons["num_views"] = (
        f"{settings['num_views']}, of half as many images: such a step takes {part:.0%} of the time, because reading "
        "an image, or its target, is most of it"
    )
    choices.reasons["batch_size"] = f"{settings['batch_size']}: see num views"


def choose_parts(choices: Choices, batch_size: int, accumulate: int) -> None:
    """The micro-batches of a step that was divided to fit into memory, as a run divides it."""
    if accumulate == 1:
        return
    choices.settings |= {"batch_size": batch_size, "accumulate": accumulate}
    choices.reasons["accumulate"] = (
        f"{accumulate}: a step of {batch_size} images does not fit into memory at once; in parts it is the same"
    )


def length_warnings(choices: Choices, asked: PlanConfig, seen: Overview, images: float) -> list[str]:
    """What to know about a run of about ``images`` images in all."""
    warnings, size = [], asked.batch_size or choices.settings["batch_size"]
    if size > seen.num_images:
        warnings.append(f"--batch-size {size} is larger than the set: a step takes {seen.num_images} images")
        size = seen.num_images
    if images / size < FEW_STEPS:
        longer = (asked.hours or 0) * FEW_STEPS * size / images
        warnings.append(
            f"only about {images / size:.0f} steps fit, which hardly trains an encoder: give it --hours {longer:.2g}, "
            "or a smaller --img-size or --encoder"
        )
    if seen.num_images < LEAST_DEFAULT * 10 and choices.recipe == "folder":
        warnings.append(
            f"{seen.num_images} images teach a new encoder little: start from trained weights (--init) or a teacher"
        )
    return warnings


def time_warnings(expected: Mapping[str, float], asked: PlanConfig) -> list[str]:
    """What to know about the time of a run; ``expected`` is what its plan says."""
    given, minutes = 60 * (asked.hours or 0), expected["minutes"]
    if minutes <= 1.05 * given:
        return []
    other = minutes - expected["training_minutes"]
    read = expected["reading_minutes"]
    parts = f"start, {'reading the images, ' if read > 0 else ''}evaluations and report"
    return [f"it takes about {minutes:,.1f} minutes, not {given:,.1f}: {other:,.1f} of them go to {parts}"]


def data_warnings(seen: Overview) -> list[str]:
    """What to know about the images."""
    warnings = []
    if seen.neighbors_alike >= 0.2:
        warnings.append(
            f"{seen.neighbors_alike:.0%} of the images nearly equal the next one, as frames of a video do: they count "
            "as fewer images than their number"
        )
    if seen.unreadable > 0:
        example = f", for example {seen.example}" if seen.example is not None else ""
        warnings.append(
            f"{seen.unreadable:.0%} of {seen.sampled} sampled images cannot be read (--max-unreadable){example}"
        )
    if seen.gray > 0.95:
        warnings.append("nearly all images are gray: --in-chans 1 trains an encoder for one channel")
    return warnings
