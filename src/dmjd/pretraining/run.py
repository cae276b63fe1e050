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

from dmjd.config.checks import check_out
from dmjd.config.pretrain import PretrainConfig
from dmjd.config.strategies import FSDP, SHARDED
from dmjd.data.growth import Growth
from dmjd.data.sources.base import Source
from dmjd.data.sources.mixture import MixtureSource
from dmjd.data.train_loader import Batch, TrainLoader
from dmjd.data.unreadable import Report as UnreadableReport
from dmjd.encoders.headers import CHECKPOINTS, read_headers
from dmjd.engine.console import Console
from dmjd.engine.cooldown_signal import CooldownSignal
from dmjd.engine.device import SMALL_BLOCK, keep_freed_memory, make_fabric, precision_name
from dmjd.engine.layer_decay import encoder_groups
from dmjd.engine.loop import Duration, Engine, Hook, Task
from dmjd.engine.optim import OPTIMIZERS, ParameterGroup, parameter_groups, scaled_learning_rate
from dmjd.engine.processes import check_same, from_first, losses_explained
from dmjd.engine.sharding import WholeModel, is_sharded, shard, together
from dmjd.images.preprocess import Preprocess
from dmjd.interop.export import formats_of
from dmjd.model import MaskedImageModel
from dmjd.nn.modes import own_defaults
from dmjd.pretraining.batch_size import base_rate, resolve_batch_size
from dmjd.pretraining.callbacks import Monitor
from dmjd.pretraining.cooldown_now import branch_to_train
from dmjd.pretraining.enlarged import warn_enlarged
from dmjd.pretraining.growing import open_growth
from dmjd.pretraining.images import images_of_run, mean_source, resolve_preprocess, warn_of_other_ranges
from dmjd.pretraining.pace import few_steps_of_epochs
from dmjd.pretraining.schedule import check_schedule_fits, num_steps, schedule_of
from dmjd.pretraining.settings import check_settings, record_settings, resolve_paths
from dmjd.pretraining.shard_window import keep_recorded
from dmjd.runs.branches import start_branch, tidy_branch
from dmjd.runs.build import build_model
from dmjd.runs.checkpoint import PretrainState, RunFolder, newest_checkpoint
from dmjd.runs.driver import Driver
from dmjd.runs.start import Start, read_start

FEW_IMAGES = 64


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
@losses_explained()
def pretrain(config: PretrainConfig, *, model: MaskedImageModel | None = None, hooks: Sequence[Hook] = ()) -> RunResult:
    """Pre-train an encoder. Called again with the same ``out``, the run resumes where it stopped.

    On CPU an interrupted and resumed run ends with the same bits as an uninterrupted one. With ``cooldown_now`` the
    result is that of the branch; if a run under way was asked for it, that of the run so far, without metrics.

    Args:
        config: a configuration, e.g. ``dmjd.recipes.folder(data="images", out="runs/mine")``.
        model: model to train instead of ``dmjd.runs.build.build_model(config)``, e.g. of a subclass; it must have the
            same parameters, and not be trained yet.
        hooks: called in the first process after each step with :class:`~dmjd.engine.loop.Report`, not in training time.

    Returns:
        :class:`RunResult`. The encoder is in ``out``, for :func:`dmjd.load_encoder`.

    Raises:
        ValueError: if settings or data are invalid; raised before training.
        NonFiniteLoss: if training diverges; the last checkpoint is good.
        LostProcessError: if another process of the run ended or does not answer.
    """
    if config.cooldown_now:
        return cool_down_now(config, model)
    config, own_model = resolve_paths(config), model
    out = check_out("out", config.out)
    # 1. The model. Invalid settings raise before anything is written; a resumed run needs no weights to start from.
    config, start = read_start(keep_recorded(config, out), out, own_model=model is not None)
    model = build_model(config, start) if model is None else model
    # 2. Devices and processes.
    fabric = make_fabric(config.device, config.precision, strategy=config.strategy)
    console = Console(enabled=fabric.is_global_zero)
    check_settings(config, out, fabric, own_model=own_model is not None)
    # 3. The images.
    config, source, trained, held_out = images_of_run(config, out)
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
        growth = open_growth(config, source, trained, folder, checkpoint, console)
        monitor = Monitor(config, together(model, engine.whole), source, held_out, folder, console, growth)
        batches = batches_of(config, trained, engine, monitor.count_unreadable, growth)
        every, in_parts = config.checkpoint_every, config.checkpoint_type == SHARDED
        driver = Driver(engine, model, folder, console, batches, len(trained), every, monitor, hooks, in_parts=in_parts)
        driver.asked, driver.branch = asked, partial(branch_of, out, config, own_model)
        # 8. Restore everything from the checkpoint.
        driver.restore(checkpoint)
        log_summary(config, engine, source, model, console, start, resumed=checkpoint is not None)
        # 9. Train, evaluating and saving at intervals.
        finished = driver.run()
        # 10. Final figures and evaluation.
        unreadable = monitor.report_unreadable()
        evaluation = monitor.finish(engine.state) if finished else {}
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
    if config.grad_checkpointing or is_sharded(fabric):
        keep_freed_memory(fabric.device, up_to=SMALL_BLOCK)
    task = PretrainTask(model, model.encoder.preprocess)
    whole = WholeModel(model, fabric) if is_sharded(fabric) else None
    if whole is not None:
        shard(task, fabric, config.compile)  # before the optimizer, which holds the parameters
    return Engine(
        fabric=fabric,
        task=task,
        optimizer=OPTIMIZERS[config.optimizer](_parameter_groups(config, task)),
        duration=Duration(steps, config.minutes),
        peak_lr=scaled_learning_rate(base_rate(config, batch_size), batch_size, model.masks),
        schedule=schedule,
        warmup=config.warmup,
        warmup_steps=warmup_steps,
        batch_size=batch_size,
        accumulate=config.accumulate,
        clip_grad=config.clip_grad,
        seed=config.seed,
        log_every=config.log_every,
        compile=config.compile,
        whole=whole,
    )


def _parameter_groups(config: PretrainConfig, task: PretrainTask) -> list[ParameterGroup]:
    """Two groups; by layer if trained weights are to be treated with care."""
    if config.layer_decay == 1.0 and config.init_freeze == 0.0:
        return parameter_groups(task, config.weight_decay)
    return encoder_groups(task, task.model.encoder, config.weight_decay, config.layer_decay, config.init_freeze)


def batches_of(
    config: PretrainConfig,
    source: Source,
    engine: Engine,
    report: Callable[[list[UnreadableReport]], None],
    growth: Growth | None,
) -> Callable[[int], Generator[Batch, None, None]]:
    """Start step -> :func:`training_batches` of an engine, as many as it divides a step into now."""
    return lambda step: training_batches(
        config, source, engine.fabric, engine.batch_size, step, report, engine.accumulate, growth
    )


def training_batches(
    config: PretrainConfig,
    source: Source,
    fabric: Fabric,
    batch_size: int,
    start_step: int = 0,
    report: Callable[[list[UnreadableReport]], None] | None = None,
    accumulate: int | None = None,
    growth: Growth | None = None,
) -> Generator[Batch, None, None]:
    """This process's endless micro-batches from a step on; closing the generator ends its worker processes.

    A set that fits into memory is read before this returns. ``report`` gets (name, reason) of unreadable images;
    ``accumulate`` takes the place of the configured one; ``growth`` names the images that join.
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
        growth=growth,
    )
    if growth is not None:  # processes find new images together, as far ahead of training as their workers are
        check_same(loader.num_workers, "has --num-workers", "with --data-may-grow give all the same --num-workers")

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
        f"{config.in_chans}, {batch_size} a step, learning rate {engine.peak_lr:.2g} (--blr "
        f"{base_rate(config, batch_size):.2g})\n{each}"
        f"  encoder  {encoder.name}, width {encoder.embed_dim}, {encoder.depth} blocks, {parameters / 1e6:.1f} M "
        f"parameters, {encoder.num_patches} tokens, {model.counts[0]} visible in each of "
        f"{model.masks.num_views} view(s)\n{begin}"
        f"  exports  {', '.join(formats_of(encoder))} (dmjd export); features (dmjd embed)\n"
        f"  device   {fabric.device}, {precision_name(fabric)}, {fabric.world_size} process(es)"
        f"{f', {FSDP}: a part of the model in each' if is_sharded(fabric) else ''}"
    )
    warn_of_other_ranges(model, start, console)
    if config.strategy == FSDP and not is_sharded(fabric):
        console.warn("--strategy fsdp has no effect on one process, which holds the whole model; see torchrun and srun")
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
