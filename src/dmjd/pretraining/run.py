"""``pretrain(config)``: builds the parts of a run in order and hands them to the engine."""

import json
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric
from torch import Tensor

from dmjd.config.pretrain import DEFAULT_BATCH_SIZE, PretrainConfig
from dmjd.data.sources.base import Source
from dmjd.data.sources.registry import absolute
from dmjd.data.statistics import measure_stats, typical_size
from dmjd.data.train_loader import Batch, TrainLoader
from dmjd.data.unreadable import UnreadableImages
from dmjd.encoders.weights import ENCODER_FILE, encoder_bytes, encoder_metadata
from dmjd.engine.console import Console
from dmjd.engine.device import SMALL_BLOCK, keep_freed_memory, make_fabric
from dmjd.engine.loop import Duration, Engine, Hook, Report, StopSignal, Task
from dmjd.engine.optim import OPTIMIZERS, scaled_learning_rate, warmup_cosine
from dmjd.files import write_bytes, write_text
from dmjd.images.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from dmjd.model import MaskedImageModel
from dmjd.pretraining.callbacks import Monitor
from dmjd.runs.build import LISTING, build_model, open_data
from dmjd.runs.checkpoint import Checkpoint, RunFolder, load_optimizer_tensors, optimizer_tensors

FEW_IMAGES = 64

ENLARGED = 4  # times the pixels from which a run says that its images are smaller than its input


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Attributes:
        path: the run folder. step: optimizer steps done. finished: False after a stop by signal.
        metrics: the last line of ``metrics.jsonl``. evaluation: task -> the dict of ``evaluation/<task>.json``.
        bad: (name, reason) of the images that could not be read.
    """

    path: Path
    step: int
    finished: bool
    metrics: dict[str, Any]
    evaluation: dict[str, dict[str, Any]] = field(default_factory=dict)
    unreadable: tuple[tuple[str, str], ...] = ()


class PretrainTask(Task):
    """Normalizes a batch on its device and runs the model on it."""

    def __init__(self, model: MaskedImageModel, preprocess: Preprocess) -> None:
        super().__init__()
        self.model = model
        self.preprocess = preprocess

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """{"loss", "mim", "vis"}."""
        return self.model(self.preprocess.normalize(batch.images), batch.images, keys=batch.keys)

    def after_step(self, step: int, progress: float) -> None:
        """Let targets follow the encoder."""
        self.model.after_step(step, progress)


def pretrain(config: PretrainConfig, *, model: MaskedImageModel | None = None, hooks: Sequence[Hook] = ()) -> RunResult:
    """Pre-train an encoder; started again with the same ``out``, go on where it stopped.

    On CPU a run that was interrupted and resumed ends with the same bits as one that was not.

    Args:
        config: from a recipe, e.g. ``dmjd.recipes.folder(data="images", out="runs/mine")``.
        model: trained in place of the one that ``dmjd.runs.build.build_model(config)`` makes, e.g. of a subclass;
            fresh, with the same parameters.
        hooks: called in the first process after every step, with :class:`~dmjd.engine.loop.Report`; their time is not
            training time.

    Returns:
        :class:`RunResult`; the encoder is in ``out`` for :func:`dmjd.load_encoder`.

    Raises:
        ValueError: for anything the caller can mend, before long work starts.
        NonFiniteLoss: when training diverges; the last checkpoint is good.
    """
    if config.data is None:
        raise ValueError("say what to train on: --data FOLDER (or a .parquet file, a set name, digits)")
    if config.out is None:
        raise ValueError("say where the run goes: --out DIR")
    # 1. the model: settings that cannot be are found before anything is touched
    model = build_model(config) if model is None else model
    # 2. devices and processes
    fabric = make_fabric(config.device, config.precision)
    console = Console(enabled=fabric.is_global_zero)
    # 3. images; the sorted list of a folder is kept with the run and read from there on resume
    places = {name: getattr(config, name) for name in ("data", "test_data", "teacher")}
    config = config.replace(**{name: absolute(value) for name, value in places.items() if value is not None})
    assert config.data is not None
    assert config.out is not None
    out = Path(config.out).expanduser()
    source = open_data(config, config.data, "train", listing=out / LISTING)
    batch_size = resolve_batch_size(config, len(source), fabric.world_size)
    # 4. the run folder, owned by the first process
    folder = RunFolder(out, owner=fabric.is_global_zero)
    try:
        if folder.owner:
            folder.settle(config)
            source.save_listing(out / LISTING)
        fabric.barrier()
        return _Run(config, model, fabric, console, source, batch_size, folder, hooks).run()
    finally:
        console.close()
        folder.close()


def resolve_batch_size(config: PretrainConfig, num_images: int, world_size: int) -> int:
    """B: the given one or 256, no larger than the set; a multiple of processes times accumulation.

    Raises:
        ValueError: more processes than images, or a given size that cannot be shared out.
    """
    parts = world_size * config.accumulate
    shares = f"{world_size} process(es) x --accumulate {config.accumulate}"
    if num_images < parts:
        raise ValueError(f"{num_images} image(s) cannot be shared out to {shares}; use fewer")
    batch_size = config.batch_size or DEFAULT_BATCH_SIZE
    if config.batch_size is None or batch_size > num_images:
        batch_size = min(batch_size, num_images) // parts * parts
    if batch_size == 0 or batch_size % parts:
        raise ValueError(
            f"--batch-size {batch_size} cannot be shared out to {shares}: it must be a multiple of {parts}"
        )
    return batch_size


def make_engine(
    config: PretrainConfig, model: MaskedImageModel, fabric: Fabric, batch_size: int, num_images: int
) -> Engine:
    """The training loop of a configuration around a model whose encoder knows its preprocessing."""
    steps = config.steps
    if config.epochs is not None:
        steps = math.ceil(config.epochs * num_images / batch_size)
    assert model.encoder.preprocess is not None
    model.set_grad_checkpointing(config.grad_checkpointing)
    if config.grad_checkpointing:
        keep_freed_memory(fabric.device, up_to=SMALL_BLOCK)
    task = PretrainTask(model, model.encoder.preprocess)
    return Engine(
        fabric=fabric,
        task=task,
        optimizer=OPTIMIZERS[config.optimizer](task, config.weight_decay),
        duration=Duration(steps, config.minutes),
        peak_lr=scaled_learning_rate(config.blr, batch_size, model.masks),
        schedule=partial(warmup_cosine, warmup=config.warmup),
        batch_size=batch_size,
        accumulate=config.accumulate,
        clip_grad=config.clip_grad,
        seed=config.seed,
        log_every=config.log_every,
        compile=config.compile,
    )


def make_loader(config: PretrainConfig, source: Source, fabric: Fabric, batch_size: int) -> TrainLoader:
    """This process's part of the training images."""
    return TrainLoader(
        source,
        img_size=config.size,
        batch_size=batch_size,
        accumulate=config.accumulate,
        seed=config.seed,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        num_workers=config.num_workers,
        crop_scale=(config.crop_scale[0], config.crop_scale[1]),
        flip=config.flip,
        device=fabric.device,
    )


class _Run:
    """The parts of one run; :meth:`run` is the reading order."""

    def __init__(
        self,
        config: PretrainConfig,
        model: MaskedImageModel,
        fabric: Fabric,
        console: Console,
        source: Source,
        batch_size: int,
        folder: RunFolder,
        hooks: Sequence[Hook],
    ) -> None:
        self.config, self.model, self.fabric, self.console = config, model, fabric, console
        self.source, self.batch_size, self.folder, self.hooks = source, batch_size, folder, hooks
        self.unreadable = UnreadableImages()
        self.fingerprint = source.fingerprint()
        self.monitor = Monitor(config, model, source, folder, console)

    def run(self) -> RunResult:
        """Steps 5 to 10 of :func:`pretrain`."""
        config = self.config
        # 5. the newest checkpoint, if the run was here before
        checkpoint, problems = self.folder.newest()
        for problem in problems:
            self.console.warn(f"{problem}; going on from an older one")
        # 6. preprocessing, which travels with the weights
        self.model.encoder.preprocess = self._preprocess(checkpoint)
        # 7. optimizer, schedule, engine
        engine = self.engine = make_engine(config, self.model, self.fabric, self.batch_size, len(self.source))
        if checkpoint is not None:
            self._restore(checkpoint)
        self._greet(checkpoint)
        finished = engine.duration.progress(engine.state) >= 1.0
        if finished:
            self.console.say("the run is finished; a longer duration would go on with it")
        else:
            # 8. the stream of batches from the very step, 9. the loop
            finished = self._train()
        # 10. a verdict and images
        evaluations = self.monitor.finish() if finished and self.fabric.is_global_zero else {}
        self._report_bad()
        self.fabric.barrier()
        return RunResult(
            self.folder.path,
            engine.state.step,
            finished,
            self.monitor.metrics,
            evaluations,
            tuple(self.unreadable.reports),
        )

    def _preprocess(self, checkpoint: Checkpoint | None) -> Preprocess:
        """The checkpoint's, else by the configuration, else ImageNet's statistics or measured ones."""
        config = self.config
        if checkpoint is not None:
            return Preprocess.from_dict(checkpoint.state["encoder"]["preprocess"])
        mean, std = config.mean, config.std
        if mean is None or std is None:
            if config.in_chans == 3:
                mean, std = IMAGENET_MEAN, IMAGENET_STD
            else:
                mean, std, warning = measure_stats(self.source)
                if warning is not None:
                    self.console.warn(warning)
        span = (config.value_range[0], config.value_range[1]) if config.value_range is not None else None
        return Preprocess(config.size, config.in_chans, mean, std, span)

    def _restore(self, checkpoint: Checkpoint) -> None:
        if checkpoint.state["data"] != self.fingerprint:
            raise ValueError(f"the images in {self.config.data} are not those this run began with; give another --out")
        self.model.load_state_dict(checkpoint.part("model"))
        load_optimizer_tensors(self.engine.optimizer, checkpoint.part("optimizer"))
        self.engine.load_state_dict(checkpoint.state)
        self.unreadable.add([(name, reason) for name, reason in checkpoint.state["bad"]])
        if self.folder.owner:
            self.folder.cut_metrics(self.engine.state.step)

    def _greet(self, checkpoint: Checkpoint | None) -> None:
        config, encoder = self.config, self.model.encoder
        parameters = sum(p.numel() for p in encoder.parameters())
        verb = f"resumed at step {self.engine.state.step}" if checkpoint is not None else "started"
        self.console.say(
            f"{verb}: {config.out}\n"
            f"  data     {self.source.name}: {len(self.source)} images -> {config.size[0]} x {config.size[1]} x "
            f"{config.in_chans}, {self.batch_size} a step\n"
            f"  encoder  {encoder.name}, {parameters / 1e6:.1f} M parameters, {encoder.num_patches} tokens, "
            f"{self.model.counts[0]} visible in each of {self.model.masks.num_views} view(s)\n"
            f"  device   {self.fabric.device}, {self.fabric._precision.precision}, {self.fabric.world_size} process(es)"
        )
        if len(self.source) < FEW_IMAGES:
            self.console.warn(f"only {len(self.source)} image(s): the encoder will know little beyond them")
        if (config.batch_size or 0) > self.batch_size:
            self.console.warn(f"--batch-size {config.batch_size} is more than there are: {self.batch_size} a step")
        if checkpoint is None and self.folder.owner:
            self._warn_enlarged()

    def _warn_enlarged(self) -> None:
        """A step on enlarged images costs many times as much and shows nothing more."""
        size = typical_size(self.source)
        (H, W), (h, w) = self.config.size, size or self.config.size
        times = H * W / (h * w)
        if times > ENLARGED:
            self.console.warn(
                f"images of about {h} x {w} are enlarged to {H} x {W}: a step works on {times:.0f} times the pixels "
                "they have; --img-size sets the side"
            )

    def _train(self) -> bool:
        loader = make_loader(self.config, self.source, self.fabric, self.batch_size)
        hooks: list[Hook] = []
        if self.folder.owner:  # one process writes, looks and saves
            self.monitor.open(self.engine.state.step, self.engine.duration.progress(self.engine.state))
            hooks = [self.monitor.log, self._look, self._save, *self.hooks]
        with StopSignal() as stop:
            batches = self._watched(loader)
            try:
                finished = self.engine.run(batches, hooks, stop)
            finally:
                batches.close()  # ends the loader's processes
                self.monitor.close()
        if self.folder.owner:
            self._checkpoint(final=finished)
        if not finished:
            step = self.engine.state.step
            self.console.say(f"stopped at step {step}, checkpoint saved; the same command goes on from there")
        return finished

    def _watched(self, loader: TrainLoader) -> Generator[Batch, None, None]:
        """Batches, while unreadable images are named once and counted; too many stop the run."""
        self._count_bad(loader.unreadable)
        for batch in loader.batches(self.engine.state.step):
            self._count_bad(batch.unreadable)
            yield batch

    def _count_bad(self, reports: list[tuple[str, str]]) -> None:
        for name, reason in self.unreadable.add(reports):
            self.console.warn(f"unreadable, another image takes its place: {name}: {reason}")
        self.unreadable.check(self.config.max_unreadable, len(self.source))

    def _look(self, report: Report) -> None:
        """Images and online kNN where they are due; the last look is left to the end of the run."""
        if report.progress < 1.0 and self.monitor.due(report):
            self.engine.check_finite()
            self.monitor.look(report)

    def _save(self, report: Report) -> None:
        if report.state.step % self.config.checkpoint_every == 0 and report.progress < 1.0:
            self._checkpoint()

    def _checkpoint(self, final: bool = False) -> None:
        """Write the whole state, and the encoder beside it; never when the weights may be spoilt."""
        self.engine.check_finite()
        encoder = self.model.encoder
        tensors = {f"model.{key}": value for key, value in self.model.state_dict().items()}
        tensors |= {f"optimizer.{key}": value for key, value in optimizer_tensors(self.engine.optimizer).items()}
        state = self.engine.state_dict() | {
            "encoder": encoder_metadata(encoder),
            "data": self.fingerprint,
            "bad": self.unreadable.reports,
            "config": json.loads(self.config.to_json()),
        }
        self.folder.save(self.engine.state.step, tensors, state, final=final)
        write_bytes(self.folder.path / ENCODER_FILE, encoder_bytes(encoder))

    def _report_bad(self) -> None:
        if self.unreadable.count:
            text = "".join(f"{name}\t{reason}\n" for name, reason in self.unreadable.reports)
            if self.folder.owner:
                write_text(self.folder.path / "unreadable.txt", text)
            self.console.warn(
                f"{self.unreadable.count} unreadable image(s) were replaced; see {self.folder.path}/unreadable.txt"
            )
