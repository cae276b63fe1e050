"""``pretrain(config)``: builds the parts of a run in order and hands them to the engine."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from dmjd import evaluation, visualize
from dmjd.checkpoint import (
    Checkpoint,
    RunFolder,
    load_optimizer_tensors,
    optimizer_tensors,
    write_bytes,
    write_text,
)
from dmjd.config import DEFAULT_BATCH_SIZE, PretrainConfig
from dmjd.data import BadPictures, Batch, Source, TrainLoader, has_split, measure_stats, open_source
from dmjd.encoders import ENCODER_FILE, Encoder, create_encoder, encoder_bytes, encoder_metadata
from dmjd.engine import Duration, Engine, Hook, Report, StopSignal, Task, make_fabric
from dmjd.model import MaskedImageModel
from dmjd.optim import adamw, scaled_learning_rate, warmup_cosine
from dmjd.pictures import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from dmjd.progress import Console, TensorBoardLogger, WandbLogger

LISTING = "files.txt"  # a folder's sorted list of pictures, kept with the run
LOOKS = 10  # pictures and online kNN in a run, where no cadence is given
FEW_PICTURES = 64
NUM_PICTURES = 6  # in the pictures a run makes of itself


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Attributes:
        path: the run folder. step: optimizer steps done. finished: False after a stop by signal.
        metrics: the last line of ``metrics.jsonl``. evaluation: task -> the dict of ``evaluation/<task>.json``.
        bad: (name, reason) of the pictures that could not be read.
    """

    path: Path
    step: int
    finished: bool
    metrics: dict[str, Any]
    evaluation: dict[str, dict[str, Any]] = field(default_factory=dict)
    bad: tuple[tuple[str, str], ...] = ()


class PretrainTask(Task):
    """Normalises a batch on its device and runs the model on it."""

    def __init__(self, model: MaskedImageModel, preprocess: Preprocess) -> None:
        super().__init__()
        self.model = model
        self.preprocess = preprocess

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """{"loss", "mim", "vis"}."""
        raw = batch.images.float()
        return self.model(self.preprocess.normalise(raw), raw, keys=batch.keys)

    def after_step(self, step: int) -> None:
        """Let targets follow the encoder."""
        self.model.after_step(step)


def build_encoder(config: PretrainConfig) -> Encoder:
    """The encoder a configuration names, with fresh weights from torch's random state."""
    many = config.encoder.startswith("conv_vit")
    overrides: dict[str, Any] = {}
    for name, plural in (("embed_dim", "embed_dims"), ("depth", "depths"), ("mlp_ratio", "mlp_ratios")):
        value = getattr(config, name)
        if value is None:
            continue
        if len(value) != (3 if many else 1):
            raise ValueError(f"--{name.replace('_', '-')} takes {3 if many else 1} number(s) for {config.encoder}")
        overrides[plural if many else name] = value if many else value[0]
    if config.num_heads is not None:
        overrides["num_heads"] = config.num_heads
    return create_encoder(
        config.encoder,
        img_size=config.size,
        in_chans=config.in_chans,
        class_token=config.class_token,
        drop_path=config.drop_path,
        **overrides,
    )


def build_model(config: PretrainConfig) -> MaskedImageModel:
    """The whole pre-training model of a configuration, weights from its seed."""
    torch.manual_seed(config.seed)
    return MaskedImageModel(
        build_encoder(config),
        config.target,
        mim_target=config.mim_target,
        vis_target=config.vis_target,
        num_views=config.num_views,
        mask_ratio=config.mask_ratio,
        pred_ratio=config.pred_ratio,
        block_size=config.block_size,
        disjoint=config.disjoint,
        decoder_dim=config.decoder_dim,
        decoder_depth=config.decoder_depth,
        decoder_heads=config.decoder_heads,
        decoder_mlp_ratio=config.decoder_mlp_ratio,
        mim=config.mim,
        vis=config.vis,
        theta=config.theta,
        mim_loss=config.mim_loss,
        vis_loss=config.vis_loss,
        hog_cell=config.hog_cell,
    )


def pretrain(config: PretrainConfig) -> RunResult:
    """Pre-train an encoder; started again with the same ``out``, go on where it stopped.

    On CPU a run that was interrupted and resumed ends with the same bits as one that was not.

    Args:
        config: from a recipe, e.g. ``dmjd.recipes.folder(data="pictures", out="runs/mine")``.

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
    model = build_model(config)
    # 2. devices and processes
    fabric = make_fabric(config.device, config.precision)
    console = Console(enabled=fabric.is_global_zero)
    # 3. pictures; the sorted list of a folder is kept with the run and read from there on resume
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
        return _Run(config, model, fabric, console, source, batch_size, folder).run()
    finally:
        console.close()
        folder.close()


def open_data(config: PretrainConfig, data: str, split: str, listing: Path | None = None) -> Source:
    """A source with the configuration's labels, channels and value range."""
    return open_source(
        data,
        split=split,
        labels=config.labels,
        in_chans=config.in_chans,
        value_range=(config.value_range[0], config.value_range[1]) if config.value_range is not None else None,
        listing=listing,
    )


def resolve_batch_size(config: PretrainConfig, num_pictures: int, world_size: int) -> int:
    """B: the explicit one, or 256 shrunk to the set; a multiple of processes times accumulation.

    Raises:
        ValueError: more processes than pictures, an explicit size larger than the set, or one that cannot be shared out.
    """
    parts = world_size * config.accumulate
    shares = f"{world_size} process(es) x --accumulate {config.accumulate}"
    if num_pictures < parts:
        raise ValueError(f"{num_pictures} picture(s) cannot be shared out to {shares}; use fewer")
    batch_size = config.batch_size or min(DEFAULT_BATCH_SIZE, num_pictures) // parts * parts
    if batch_size > num_pictures:
        raise ValueError(f"--batch-size {batch_size} is larger than the set of {num_pictures}; leave it out or lower it")
    if batch_size == 0 or batch_size % parts:
        raise ValueError(f"--batch-size {batch_size} cannot be shared out to {shares}: it must be a multiple of {parts}")
    return batch_size


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
    ) -> None:
        self.config, self.model, self.fabric, self.console = config, model, fabric, console
        self.source, self.batch_size, self.folder = source, batch_size, folder
        self.bad = BadPictures(config.max_bad, len(source))
        self.metrics: dict[str, Any] = {}

    def run(self) -> RunResult:
        """Steps 5 to 10 of :func:`pretrain`."""
        # 5. the newest checkpoint, if the run was here before
        checkpoint, problems = self.folder.newest()
        for problem in problems:
            self.console.warn(f"{problem}; going on from an older one")
        # 6. preprocessing, which travels with the weights
        self.model.encoder.preprocess = self._preprocess(checkpoint)
        # 7. optimizer, schedule, engine
        engine = self.engine = self._engine()
        if checkpoint is not None:
            self._restore(checkpoint)
        self._greet(checkpoint)
        finished = engine.duration.share(engine.progress) >= 1.0
        if finished:
            self.console.say("the run is finished; a longer duration would go on with it")
        else:
            # 8. the stream of batches from the very step, 9. the loop
            finished = self._train()
        # 10. a verdict and pictures
        evaluations = self._finish() if finished and self.fabric.is_global_zero else {}
        self._report_bad()
        self.fabric.barrier()
        return RunResult(
            self.folder.path, engine.progress.step, finished, self.metrics, evaluations, tuple(self.bad.items)
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
                mean, std = measure_stats(self.source, warn=self.console.warn)
        span = (config.value_range[0], config.value_range[1]) if config.value_range is not None else None
        return Preprocess(config.size, config.in_chans, mean, std, span)

    def _engine(self) -> Engine:
        config = self.config
        steps = config.steps
        if config.epochs is not None:
            steps = math.ceil(config.epochs * len(self.source) / self.batch_size)
        assert self.model.encoder.preprocess is not None
        self.model.encoder.set_grad_checkpointing(config.grad_checkpointing)
        task = PretrainTask(self.model, self.model.encoder.preprocess)
        return Engine(
            fabric=self.fabric,
            task=task,
            optimizer=adamw(task, config.weight_decay),
            duration=Duration(steps, config.minutes),
            peak_lr=scaled_learning_rate(
                config.blr, self.batch_size, config.num_views, config.mask_ratio, config.pred_ratio, config.disjoint
            ),
            schedule=partial(warmup_cosine, warmup=config.warmup),
            batch_size=self.batch_size,
            accumulate=config.accumulate,
            clip_grad=config.clip_grad,
            seed=config.seed,
            log_every=config.log_every,
            compile=config.compile,
        )

    def _restore(self, checkpoint: Checkpoint) -> None:
        if checkpoint.state["data"] != self.source.fingerprint():
            raise ValueError(
                f"the pictures in {self.config.data} are not those this run began with; give another --out to start anew"
            )
        self.model.load_state_dict(checkpoint.part("model"))
        load_optimizer_tensors(self.engine.optimizer, checkpoint.part("optimizer"))
        self.engine.load_state(checkpoint.state)
        self.bad.add([(name, reason) for name, reason in checkpoint.state["bad"]])
        if self.folder.owner:
            self.folder.cut_metrics(self.engine.progress.step)

    def _greet(self, checkpoint: Checkpoint | None) -> None:
        config, encoder = self.config, self.model.encoder
        parameters = sum(p.numel() for p in encoder.parameters())
        verb = f"resumed at step {self.engine.progress.step}" if checkpoint is not None else "started"
        self.console.say(
            f"{verb}: {config.out}\n"
            f"  data     {self.source.name}: {len(self.source)} pictures -> {config.size[0]} x {config.size[1]} x "
            f"{config.in_chans}, {self.batch_size} a step\n"
            f"  encoder  {encoder.name}, {parameters / 1e6:.1f} M parameters, {encoder.num_patches} tokens, "
            f"{self.model.counts[0]} visible in each of {config.num_views} view(s)\n"
            f"  device   {self.fabric.device}, {self.fabric._precision.precision}, {self.fabric.world_size} process(es)"
        )
        if len(self.source) < FEW_PICTURES:
            self.console.warn(f"only {len(self.source)} picture(s): the encoder will know little beyond them")

    def _train(self) -> bool:
        loader = TrainLoader(
            self.source,
            img_size=self.config.size,
            batch_size=self.batch_size,
            accumulate=self.config.accumulate,
            seed=self.config.seed,
            rank=self.fabric.global_rank,
            world_size=self.fabric.world_size,
            num_workers=self.config.num_workers,
            crop_scale=(self.config.crop_scale[0], self.config.crop_scale[1]),
            flip=self.config.flip,
            device=self.fabric.device,
        )
        self.loggers = [] if not self.folder.owner else self._open_loggers()
        self.online = self._online_knn() if self.folder.owner else None
        self.next_look = self._look_after(self.engine.duration.share(self.engine.progress))
        hooks: list[Hook] = [self._log]
        if self.folder.owner:
            hooks += [self._look, self._save]
        with StopSignal() as stop:
            batches = loader.batches(self.engine.progress.step)
            try:
                finished = self.engine.run(self._watched(batches), hooks, stop)
            finally:
                batches.close()
                for logger in self.loggers:
                    logger.close()
            self.console.close()
        if self.folder.owner:
            self._checkpoint(final=finished)
        if not finished:
            step = self.engine.progress.step
            self.console.say(f"stopped at step {step}, checkpoint saved; the same command goes on from there")
        return finished

    def _watched(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Batches, while unreadable pictures are named once and counted; too many stop the run."""
        for batch in batches:
            for name, reason in self.bad.add(batch.bad):
                self.console.warn(f"unreadable, another picture takes its place: {name}: {reason}")
            self.bad.check()
            yield batch

    def _open_loggers(self) -> list[TensorBoardLogger | WandbLogger]:
        loggers: list[TensorBoardLogger | WandbLogger] = [
            TensorBoardLogger(str(self.folder.path), self.engine.progress.step)
        ]
        if self.config.wandb:
            loggers.append(WandbLogger(self.folder.path.name, json.loads(self.config.to_json())))
        return loggers

    def _log(self, report: Report) -> None:
        if report.scalars is None or not self.folder.owner:
            return
        progress = report.progress
        epoch = progress.images / len(self.source)
        self._write_metrics(report, {"epoch": epoch, "seconds": progress.seconds} | report.scalars)
        self.console.progress(report.share, progress.step, epoch, progress.seconds, report.scalars)

    def _write_metrics(self, report: Report, values: dict[str, float]) -> None:
        self.metrics = {"step": report.progress.step} | values
        self.folder.log(self.metrics)
        for logger in self.loggers:
            logger.log(values, report.progress.step)

    def _save(self, report: Report) -> None:
        if report.progress.step % self.config.checkpoint_every == 0 and report.share < 1.0:
            self._checkpoint()

    def _checkpoint(self, final: bool = False) -> None:
        """Write the whole state, and the encoder beside it; never when the weights may be spoilt."""
        self.engine.check_finite()
        encoder = self.model.encoder
        tensors = {f"model.{key}": value for key, value in self.model.state_dict().items()}
        tensors |= {f"optimizer.{key}": value for key, value in optimizer_tensors(self.engine.optimizer).items()}
        state = self.engine.state() | {
            "encoder": encoder_metadata(encoder),
            "data": self.source.fingerprint(),
            "bad": list(self.bad.items),
            "config": json.loads(self.config.to_json()),
        }
        self.folder.save(self.engine.progress.step, tensors, state, final=final)
        write_bytes(self.folder.path / ENCODER_FILE, encoder_bytes(encoder))

    def _look_after(self, share: float) -> float:
        """The share of the run at which pictures and online kNN are due next, when they follow no step count."""
        return (math.floor(share * LOOKS + 1e-9) + 1) / LOOKS

    def _look(self, report: Report) -> None:
        """Pictures and, with labels, online kNN; the last look is left to the end of the run."""
        every = self.config.eval_every
        due = report.share >= self.next_look if every is None else every > 0 and report.progress.step % every == 0
        if not due or report.share >= 1.0:
            return
        self.next_look = self._look_after(report.share)
        self.engine.check_finite()
        self._picture(f"step-{report.progress.step:09d}.png")
        if self.online is not None:
            accuracy = self.online(self.model.encoder)
            self._write_metrics(report, {"knn_top1": accuracy})
            self.console.say(f"step {report.progress.step}: online kNN {100 * accuracy:.1f} %")

    def _online_knn(self) -> Callable[[Encoder], float] | None:
        """Online kNN where there are labels and a test set."""
        test = self._test_source()
        if self.config.eval_every == 0 or self.source.labels is None or test is None or test.labels is None:
            return None
        assert self.model.encoder.preprocess is not None
        return evaluation.OnlineKnn(self.source, test, self.model.encoder.preprocess, self.fabric.device)

    def _test_source(self) -> Source | None:
        config = self.config
        assert config.data is not None
        if config.test_data is not None:
            return open_data(config, config.test_data, "test")
        return open_data(config, config.data, "test") if has_split(config.data, "test") else None

    def _picture(self, name: str) -> None:
        """What the model sees, is asked for and answers, on the first pictures of the set."""
        visualize.run_picture(self.model, self.source, self.folder.path / "pictures" / name, num_images=NUM_PICTURES)

    def _finish(self) -> dict[str, dict[str, Any]]:
        """Last picture, curves, and where there are labels kNN and linear probe beside their baselines."""
        config = self.config
        self._picture("final.png")
        visualize.curves_picture(self.folder.metrics, self.folder.path / "pictures" / "curves.png")
        self.console.say(f"encoder: {self.folder.path / ENCODER_FILE}   pictures: {self.folder.path / 'pictures'}")
        test = self._test_source()
        if not config.final_eval or self.source.labels is None or test is None or test.labels is None:
            return {}
        results = {}
        for task in ("knn", "linear"):
            file = self.folder.path / "evaluation" / f"{task}.json"
            results[task] = evaluation.read_result(file, self.model.encoder) or evaluation.evaluate(
                task, self.folder.path, device=str(self.fabric.device.type), seed=config.seed
            )
        self.console.table(evaluation.results_table(results))
        return results

    def _report_bad(self) -> None:
        if self.bad.count:
            text = "".join(f"{name}\t{reason}\n" for name, reason in self.bad.items)
            if self.folder.owner:
                write_text(self.folder.path / "bad_files.txt", text)
            self.console.warn(f"{self.bad.count} unreadable picture(s) were replaced; see {self.folder.path}/bad_files.txt")
