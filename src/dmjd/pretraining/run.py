"""``pretrain(config)``: the ten steps of a pre-training run, in order."""

import copy
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric
from torch import Tensor

from dmjd.checked_json import check_json
from dmjd.config.checks import check_out
from dmjd.config.pretrain import PretrainConfig
from dmjd.config.sources import data_text
from dmjd.data.recheck import check_moved
from dmjd.data.sources.base import Source
from dmjd.data.sources.mixture import MixtureSource
from dmjd.data.statistics import measure_stats, range_warning, typical_size
from dmjd.data.train_loader import Batch, TrainLoader
from dmjd.data.unreadable import Report as UnreadableReport
from dmjd.encoders.headers import CHECKPOINTS, has_checkpoint, read_headers
from dmjd.engine.console import Console
from dmjd.engine.cooldown_signal import CooldownSignal
from dmjd.engine.device import SMALL_BLOCK, keep_freed_memory, make_fabric, precision_name
from dmjd.engine.layer_decay import encoder_groups
from dmjd.engine.loop import Duration, Engine, Hook, Task
from dmjd.engine.optim import OPTIMIZERS, ParameterGroup, parameter_groups, scaled_learning_rate
from dmjd.engine.processes import check_same, from_first, num_processes
from dmjd.images.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from dmjd.interop.export import formats_of
from dmjd.model import MaskedImageModel
from dmjd.nn.modes import own_defaults
from dmjd.pretraining.batch_size import resolve_batch_size
from dmjd.pretraining.callbacks import Monitor, began_with
from dmjd.pretraining.cooldown_now import branch_to_train
from dmjd.pretraining.held_out import hold_out
from dmjd.pretraining.pace import few_steps_of_epochs
from dmjd.pretraining.schedule import check_schedule_fits, num_steps, schedule_of
from dmjd.pretraining.settings import check_settings, record_settings, resolve_paths
from dmjd.pretraining.shard_window import keep_recorded, record_window
from dmjd.runs.branches import start_branch, tidy_branch
from dmjd.runs.build import LISTING, build_model, open_data
from dmjd.runs.checkpoint import Checkpoint, PretrainState, RunFolder, read_config_of
from dmjd.runs.driver import Driver, newest_checkpoint
from dmjd.runs.start import Start, read_start

FEW_IMAGES = 64

ENLARGED = 4  # warn if the input has more than this many times the pixels of an image


@dataclass(frozen=True)
class RunResult:
    """Result of a run.

    Attributes:
        path: the run folder.
        step: optimizer steps done.
        finished: False after a stop by a signal.
        metrics: the scalars of the last logged step.
        evaluation: task -> the content of ``evaluation/<task>.json``.
        unreadable: (name, reason) of the images that could not be read.
    """

    path: Path
    step: int
    finished: bool
    metrics: dict[str, Any]
    evaluation: dict[str, dict[str, Any]] = field(default_factory=dict)
    unreadable: tuple[tuple[str, str], ...] = ()


@own_defaults()
def pretrain(config: PretrainConfig, *, model: MaskedImageModel | None = None, hooks: Sequence[Hook] = ()) -> RunResult:
    """Pre-train an encoder. Called again with the same ``out``, the run resumes where it stopped.

    On CPU an interrupted and resumed run ends with the same bits as an uninterrupted one. With ``cooldown_now`` the
    result is that of the branch; if a run under way was asked for it, that of the run so far, without metrics.

    Args:
        config: a configuration, e.g. ``dmjd.recipes.folder(data="images", out="runs/mine")``.
        model: model to train instead of ``dmjd.runs.build.build_model(config)``, e.g. of a subclass; it must have the
            same parameters, and not be trained yet.
        hooks: called in the first process after every step with :class:`~dmjd.engine.loop.Report`; their time does not
            count as training time.

    Returns:
        :class:`RunResult`. The encoder is in ``out``, for :func:`dmjd.load_encoder`.

    Raises:
        ValueError: if settings or data are invalid; raised before training.
        NonFiniteLoss: if training diverges; the last checkpoint is good.
    """
    if config.cooldown_now:
        return cool_down_now(config, model)
    config, own_model = resolve_paths(config), model
    out = check_out("out", config.out)
    # 1. The model. Invalid settings raise before anything is written; a resumed run needs no weights to start from.
    config, start = read_start(keep_recorded(config, out), out, own_model=model is not None)
    model = build_model(config, start) if model is None else model
    # 2. Devices and processes.
    fabric = make_fabric(config.device, config.precision)
    console = Console(enabled=fabric.is_global_zero)
    check_settings(config, out, fabric)
    # 3. The images.
    source = same_images(training_images(config, out))
    config, trained, held_out = hold_out(record_window(config, source), source)
    config, batch_size = resolve_batch_size(config, len(trained), fabric.world_size, fabric.device)
    check_schedule_fits(config, num_steps(config, len(trained), batch_size))
    # 4. The run folder, locked by the first process.
    with CooldownSignal() as asked, closing(RunFolder(out, fabric.is_global_zero)) as folder, closing(console):
        record_settings(folder, config, source, start, console)
        fabric.barrier()
        # 5. The newest checkpoint, if the run was started before.
        checkpoint = newest_checkpoint(folder, console, PretrainState)
        # 6. Preprocessing, which is saved with the weights.
        model.encoder.preprocess = resolve_preprocess(config, source, checkpoint, console, start)
        # 7. Optimizer, schedule and loop, the stream of batches, and the driver around them.
        engine = make_engine(config, model, fabric, batch_size, len(trained))
        monitor = Monitor(config, model, source, held_out, folder, console)
        batches = batches_of(config, trained, engine, monitor.count_unreadable)
        driver = Driver(engine, model, folder, console, batches, len(trained), config.checkpoint_every, monitor, hooks)
        driver.asked, driver.branch = asked, partial(branch_of, out, config, own_model)
        # 8. Restore everything from the checkpoint.
        driver.restore(checkpoint)
        log_summary(config, engine, source, model, console, start, resumed=checkpoint is not None)
        # 9. Train, evaluating and saving at intervals.
        finished = driver.run()
        # 10. Final figures and evaluation.
        monitor.report_unreadable()
        evaluation = monitor.finish(engine.state) if finished else {}
    unreadable = tuple(monitor.unreadable.reports)
    return RunResult(folder.path, engine.state.step, finished, driver.metrics, evaluation, unreadable)


def cool_down_now(config: PretrainConfig, model: MaskedImageModel | None) -> RunResult:
    """:func:`pretrain` with ``cooldown_now``."""
    branch = branch_to_train(config, has_model=model is not None)
    if branch is not None:
        return train_branch(branch, model)
    out = check_out("out", config.out)
    headers, _ = read_headers(out / CHECKPOINTS)
    return RunResult(out, headers[0].step if headers else 0, finished=False, metrics={})


def branch_of(out: Path, config: PretrainConfig, model: MaskedImageModel | None) -> Callable[[], bool]:
    """Prepare a branch of the run in ``out``; returns what trains it, and whether it was finished."""
    branch = from_first(lambda: start_branch(out, config))
    return lambda: train_branch(branch, model).finished


def train_branch(branch: PretrainConfig, model: MaskedImageModel | None) -> RunResult:
    """Train a branch to its end, in the processes that call this; ``model`` is the caller's own, if there is one, and
    is copied.
    """
    result = pretrain(branch, model=copy.deepcopy(model))
    if result.finished:
        from_first(lambda: tidy_branch(result.path))
    return result


def training_images(config: PretrainConfig, out: Path) -> Source:
    """Open the images. If ``data`` is not that of the run in ``out``, they must be the same at another path.

    The sorted list of a folder is stored with the run, and read from there once it has a checkpoint.

    Raises:
        ValueError: if they cannot be opened, are others, or there is no checkpoint that says which they were.
    """
    assert config.data is not None
    listing = out / LISTING if has_checkpoint(out) else None
    source = open_data(config, config.data, "train", listing, fetch_ahead=True)
    old = read_config_of(out)
    if old is None or old.data is None or old.data == config.data:
        return source
    headers, _ = read_headers(out / CHECKPOINTS)
    former = data_text(old.data)
    if not headers:
        raise ValueError(
            f"{out} began with --data {former} and has no checkpoint yet that its images could be compared with; "
            "give the same path, or another --out"
        )
    began, reports = began_with(check_json(headers[0].metadata, PretrainState, str(headers[0].path)), config)
    check_moved(source, began, reports, former)
    return source


def same_images(source: Source) -> Source:
    """The images, if all processes have the same ones; ValueError if not."""
    if num_processes() > 1:
        cure = "all machines need the same images under the same path"
        check_same(f"{len(source)} images ({source.fingerprint()})", "sees", cure)
    return source


def resolve_preprocess(
    config: PretrainConfig,
    source: Source,
    checkpoint: Checkpoint | None,
    console: Console,
    start: Start | None = None,
) -> Preprocess:
    """The checkpoint's preprocessing; else the first that there is: the configured mean and std, those of the weights
    it starts from, ImageNet's (3 channels), measured ones. The size is always the configured one.
    """
    if checkpoint is not None:
        return checkpoint.preprocess()
    mean, std = config.mean, config.std
    theirs = start.weights.preprocess if start is not None else None
    if mean is None and theirs is not None and theirs.in_chans == config.in_chans:
        mean, std = theirs.mean, theirs.std
    if mean is not None and std is not None:
        warning = range_warning(source)
    elif config.in_chans == 3:
        mean, std, warning = IMAGENET_MEAN, IMAGENET_STD, range_warning(source)
    else:
        mean, std, warning = measure_stats(source)
    if warning is not None:
        console.warn(warning)
    value_range = (config.value_range[0], config.value_range[1]) if config.value_range is not None else None
    return Preprocess(config.size, config.in_chans, mean, std, value_range)


class PretrainTask(Task):
    """Normalizes a batch on its device and runs the model on it."""

    def __init__(self, model: MaskedImageModel, preprocess: Preprocess) -> None:
        super().__init__()
        self.model = model
        self.preprocess = preprocess

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """{"loss", "mim", "vis"}, scalars."""
        return self.model(self.preprocess.normalize(batch.images), batch.images, keys=batch.keys)

    def after_step(self, step: int, progress: float) -> None:
        """Update targets that follow the encoder."""
        self.model.after_step(step, progress)


def make_engine(
    config: PretrainConfig, model: MaskedImageModel, fabric: Fabric, batch_size: int, num_images: int
) -> Engine:
    """The training loop of a configuration, for a model whose encoder has its preprocessing."""
    steps = num_steps(config, num_images, batch_size)
    schedule, warmup_steps = schedule_of(config, steps)
    assert model.encoder.preprocess is not None
    model.set_grad_checkpointing(config.grad_checkpointing)
    if config.grad_checkpointing:
        keep_freed_memory(fabric.device, up_to=SMALL_BLOCK)
    task = PretrainTask(model, model.encoder.preprocess)
    return Engine(
        fabric=fabric,
        task=task,
        optimizer=OPTIMIZERS[config.optimizer](_parameter_groups(config, task)),
        duration=Duration(steps, config.minutes),
        peak_lr=scaled_learning_rate(config.blr, batch_size, model.masks),
        schedule=schedule,
        warmup=config.warmup,
        warmup_steps=warmup_steps,
        batch_size=batch_size,
        accumulate=config.accumulate,
        clip_grad=config.clip_grad,
        seed=config.seed,
        log_every=config.log_every,
        compile=config.compile,
    )


def _parameter_groups(config: PretrainConfig, task: PretrainTask) -> list[ParameterGroup]:
    """Two groups; by layer if trained weights are to be treated with care."""
    if config.layer_decay == 1.0 and config.init_freeze == 0.0:
        return parameter_groups(task, config.weight_decay)
    return encoder_groups(task, task.model.encoder, config.weight_decay, config.layer_decay, config.init_freeze)


def batches_of(
    config: PretrainConfig, source: Source, engine: Engine, report: Callable[[list[UnreadableReport]], None]
) -> Callable[[int], Generator[Batch, None, None]]:
    """Start step -> :func:`training_batches` of an engine, as many as it divides a step into now."""
    return lambda step: training_batches(
        config, source, engine.fabric, engine.batch_size, step, report, engine.accumulate
    )


def training_batches(
    config: PretrainConfig,
    source: Source,
    fabric: Fabric,
    batch_size: int,
    start_step: int = 0,
    report: Callable[[list[UnreadableReport]], None] | None = None,
    accumulate: int | None = None,
) -> Generator[Batch, None, None]:
    """This process's endless micro-batches from a step on; closing the generator ends its worker processes.

    A set that fits into memory is read before this returns. ``report`` gets (name, reason) of unreadable images;
    ``accumulate`` takes the place of the configured one.
    """
    loader = TrainLoader(
        source,
        img_size=config.size,
        batch_size=batch_size,
        accumulate=accumulate or config.accumulate,
        seed=config.seed,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        num_workers=config.num_workers,
        crop_scale=(config.crop_scale[0], config.crop_scale[1]),
        flip=config.flip,
        device=fabric.device,
    )

    def batches() -> Generator[Batch, None, None]:
        if report is not None:
            report(loader.unreadable)
        for batch in loader.batches(start_step):
            if report is not None:
                report(batch.unreadable)
            yield batch

    return batches()


def log_summary(
    config: PretrainConfig,
    engine: Engine,
    source: Source,
    model: MaskedImageModel,
    console: Console,
    start: Start | None,
    resumed: bool,
) -> None:
    """Print data, encoder and device of the run, and warn about settings that are likely mistakes."""
    encoder, fabric, batch_size = model.encoder, engine.fabric, engine.batch_size
    begin = f"  init     {start}\n           {mean_source(config, start)}\n" if start is not None else ""
    parameters = sum(p.numel() for p in encoder.parameters())
    lines = source.lines() if isinstance(source, MixtureSource) else []
    data_line, each = f"{len(lines)} sets" if lines else source.title, "".join(f"           {line}\n" for line in lines)
    held = f", {config.held_out} of them held out," if config.held_out else ""
    console.say(
        f"{f'resumed at step {engine.state.step}' if resumed else 'started'}: {config.out}\n"
        f"  data     {data_line}: {len(source)} images{held} -> {config.size[0]} x {config.size[1]} x "
        f"{config.in_chans}, {batch_size} a step\n{each}"
        f"  encoder  {encoder.name}, {parameters / 1e6:.1f} M parameters, {encoder.num_patches} tokens, "
        f"{model.counts[0]} visible in each of {model.masks.num_views} view(s)\n{begin}"
        f"  exports  {', '.join(formats_of(encoder))} (dmjd export); features (dmjd embed)\n"
        f"  device   {fabric.device}, {precision_name(fabric)}, {fabric.world_size} process(es)"
    )
    if len(source) < FEW_IMAGES:
        console.warn(f"only {len(source)} image(s): the encoder will hardly generalize beyond them")
    if (config.batch_size or 0) > batch_size:
        console.warn(
            f"batch size {config.batch_size} (the recipe's unless you gave one) exceeds the number of images: "
            f"{batch_size} per step"
        )
    if (few := few_steps_of_epochs(config.epochs, engine.duration.steps)) is not None:
        console.warn(few)
    if not resumed and fabric.is_global_zero:
        warn_enlarged(config, source, console)
    if engine.progress >= 1.0:
        console.say("the run is finished; give a longer duration to continue it")


def mean_source(config: PretrainConfig, start: Start) -> str:
    """A line about what comes from the weights that a run starts from: mean and std, and settings left to them."""
    theirs = start.weights.preprocess
    if config.mean is not None:
        origin = "as given"
    elif theirs is not None and theirs.in_chans == config.in_chans:
        origin = "of the weights"
    else:
        known = "the weights have none" if theirs is None else f"the weights are for {theirs.in_chans} channels"
        origin = f"ImageNet's ({known})" if config.in_chans == 3 else f"measured ({known})"
    words = {"encoder": "encoder", "img_size": "image size", "in_chans": "channels"}
    left = ", ".join(word for name, word in words.items() if name in start.settings)
    return f"mean and std {origin}" + (f"; {left} of the weights" if left else "")


def warn_enlarged(config: PretrainConfig, source: Source, console: Console) -> None:
    """Warn if images are much smaller than the input: each step costs more, but enlarging adds no detail."""
    (H, W), (h, w) = config.size, typical_size(source) or config.size
    times = H * W / (h * w)
    if times > ENLARGED:
        console.warn(
            f"images of about {h} x {w} are enlarged to {H} x {W}: a step works on {times:.0f} times the pixels "
            "they have; --img-size sets the side"
        )
