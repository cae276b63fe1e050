"""The configuration of a pre-training run: one frozen dataclass, checked when made, to and from JSON. Imports no torch.

Command-line flags are generated from these fields, so names, defaults and help stand here only.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from dmjd.config.fields import check_types, option

DEFAULT_BATCH_SIZE = 256

DURATIONS = ("epochs", "steps", "minutes")

FORMAT_VERSION = 1
RENAMED = {"max_bad": "max_unreadable"}  # settings of former versions, for their run folders
REPLACED = {"disjoint": "masks: 'disjoint' (the default) or 'independent' (--masks independent)"}


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Everything that defines a pre-training run. Paths are strings; None means "by the rule in the help text".

    Raises:
        ValueError: from the constructor, for values that cannot be, naming the field and the cure.
    """

    recipe: str = option("dmjd", "name of the recipe the run started from", "run")
    data: str | None = option(
        None, "folder of images, .parquet file or folder of them, set name, hub name, or digits", "data", common=True
    )
    out: str | None = option(None, "run folder", "run", resume=True, common=True)
    test_data: str | None = option(None, "labeled test set for kNN while training", "data", resume=True)
    labels: str = option(
        "none",
        "where labels for evaluation come from; never used to train",
        "data",
        choices=("none", "folder", "column"),
    )
    img_size: tuple[int, ...] = option((224,), "image side in pixels, or height and width", "data", common=True)
    in_chans: int = option(3, "channels the encoder takes", "data")
    mean: tuple[float, ...] | None = option(
        None, "per channel on the 0..1 scale; default ImageNet's for 3 channels, else measured", "data"
    )
    std: tuple[float, ...] | None = option(None, "as mean", "data")
    value_range: tuple[float, ...] | None = option(
        None, "LOW HIGH mapped to 0..255; default the data type's own range", "data"
    )
    crop_scale: tuple[float, ...] = option((0.5, 1.0), "share of the image's area a random crop takes", "data")
    flip: bool = option(True, "random left-right flips", "data")
    max_unreadable: int | None = option(
        None, "unreadable images tolerated; default the larger of 10 and 1 %%", "data", resume=True
    )
    num_workers: int | None = option(None, "loader processes; default by the cores", "data", resume=True)

    encoder: str = option("conv_vit_base_patch16", "vit_* or conv_vit_*, tiny small base large", "encoder", common=True)
    class_token: bool = option(False, "one prefix token (ViT)", "encoder")
    drop_path: float = option(0.0, "stochastic depth of the last block", "encoder")
    embed_dim: tuple[int, ...] | None = option(None, "width; three for ConvViT's stages; default by name", "encoder")
    depth: tuple[int, ...] | None = option(None, "blocks; three for ConvViT; default by name", "encoder")
    num_heads: int | None = option(None, "attention heads; default by name", "encoder")
    mlp_ratio: tuple[float, ...] | None = option(None, "MLP ratio; three for ConvViT; default by name", "encoder")

    target: str = option("hog", "learning target of both branches: hog, pixel, teacher or ema", "method", common=True)
    mim_target: str | None = option(None, "target of the reconstruction branch; default --target", "method")
    vis_target: str | None = option(None, "target of the distillation branch; default --target", "method")
    hog_cell: int | None = option(None, "side of a HOG cell in pixels; default half the patch", "method")
    hog_bins: int = option(9, "orientations of a HOG cell", "method")
    teacher: str | None = option(
        None, "of target teacher: a run folder, an encoder file or a timm model", "method", resume=True
    )
    teacher_layers: int = option(1, "last blocks of the teacher that are averaged", "method")
    ema_layers: int | None = option(None, "of target ema: last blocks that are averaged; default half", "method")
    ema_momentum: float = option(0.996, "of the ema copy at the start; rises to 1 over the run", "method")
    num_views: int = option(2, "masked views of each image (K)", "method", common=True)
    mask_ratio: float = option(0.6, "share masked in each view (c)", "method", common=True)
    pred_ratio: float | None = option(None, "share masked in at least one view (p); default the most", "method")
    block_size: int | None = option(None, "side of a masking block in tokens; default 2 where it divides", "method")
    masks: str = option("disjoint", "masking strategy: disjoint, independent or complementary", "method")
    mim: bool = option(True, "reconstruction of masked tokens", "method")
    vis: bool = option(True, "distillation on visible tokens", "method")
    theta: float = option(1.0, "weight of the distillation loss", "method")
    mim_loss: str = option("l2", "loss of the reconstruction branch", "method", choices=("l2", "smooth_l1"))
    vis_loss: str = option("smooth_l1", "loss of the distillation branch", "method", choices=("l2", "smooth_l1"))
    decoder_dim: int | None = option(None, "decoder width; default by the encoder's", "method")
    decoder_depth: int | None = option(None, "decoder blocks; default by the encoder's width", "method")
    decoder_heads: int | None = option(None, "decoder heads; default by the encoder's width", "method")
    decoder_mlp_ratio: float | None = option(None, "decoder MLP ratio; default the encoder's first", "method")
    decode_ratio: float = option(
        1.0, "share of the masked tokens the decoder is asked for, at random: a cheaper step", "method"
    )
    projector_depth: int = option(3, "linear layers of the distillation branch's projector", "method")

    epochs: float | None = option(400.0, "length of the run", "training", resume=True, common=True)
    steps: int | None = option(None, "length of the run, instead of epochs", "training", resume=True, common=True)
    minutes: float | None = option(
        None, "length of the run; the schedule follows the clock", "training", resume=True, common=True
    )
    batch_size: int | None = option(
        None, "images per step over all processes; default 256, or the whole set if smaller", "training", common=True
    )
    accumulate: int = option(1, "parts a step's batch is computed in: less memory, same result", "training")
    blr: float = option(6e-4, "base learning rate: lr = blr * batch * (p / c) / 256", "training", common=True)
    optimizer: str = option(
        "adamw", "adamw, or muon: far fewer steps for short runs", "training", choices=("adamw", "muon")
    )
    weight_decay: float = option(0.05, "not on biases and norms", "training")
    warmup: float = option(0.05, "share of the run with a rising learning rate", "training")
    clip_grad: float | None = option(None, "largest gradient norm; default no clipping", "training")
    seed: int = option(0, "of weights, order, crops and masks", "training", common=True)
    precision: str = option(
        "auto", "auto: bf16 on a GPU that has it, else fp32", "machine", choices=("auto", "fp32", "bf16", "fp16")
    )
    device: str = option("auto", "auto, cpu or cuda", "machine", resume=True, common=True)
    compile: bool = option(False, "torch.compile the model", "machine")
    grad_checkpointing: bool = option(False, "recompute activations: less memory, slower", "machine", resume=True)

    resume: bool = option(
        True, "go on with the run in --out; --no-resume refuses a folder that holds one", "run", resume=True
    )
    checkpoint_every: int = option(500, "steps between checkpoints", "run", resume=True)
    log_every: int = option(20, "steps between lines of metrics.jsonl", "run", resume=True)
    eval_every: int | None = option(
        None, "steps between images and online kNN; default ten times a run; 0 never", "run", resume=True
    )
    final_eval: bool = option(True, "kNN and linear probe at the end where there are labels", "run", resume=True)
    wandb: bool = option(False, "log to Weights & Biases too (extra dmjd[wandb])", "run", resume=True)

    def __post_init__(self) -> None:
        check_types(self)
        _check_ranges(self)
        given = [name for name in DURATIONS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of --epochs, --steps and --minutes, got {' and '.join(given) or 'none'}"
            )
        if self.accumulate > 1 and self.batch_size is not None and self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not divisible by accumulate {self.accumulate}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.in_chans:
                raise ValueError(f"{name} has {len(values)} values for {self.in_chans} channels (--in-chans)")
        if (self.mean is None) != (self.std is None):
            raise ValueError("give both mean and std, or neither")
        if not (self.mim or self.vis):
            raise ValueError("both branches are off: leave --mim or --vis on")
        if self.masks in ("independent", "complementary") and self.pred_ratio is not None:
            raise ValueError(f"pred_ratio has no meaning with {self.masks} masks: leave out one of them")
        if (self.teacher is not None) != ("teacher" in self.branch_targets.values()):
            raise ValueError("--teacher and target 'teacher' (--target, --mim-target or --vis-target) go together")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the encoder's input."""
        return (self.img_size[0], self.img_size[-1])

    @property
    def branch_targets(self) -> dict[str, str]:
        """Branch that is on, "mim" or "vis" -> name of its target."""
        own = {"mim": self.mim_target, "vis": self.vis_target}
        return {branch: name or self.target for branch, name in own.items() if getattr(self, branch)}

    def replace(self, **changes: Any) -> "PretrainConfig":
        """A copy with changes; a new duration takes the place of the old one. ValueError for unknown names."""
        if former := [name for name in changes if name in REPLACED]:
            raise ValueError(f"setting '{former[0]}' is now {REPLACED[former[0]]}")
        if unknown := set(changes) - {f.name for f in dataclasses.fields(self)}:
            raise ValueError(f"unknown setting: {', '.join(sorted(unknown))}")
        if any(changes.get(name) is not None for name in DURATIONS):
            changes = dict.fromkeys(DURATIONS) | changes
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """Indented JSON with a format version."""
        return json.dumps({"format": FORMAT_VERSION} | dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "PretrainConfig":
        """Inverse of :meth:`to_json`; ValueError for another format or unknown fields."""
        values = json.loads(text)
        if values.pop("format", None) != FORMAT_VERSION:
            raise ValueError(
                f"config.json is not of format {FORMAT_VERSION}: it was written by another version of dmjd"
            )
        values = {RENAMED.get(name, name): value for name, value in values.items()}
        if "disjoint" in values:  # of version 0.1
            values["masks"] = _former_masks(values)
        if unknown := set(values) - {f.name for f in dataclasses.fields(cls)}:
            raise ValueError(f"config.json holds unknown settings: {', '.join(sorted(unknown))}")
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields)


def _former_masks(values: dict[str, Any]) -> str:
    """The masking strategy of a configuration of version 0.1, which had the field ``disjoint``."""
    if not values.pop("disjoint"):
        return "independent"
    partition = values.get("num_views", 2) * (1 - values.get("mask_ratio", 0.6)) == 1
    own = values.get("recipe") == "complementary" and partition and values.get("pred_ratio") is None
    return "complementary" if own else "disjoint"


# field: (lowest, highest, whether the ends are allowed)
_RANGES: dict[str, tuple[float, float, bool]] = {
    "in_chans": (1, math.inf, True),
    "img_size": (1, math.inf, True),
    "max_unreadable": (0, math.inf, True),
    "num_workers": (0, math.inf, True),
    "drop_path": (0, 1, True),
    "embed_dim": (4, math.inf, True),
    "depth": (1, math.inf, True),
    "num_heads": (1, math.inf, True),
    "mlp_ratio": (0, math.inf, False),
    "hog_cell": (1, math.inf, True),
    "hog_bins": (1, 255, True),
    "teacher_layers": (1, math.inf, True),
    "ema_layers": (1, math.inf, True),
    "ema_momentum": (0, 1, True),
    "num_views": (1, math.inf, True),
    "mask_ratio": (0, 1, False),
    "pred_ratio": (0, 1, True),
    "block_size": (1, math.inf, True),
    "theta": (0, math.inf, True),
    "decoder_dim": (4, math.inf, True),
    "decoder_depth": (1, math.inf, True),
    "decoder_heads": (1, math.inf, True),
    "decoder_mlp_ratio": (0, math.inf, False),
    "decode_ratio": (0, 1, True),
    "projector_depth": (1, math.inf, True),
    "epochs": (0, math.inf, False),
    "steps": (1, math.inf, True),
    "minutes": (0, math.inf, False),
    "batch_size": (1, math.inf, True),
    "accumulate": (1, math.inf, True),
    "blr": (0, math.inf, False),
    "weight_decay": (0, math.inf, True),
    "warmup": (0, 1, True),
    "clip_grad": (0, math.inf, False),
    "crop_scale": (0, 1, True),
    "std": (0, math.inf, False),
    "checkpoint_every": (1, math.inf, True),
    "log_every": (1, math.inf, True),
    "eval_every": (0, math.inf, True),
}


def _check_ranges(config: PretrainConfig) -> None:
    for name, (low, high, closed) in _RANGES.items():
        value = getattr(config, name)
        for v in value if isinstance(value, tuple) else (value,) if value is not None else ():
            inside = low <= v <= high if closed else low < v < high
            if not inside or not math.isfinite(v):
                if math.isinf(high):
                    words = f"{'at least' if closed else 'greater than'} {low:g}"
                else:
                    words = f"between {low:g} and {high:g}{'' if closed else ' (both excluded)'}"
                raise ValueError(f"{name} must be {words}, got {v}")
    for name, allowed in (("img_size", (1, 2)), ("crop_scale", (2,)), ("value_range", (2,))):
        value = getattr(config, name)
        if value is not None and len(value) not in allowed:
            raise ValueError(f"{name} takes {' or '.join(map(str, allowed))} numbers, got {len(value)}")
    for name in ("crop_scale", "value_range"):
        value = getattr(config, name)
        if value is not None and not (value[0] < value[1] or (name == "crop_scale" and 0 < value[0] <= value[1])):
            raise ValueError(f"{name} must rise from its first to its second number, got {value[0]} {value[1]}")


def resume_differences(old: PretrainConfig, new: PretrainConfig) -> list[str]:
    """Settings that may not change when a run is resumed but did, as "name: old -> new".

    What may change is marked ``resume`` in the fields above: workers, device, logging, cadence, tolerance of unreadable
    images, test data, and a duration in the same unit that is not shorter.
    """
    lines = []
    for field in dataclasses.fields(old):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if before == after:
            continue
        if field.name in DURATIONS:
            if before is None or after is None or after < before:
                lines.append(f"{field.name}: {before} -> {after} (a run may only become longer, in the same unit)")
        elif not field.metadata["resume"]:
            lines.append(f"{field.name}: {before} -> {after}")
    return lines
