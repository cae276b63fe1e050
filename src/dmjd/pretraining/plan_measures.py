"""What a plan measures on this machine: real steps with their loader, and a rehearsal of all else that a run does."""

import time
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from dmjd.config.checks import MAX_COUNT
from dmjd.config.pretrain import PretrainConfig
from dmjd.data.cache import evenly_spaced
from dmjd.data.sources.base import Source
from dmjd.data.sources.subset import SubsetSource
from dmjd.data.train_loader import Batch, bytes_in_memory
from dmjd.encoders.stored import encoder_bytes
from dmjd.engine.console import Console
from dmjd.engine.device import forget_peak_memory, make_fabric, peak_memory
from dmjd.engine.loop import Engine, Report, TrainState
from dmjd.engine.stop_signal import StopSignal
from dmjd.evaluation.frozen.drift import NUM_IMAGES as DRIFT_IMAGES
from dmjd.evaluation.frozen.quality import NUM_IMAGES
from dmjd.model import MaskedImageModel
from dmjd.pretraining.batch_size import resolve_batch_size
from dmjd.pretraining.bench import preprocess_to_measure, wait
from dmjd.pretraining.budget import SHARE
from dmjd.pretraining.callbacks import ENCODED, FIGURE_SECONDS, NUM_EVALS, Monitor
from dmjd.pretraining.held_out import hold_out
from dmjd.pretraining.plan_final import final_seconds
from dmjd.pretraining.run import make_engine, training_batches
from dmjd.reports.report import time_for_report
from dmjd.runs.build import build_model
from dmjd.runs.checkpoint import RunFolder, named_tensors, optimizer_tensors
from dmjd.runs.little_memory import run_within_memory
from dmjd.runs.start import begin_from

SAMPLE = 4096  # images that are read of a set which a run holds in memory

REHEARSED = 75.0  # seconds of training: a longer one has a longer report, of the same parts

LONGEST = 10.0  # seconds; an evaluation that is expected to take longer is not rehearsed

_WARMUP_STEPS = 2


@dataclass(frozen=True)
class Besides:
    """What a run does besides steps, in seconds.

    Attributes:
        once: reading the images that all evaluations use.
        evaluation: an evaluation.
        end: last figures and report.
        report: the part of ``end`` that grows with the training time.
        final: the final evaluation of labeled images.
    """

    once: float = 0.0
    evaluation: float = 0.0
    end: float = 0.0
    report: float = 0.0
    final: float = 0.0

    def of(self, training: float) -> float:
        """The seconds of all of it in a run of some seconds of training, whose evaluations get a tenth at most."""
        evaluations = min(NUM_EVALS * self.evaluation + self.once, SHARE * training + self.once)
        return evaluations + self.end + self.final + time_for_report(training) - self.report


@dataclass(frozen=True)
class Measured:
    """What some steps of a run took.

    Attributes:
        batch_size: images per step.
        accumulate: micro-batches of a step; several if it did not fit into memory at once.
        seconds: of a step, with the loader.
        memory: peak in bytes, of the process, or on a GPU of tensors.
        checkpoint, encoder: bytes of these files.
        reading: seconds to read the set into memory before the first step; 0 for a set that is not held there.
        besides: the rest of the run.
    """

    batch_size: int
    accumulate: int
    seconds: float
    memory: int
    checkpoint: int
    encoder: int
    reading: float
    besides: Besides

    @property
    def images_per_s(self) -> float:
        """Throughput with the loader."""
        return self.batch_size / self.seconds


def measure(config: PretrainConfig, source: Source, seconds: float, training: float | None = None) -> Measured:
    """Train for some seconds, at least one step, with the loader; the weights are thrown away.

    A set that a run would hold in memory is measured with some of its images there: time and memory of the others
    follow from theirs.

    Args:
        config: of the run.
        source: its images.
        seconds: to train.
        training: seconds of training of the run that is planned, for a rehearsal of all else that it does; None: only
            steps are measured.
    """
    config, start = begin_from(config)
    model = build_model(config, start)
    fabric = make_fabric(config.device, config.precision)
    config, trained, held_out = hold_out(config, source)
    config, batch_size = resolve_batch_size(config, len(trained), 1, fabric.device)
    config = config.replace(batch_size=batch_size, minutes=seconds / 60, log_every=MAX_COUNT)
    model.encoder.preprocess = preprocess_to_measure(config)
    held = bytes_in_memory(trained, fabric.device)
    read = trained if held is None else SubsetSource(trained, evenly_spaced(len(trained), SAMPLE))
    engine = make_engine(config, model, fabric, batch_size, len(trained))

    def batches_from(step: int) -> Generator[Batch, None, None]:
        forget_peak_memory(fabric.device)  # that of a step which did not fit, too
        return training_batches(config, read, fabric, batch_size, step, accumulate=engine.accumulate)

    began = time.perf_counter()
    batches = batches_from(0)
    reading = 0.0 if held is None else (time.perf_counter() - began) * len(trained) / len(read)
    step = _step_seconds(engine, batches, batches_from)
    besides = Besides()
    if training is not None:
        besides = _rehearse(config, model, engine, source, held_out, training)
    unread = 0 if held is None else round(held * (1 - len(read) / len(trained)))
    return Measured(
        batch_size=batch_size,
        accumulate=engine.accumulate,
        seconds=step,
        memory=peak_memory(fabric.device) + unread,
        checkpoint=sum(tensor.nbytes for tensor in _tensors(model, engine).values()),
        encoder=len(encoder_bytes(model.encoder)),
        reading=reading,
        besides=besides,
    )


def _step_seconds(
    engine: Engine, batches: Generator[Batch, None, None], batches_from: Callable[[int], Generator[Batch, None, None]]
) -> float:
    """Train for the duration of an engine; the seconds of a step, without the first ones if there are more.

    A step that does not fit into memory is divided, as in a run; ``batches_from`` gives its smaller parts.
    """
    device = engine.fabric.device
    stamps: list[float] = []

    def stamp(report: Report) -> None:
        if report.state.step <= _WARMUP_STEPS:
            wait(device)
        stamps.append(time.perf_counter())

    silent = Console(enabled=False)
    with StopSignal() as stop:
        if not run_within_memory(engine, batches, lambda b: engine.run(b, [stamp], stop), silent, batches_from):
            raise KeyboardInterrupt
    wait(device)
    stamps[-1] = time.perf_counter()
    skipped = min(_WARMUP_STEPS, len(stamps) - 1)
    return (stamps[-1] - stamps[skipped - 1]) / (len(stamps) - skipped) if skipped else engine.state.seconds


def _tensors(model: MaskedImageModel, engine: Engine) -> dict[str, Tensor]:
    """Those of a checkpoint."""
    return named_tensors("model", model) | {f"optimizer.{k}": x for k, x in optimizer_tensors(engine.optimizer).items()}


def _rehearse(
    config: PretrainConfig,
    model: MaskedImageModel,
    engine: Engine,
    source: Source,
    held_out: Source | None,
    training: float,
) -> Besides:
    """Do what a run does besides steps, in a folder that is deleted: a checkpoint, an evaluation, figures, a report.

    An evaluation that would take too long for a plan is expected to take as long as a run expects it, and its memory is
    that of the steps.
    """
    planned, step, images, seconds = config, engine.state.step, engine.state.images, engine.state.seconds

    def expected(count: int) -> float:
        return FIGURE_SECONDS + ENCODED * count * seconds / images

    count = min(NUM_IMAGES, len(source)) + (len(held_out) if held_out is not None else 0)
    count += DRIFT_IMAGES if config.init is not None else 0
    once, evaluation, short = 0.0, expected(count), min(training, REHEARSED)
    every = 1 if evaluation <= LONGEST else 0
    with TemporaryDirectory() as temporary:
        config = config.replace(out=str(Path(temporary) / "run"), eval_every=every, final_eval=False)
        with closing(RunFolder(str(config.out))) as folder:
            folder.validate_config(config)
            with suppress(ValueError):  # this disk may be smaller than that of the run
                folder.save(step, _tensors(model, engine), engine.state_dict())
            monitor = Monitor(config, model, source, held_out, folder, Console(enabled=False))
            began = time.perf_counter()
            loggers = monitor.start(0, 0.0)
            if every and (evaluation := expected(monitor.images_evaluated)) <= LONGEST:
                monitor.evaluate(Report(engine.state, 0.5, None))
                evaluation = monitor.evaluation_seconds
                once = time.perf_counter() - began - evaluation
            for logger in loggers:
                logger.close()
            began = time.perf_counter()
            monitor.finish(TrainState(step, images, short))
            end = time.perf_counter() - began
    final = final_seconds(planned, model.encoder, source, ENCODED * seconds / images)
    return Besides(once, evaluation, end, time_for_report(short), final)
