"""The configuration of a pre-training run. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from dmjd.config.checks import (
    MAX_BATCH_SIZE,
    MAX_CHANNELS,
    MAX_COUNT,
    MAX_DEPTH,
    MAX_EPOCHS,
    MAX_FACTOR,
    MAX_HEADS,
    MAX_MINUTES,
    MAX_MLP_RATIO,
    MAX_SEED,
    MAX_SIDE,
    MAX_VIEWS,
    MAX_WIDTH,
    MAX_WORKERS,
)
from dmjd.config.fields import DEVICES, LABELS, PRECISIONS, Config, option
from dmjd.config.image_settings import check_image_settings
from dmjd.config.invalid import ALPHA_HELP, ALPHAS, BLENDED, NODATA_HELP, nodata_text
from dmjd.config.remote import cache_dir_option, cache_gb_option, shard_window_option
from dmjd.config.schedules import (
    DEFAULT_COOLDOWN,
    DEFAULT_WARMUP,
    DEFAULT_WARMUP_STEPS,
    check_schedule,
    schedule_option,
)
from dmjd.config.strategies import check_strategy, checkpoint_type_option, strategy_option
from dmjd.config.tokens import TOKEN_SETTINGS

FORMER_BATCH_SIZE = 256  # of runs of former versions that recorded none

DURATIONS = ("epochs", "steps", "minutes")

# Settings that name an encoder, and those of its input: with ``init`` they come from there unless they are given.
ENCODER_SETTINGS = ("encoder", "class_token", "embed_dim", "depth", "num_heads", "mlp_ratio")

INPUT_SETTINGS = ("img_size", "in_chans")
LEFT_TO_INIT = (*INPUT_SETTINGS, *ENCODER_SETTINGS, *TOKEN_SETTINGS)

RESOLVED = "resolved"  # group of settings that are no flags, because a run fills them in


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(Config):
    """Everything that defines a pre-training run. Paths are strings; None means the default named in the help text.

    ``replace(init=...)``, and so a recipe with ``init``, leaves encoder, sizes, image size and channels to the weights
    unless they are given too: ``from_init`` lists those that the run will fill in.

    Raises:
        ValueError: for invalid values, from the constructor; the message names the setting and the fix.
    """

    task: ClassVar[str] = "pretrain"

    recipe: str = option("dmjd", "recipe the run started from", "run")
    data: str | tuple[str, ...] | None = option(
        None,
        "folder of images (DICOM too), list (.txt .csv .tsv .jsonl .parquet), parquet, .tar or .zip file(s), set or "
        "hub name, or digits; several, each with a weight if you like: A B:0.3 draws 30 % of the samples from B",
        "data",
        resume=True,
        common=True,
    )
    data_may_grow: bool = option(
        False, "at each epoch, the images that are new in the folders and lists of --data join", "data", resume=True
    )
    out: str | None = option(None, "run folder", "run", resume=True, common=True)
    test_data: str | None = option(None, "labeled test set for kNN while training", "data", resume=True)
    labels: str = option(
        "none",
        "source of the labels for evaluation; pre-training never uses them",
        "data",
        choices=LABELS,
        resume=True,
    )
    label_column: str | None = option(None, "column of the labels, instead of label", "data", resume=True)
    path_column: str | None = option(None, "column of the paths in a list, instead of path", "data", resume=True)
    root: str | None = option(None, "folder that paths in a list are relative to; default its own", "data", resume=True)
    img_size: tuple[int, ...] = option(
        (224,),
        "image side in pixels, or height and width; with --init that of the weights",
        "data",
        common=True,
        ge=1,
        most=MAX_SIDE,
        length=(1, 2),
    )
    in_chans: int = option(
        3, "input channels of the encoder; with --init those of the weights", "data", ge=1, most=MAX_CHANNELS
    )
    mean: tuple[float, ...] | None = option(
        None,
        "mean per channel on the 0..1 scale; default ImageNet's for 3 channels, else measured",
        "data",
        ge=-MAX_FACTOR,
        most=MAX_FACTOR,
    )
    std: tuple[float, ...] | None = option(
        None, "standard deviation per channel; default as for mean", "data", ge=1e-6, most=MAX_FACTOR
    )
    value_range: tuple[float, ...] | None = option(
        None, "LOW HIGH mapped to 0..255; default the data type's own range", "data", length=(2,), ge=-1e30, le=1e30
    )
    nodata: str | None = option(None, NODATA_HELP, "data")
    alpha: str = option(BLENDED, ALPHA_HELP, "data", choices=ALPHAS)
    crop_scale: tuple[float, ...] = option(
        (0.5, 1.0), "range of the area of random crops, relative to the image", "data", ge=0, le=1, length=(2,)
    )
    flip: bool = option(True, "random left-right flips", "data")
    max_unreadable: float | None = option(
        None,
        "unreadable images to tolerate, or a share below 1; default 10 or 1 %; missing files of a list: 0",
        "data",
        resume=True,
        ge=0,
        most=MAX_COUNT,
    )
    cache_dir: str | None = cache_dir_option("data")
    cache_gb: float | None = cache_gb_option("data")
    shard_window: int | None = shard_window_option("data")
    held_out: int | None = option(
        None,
        "images that are not trained on, for the held-out loss; default 2 % of the set, at most 2000",
        "data",
        ge=0,
        most=MAX_COUNT,
    )
    num_workers: int | None = option(
        None, "data loading processes; default by the number of cores", "data", resume=True, ge=0, most=MAX_WORKERS
    )

    encoder: str = option(
        "conv_vit_base_patch16",
        "vit_* or conv_vit_*, tiny small base large, vit_* also huge giant; timm/NAME; with --init that of the weights",
        "encoder",
        common=True,
    )
    class_token: bool = option(False, "one prefix token (ViT; timm/NAME without one)", "encoder")
    drop_path: float = option(0.0, "stochastic depth rate of the last block", "encoder", ge=0, le=0.99)
    embed_dim: tuple[int, ...] | None = option(
        None, "width, three for ConvViT; default by name", "encoder", ge=4, most=MAX_WIDTH
    )
    depth: tuple[int, ...] | None = option(
        None, "number of blocks, three for ConvViT; default by name", "encoder", ge=1, most=MAX_DEPTH
    )
    num_heads: int | None = option(None, "attention heads; default by name", "encoder", ge=1, most=MAX_HEADS)
    mlp_ratio: tuple[float, ...] | None = option(
        None, "MLP ratio, three for ConvViT; default by name", "encoder", gt=0, most=MAX_MLP_RATIO
    )

    init: str | None = option(
        None,
        "weights to start from: a run, an encoder file, published weights, timm/NAME or a folder of transformers",
        "encoder",
        common=True,
    )
    from_init: tuple[str, ...] | None = option(
        None, "settings that the weights of init will give", RESOLVED, choices=LEFT_TO_INIT
    )
    init_hash: str | None = option(
        None, "refuse weights of another hash than this; a run records that of its --init here", "encoder"
    )
    init_fresh: tuple[str, ...] | None = option(
        None, "tensors that --init need not have, by the beginnings of their names; default none", "encoder"
    )
    init_decoder: bool = option(False, "take over the decoder of --init too", "encoder")

    target: str = option(
        "hog",
        "what is predicted of every patch: hog (edges), pixel, or features of a teacher or ema",
        "method",
        common=True,
    )
    mim_target: str | None = option(None, "what is predicted of masked patches; default --target", "method")
    vis_target: str | None = option(None, "what is predicted of visible patches; default --target", "method")
    hog_cell: int | None = option(
        None, "side of a HOG cell in pixels; default half the patch", "method", ge=1, most=MAX_SIDE
    )
    hog_bins: int = option(9, "orientations of a HOG cell", "method", ge=1, le=255)
    hog_color: bool = option(False, "add the mean color of a HOG cell, which edges do not know", "method")
    teacher: str | None = option(
        None, "target teacher: a run folder, an encoder file or timm/NAME", "method", resume=True
    )
    teacher_layers: int = option(1, "number of last teacher blocks to average", "method", ge=1, most=MAX_DEPTH)
    teacher_skip: int = option(
        0, "number of last teacher blocks to leave out: finer maps of a CNN", "method", ge=0, most=MAX_DEPTH
    )
    teacher_size: tuple[int, ...] | None = option(
        None,
        "side, or height and width, of the teacher's images; default its own; smaller is cheaper; 0 = the "
        "student's, or larger where the teacher's map would have few tokens",
        "method",
        ge=0,
        most=MAX_SIDE,
        length=(1, 2),
    )
    ema_layers: int | None = option(None, "target ema: last N blocks; default half", "method", ge=1, most=MAX_DEPTH)
    ema_momentum: float = option(
        0.996, "target ema: initial momentum; rises to 1 over the run (wsd: the cooldown)", "method", ge=0, le=1
    )
    ema_joined: bool = option(True, "target ema: every block is a target of its own, not their mean", "method")
    num_views: int = option(
        2, "times that an image is masked in a step: its views (K)", "method", common=True, ge=1, most=MAX_VIEWS
    )
    mask_ratio: float = option(0.6, "fraction of the tokens masked in each view (c)", "method", common=True, gt=0, lt=1)
    pred_ratio: float | None = option(
        None,
        "fraction of the tokens masked in at least one view (p); default the largest possible",
        "method",
        ge=0,
        le=1,
    )
    block_size: int | None = option(
        None,
        "side of a masking block in tokens; default 2 if it divides the grid, else 1",
        "method",
        ge=1,
        most=MAX_SIDE,
    )
    masks: str = option("disjoint", "masking strategy: disjoint, independent or complementary", "method")
    mim: bool = option(True, "learn from masked tokens: reconstruction, loss mim", "method")
    vis: bool = option(True, "learn from visible tokens: distillation, loss vis", "method")
    theta: float = option(1.0, "weight of the loss vis", "method", ge=0, most=MAX_FACTOR)
    mim_loss: str = option("l2", "kind of the loss mim", "method", choices=("l2", "smooth_l1"))
    vis_loss: str = option("smooth_l1", "kind of the loss vis", "method", choices=("l2", "smooth_l1"))
    decoder_dim: int | None = option(None, "decoder width; default by the encoder's", "method", ge=4, most=MAX_WIDTH)
    decoder_depth: int | None = option(
        None, "decoder blocks; default by the encoder's width", "method", ge=1, most=MAX_DEPTH
    )
    decoder_heads: int | None = option(
        None, "decoder heads; default by the encoder's width", "method", ge=1, most=MAX_HEADS
    )
    decoder_mlp_ratio: float | None = option(
        None, "decoder MLP ratio; default the encoder's first", "method", gt=0, most=MAX_MLP_RATIO
    )
    decode_ratio: float = option(
        1.0, "fraction of the masked tokens that are reconstructed, at random: a cheaper step", "method", ge=0, le=1
    )
    projector_depth: int = option(
        3, "linear layers of the distillation branch's projector", "method", ge=1, most=MAX_DEPTH
    )

    epochs: float | None = option(
        400.0, "length of the run in epochs", "training", resume=True, common=True, gt=0, most=MAX_EPOCHS
    )
    steps: int | None = option(
        None,
        "length of the run in steps, instead of epochs",
        "training",
        resume=True,
        common=True,
        ge=1,
        most=MAX_COUNT,
    )
    minutes: float | None = option(
        None,
        "length of the run in minutes; the schedule follows the clock",
        "training",
        resume=True,
        common=True,
        gt=0,
        most=MAX_MINUTES,
    )
    batch_size: int | None = option(
        None,
        "images per step over all processes; default 256, on a CPU 64 (32 for up to 10 minutes), but a tenth of a "
        "small set (at least 16)",
        "training",
        common=True,
        ge=1,
        most=MAX_BATCH_SIZE,
    )
    accumulate: int = option(
        1, "micro-batches per step: less memory, same result", "training", ge=1, most=MAX_BATCH_SIZE
    )
    blr: float | None = option(
        None,
        "base learning rate: lr = blr * batch / 256 * pred_ratio / mask_ratio (p / c); default 6e-4, below 512 "
        "images times sqrt(512 / batch); muon: 6e-3 * sqrt(256 / batch)",
        "training",
        common=True,
        gt=0,
        most=MAX_FACTOR,
    )
    optimizer: str = option("adamw", "muon: far fewer steps for short runs", "training", choices=("adamw", "muon"))
    weight_decay: float = option(0.05, "weight decay, not on biases and norms", "training", ge=0, most=MAX_FACTOR)
    schedule: str = schedule_option("training")
    warmup: float = option(DEFAULT_WARMUP, "fraction of the run with linear warm-up", "training", ge=0, le=1)
    warmup_steps: int | None = option(
        None,
        f"schedule wsd: steps with linear warm-up, instead of a fraction; default {DEFAULT_WARMUP_STEPS}",
        "training",
        ge=0,
        most=MAX_COUNT,
    )
    cooldown: float | None = option(
        None,
        f"schedule wsd: fraction of the run in which the learning rate falls to 0; default {DEFAULT_COOLDOWN}",
        "training",
        gt=0,
        lt=1,
    )
    layer_decay: float = option(
        1.0, "factor on the learning rate per encoder layer, from the last to the first", "training", gt=0, le=1
    )
    init_freeze: float = option(
        0.0,
        "fraction of the run in which only the branches train, so that they do not harm trained weights",
        "training",
        ge=0,
        lt=1,
    )
    clip_grad: float | None = option(None, "maximum gradient norm; default no clipping", "training", gt=0, most=1e9)
    seed: int = option(0, "seed of weights, order, crops and masks", "training", common=True, ge=-MAX_SEED, le=MAX_SEED)
    precision: str = option("auto", "auto: bf16 on GPUs that support it, else fp32", "machine", choices=PRECISIONS)
    device: str = option("auto", "device to train on", "machine", resume=True, common=True, choices=DEVICES)
    strategy: str = strategy_option("machine")
    checkpoint_type: str = checkpoint_type_option("machine")
    compile: bool = option(False, "torch.compile the model", "machine")
    grad_checkpointing: bool = option(False, "recompute activations: less memory, slower", "machine", resume=True)

    resume: bool = option(
        True, "resume the run in --out; --no-resume refuses a folder that holds one", "run", resume=True
    )
    cooldown_now: bool = option(
        False,
        "schedule wsd: make a finished encoder of the run in --out as it is now, in its folder branches",
        "run",
        resume=True,
    )
    checkpoint_every: int = option(500, "steps between checkpoints", "run", resume=True, ge=1, most=MAX_COUNT)
    log_every: int = option(20, "steps between lines of metrics.jsonl", "run", resume=True, ge=1, most=MAX_COUNT)
    eval_every: int | None = option(
        None,
        "steps between figures and online kNN; default ten times a run (wsd: after a quarter more steps); 0: never",
        "run",
        resume=True,
        ge=0,
        most=MAX_COUNT,
    )
    final_eval: bool = option(True, "kNN and linear probe at the end if there are labels", "run", resume=True)
    report: bool = option(True, "write report.html at the end (extra dmjd[report])", "run", resume=True)
    wandb: bool = option(False, "log to Weights & Biases too (extra dmjd[wandb])", "run", resume=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodata", nodata_text(self.nodata))
        super().__post_init__()
        given = [name for name in DURATIONS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of --epochs, --steps, --minutes, got {' and '.join(given) or 'none'}")
        if self.accumulate > 1 and self.batch_size is not None and self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not divisible by accumulate {self.accumulate}")
        check_image_settings(self)
        if not (self.mim or self.vis):
            raise ValueError("both branches are off: leave --mim or --vis on")
        if self.init is None and (self.init_hash or self.init_fresh or self.init_decoder or self.from_init):
            raise ValueError("init_hash, init_fresh, init_decoder (--init-decoder, ...) and from_init need --init")
        check_schedule(self.schedule, self.warmup, self.warmup_steps, self.cooldown, self.init_freeze)
        check_strategy(self.strategy, self.checkpoint_type, self.precision)
        if self.teacher is not None and "teacher" not in self.branch_targets.values():
            raise ValueError("--teacher has no use without target 'teacher' (--target, --mim-target or --vis-target)")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the encoder's input."""
        return (self.img_size[0], self.img_size[-1])

    @property
    def branch_targets(self) -> dict[str, str]:
        """Active branch, "mim" or "vis" -> name of its target."""
        own = {"mim": self.mim_target, "vis": self.vis_target}
        return {branch: name or self.target for branch, name in own.items() if getattr(self, branch)}

    def replace(self, **changes: Any) -> Self:
        """A copy with changes. A new duration replaces the old one; a first ``init`` replaces what it determines."""
        if any(changes.get(name) is not None for name in DURATIONS):
            changes = dict.fromkeys(DURATIONS) | changes
        left = self.from_init or ()
        if changes.get("init") is not None and self.init is None:
            left = INPUT_SETTINGS if "encoder" in changes else (*ENCODER_SETTINGS, *INPUT_SETTINGS)
        return super().replace(**{"from_init": tuple(n for n in left if n not in changes) or None} | changes)

    @classmethod
    def from_former(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Former names, such as ``disjoint`` instead of ``masks``, and the form that the target ``ema`` had."""
        settings = super().from_former(values)
        if settings.get("recipe") == "adapt" or "ema" in map(settings.get, ("target", "mim_target", "vis_target")):
            settings.setdefault("ema_joined", False)
        if "disjoint" in settings:
            settings["masks"] = "disjoint" if settings.pop("disjoint") else "independent"
        return settings
