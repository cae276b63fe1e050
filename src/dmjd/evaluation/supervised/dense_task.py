"""What segmentation and detection share: two trainings by one schedule, their tests, and what is written of them."""

import json
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import nn

from dmjd.config.dense import DenseConfig
from dmjd.data.cache import evenly_spaced
from dmjd.data.dense_loader import Augmentation, Example, ExampleBatch, ExampleLoader, read_examples
from dmjd.data.sources.base import Source
from dmjd.data.unreadable import Report
from dmjd.encoders.base import Encoder, known_preprocess
from dmjd.encoders.registry import fresh_like, resized
from dmjd.encoders.weights import load_encoder, weights_hash
from dmjd.engine.console import Console
from dmjd.engine.layer_decay import layer_groups
from dmjd.engine.loop import Task
from dmjd.evaluation.results import data_fingerprint, key_of, versions, write_result
from dmjd.evaluation.supervised.trainer import FitResult, FitSettings, fit, num_steps
from dmjd.files import write_text
from dmjd.nn.modes import evaluating

EVAL_IMAGES = 32  # of the test set, at num_evals while training

INITS = {"result": "pre-trained", "random_init": "from scratch"}

SHOWS = ("num_images", "checkpoint_every", "log_every")  # settings that change no result

_TEST_BATCH = 8


def open_encoder(run: str | Path, out: str | Path | None) -> tuple[Encoder, Path]:
    """The encoder and the folder that gets the results.

    Raises:
        ValueError: where there is no encoder, it knows no preprocessing, or results would have no place.
    """
    path = Path(run).expanduser()
    encoder = load_encoder(path if path.exists() else run)
    known_preprocess(encoder)
    if out is None and not path.is_dir():
        raise ValueError(f"{run} is no run folder: say where results go with --out DIR")
    return encoder, Path(out).expanduser() if out is not None else path


def rounded_up(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """The least (height, width) not below ``size`` that ``multiple`` divides."""
    return -(-size[0] // multiple) * multiple, -(-size[1] // multiple) * multiple


class DenseEvaluation(ABC):
    """One task on one pair of sets; subclasses say what is particular to it.

    Args:
        config: resolved. encoder: the trained one. train, test: the sets. device, precision, num_workers: of the
            caller. seed: of the decoder, order, augmentation and random weights.

    Attributes:
        name: of the task. score: which of its scores is shown first.
    """

    name: str
    score: str

    def __init__(
        self,
        config: DenseConfig,
        encoder: Encoder,
        train: Source,
        test: Source,
        device: str,
        precision: str,
        num_workers: int | None,
        seed: int,
    ) -> None:
        self.config, self.encoder, self.train, self.test = config, encoder, train, test
        self.device, self.precision, self.num_workers, self.seed = device, precision, num_workers, seed
        self.unreadable: list[Report] = []
        self.console = Console()

    @property
    @abstractmethod
    def frame(self) -> tuple[int, int]:
        """(h, w) of training images, divisible by the patch."""

    @abstractmethod
    def build(self, encoder: Encoder) -> Task:
        """The task of an encoder; new weights from torch's random state."""

    @abstractmethod
    def augment(self) -> Augmentation:
        """What is done to a training image."""

    @abstractmethod
    def measure(self, task: Task, rows: np.ndarray | None = None) -> dict[str, Any]:
        """Scores of a task in evaluation mode on test images ``rows`` (all)."""

    @abstractmethod
    def draw(self, task: Task, rows: np.ndarray, file: Path) -> None:
        """An image of what the task finds in test images."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What else the result says of the data."""

    def read(self, rows: np.ndarray | None) -> Iterator[list[Example]]:
        """Test images, by the batch; those that can't be read are in ``bad`` after a whole pass."""
        self.unreadable = []
        yield from read_examples(
            self.test,  # type: ignore[arg-type]
            batch_size=_TEST_BATCH,
            num_workers=self.num_workers,
            indices=rows,
            unreadable=self.unreadable,
        )
        if len(self.unreadable) == (len(self.test) if rows is None else len(rows)) > 0:
            raise ValueError(f"none of the test images can be read; {self.unreadable[0][0]}: {self.unreadable[0][1]}")

    def batches(self, start_step: int, fabric: Fabric) -> Generator[ExampleBatch, None, None]:
        """Micro-batches from a step on; closing the iterator ends its workers."""
        loader = ExampleLoader(
            self.train,  # type: ignore[arg-type]
            self.augment(),
            batch_size=self.config.batch_size,
            accumulate=self.config.accumulate,
            seed=self.seed,
            rank=fabric.global_rank,
            world_size=fabric.world_size,
            num_workers=self.num_workers,
            device=fabric.device,
            warn=self.console.warn,
        )
        yield from loader.batches(start_step)

    def task(self, init: str) -> Task:
        """The task before training, from the trained weights ("result") or random ones."""
        if init == "random_init":
            encoder = fresh_like(self.encoder, seed=self.seed, img_size=self.frame, drop_path=self.config.drop_path)
        else:
            encoder = resized(self.encoder, self.frame, drop_path=self.config.drop_path)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)  # the same decoder for both
            return self.build(encoder)


def compare(evaluation: DenseEvaluation, folder: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Train and test from the trained and from random weights, and write ``evaluation/<task>.json``.

    Args:
        evaluation: the task. folder: of the run. overrides: settings that the caller gave.
    """
    config = evaluation.config
    steps = num_steps(config.epochs, config.steps, len(evaluation.train), config.batch_size)
    evaluation.console.say(_greeting(evaluation, steps))
    found = {init: _train_and_test(evaluation, init, steps, folder) for init in INITS}
    result = {
        "task": evaluation.name,
        **found,
        "configuration": config.to_dict() | {"steps": steps, "precision": evaluation.precision},
        "overrides": {name: list(v) if isinstance(v, tuple) else v for name, v in overrides.items()},
        "data": _data(evaluation),
        "encoder": weights_hash(evaluation.encoder),
        "seed": evaluation.seed,
        "versions": versions(),
    }
    write_result(folder, evaluation.name, result)
    return result


def _greeting(evaluation: DenseEvaluation, steps: int) -> str:
    """What is about to be done, so that a wrong class count or size is seen before hours have passed."""
    config, encoder, train, test = evaluation.config, evaluation.encoder, evaluation.train, evaluation.test
    height, width = evaluation.frame
    return (
        f"{evaluation.name}: {train.name}: {len(train)} images, {test.name}: {len(test)}\n"
        f"  {len(train.classes)} classes: {', '.join(train.classes[:12])}{', ...' * (len(train.classes) > 12)}\n"
        f"  {encoder.name}, trained at {encoder.img_size[0]} x {encoder.img_size[1]}, now in frames of "
        f"{height} x {width}; {steps} steps of {config.batch_size}, twice: with its weights and with random ones"
    )


def _data(evaluation: DenseEvaluation) -> dict[str, Any]:
    train, test = evaluation.train, evaluation.test
    sizes = {"train": train.name, "test": test.name, "num_train": len(train), "num_test": len(test)}
    return sizes | {"fingerprint": data_fingerprint(train, test)} | evaluation.describe()


def _train_and_test(evaluation: DenseEvaluation, init: str, steps: int, folder: Path) -> dict[str, Any]:
    """The result of one training; a finished one is read."""
    encoder, config = evaluation.encoder, evaluation.config
    identity = {
        "init": init,
        "seed": evaluation.seed,
        "encoder": weights_hash(encoder) if init == "result" else key_of(encoder),
        "data": data_fingerprint(evaluation.train, evaluation.test),
        "classes": evaluation.train.classes,
        "configuration": {k: v for k, v in config.to_dict().items() if k not in SHOWS}
        | {"precision": evaluation.precision},
    }
    key = key_of(encoder, identity)
    place = folder / "evaluation" / evaluation.name / f"{INITS[init].replace(' ', '-')}-seed{evaluation.seed}-{key}"
    done = place / "result.json"
    if done.exists():
        return json.loads(done.read_text(encoding="utf-8"))
    fitted = _fit(evaluation, init, steps, place, identity)
    device = next(fitted.model.parameters()).device
    with evaluating(fitted.model), autocast_for(device, evaluation.precision):
        if config.num_images:
            shown = evenly_spaced(len(evaluation.test), config.num_images)
            evaluation.draw(fitted.model, shown, place / "predictions.png")
        result = evaluation.measure(fitted.model)
    result |= {
        "steps": fitted.step,
        "num_unreadable": len(evaluation.unreadable),
        "folder": str(place.relative_to(folder)),
    }
    write_text(done, json.dumps(result, indent=2) + "\n")
    return result


def _fit(evaluation: DenseEvaluation, init: str, steps: int, place: Path, identity: dict[str, Any]) -> FitResult:
    config = evaluation.config
    settings = FitSettings(
        steps=steps,
        batch_size=config.batch_size,
        lr=config.lr,
        min_lr=config.min_lr,
        warmup=config.warmup,
        accumulate=config.accumulate,
        clip_grad=config.clip_grad,
        seed=evaluation.seed,
        precision=evaluation.precision,
        num_evals=config.num_evals,
        device=evaluation.device,
        checkpoint_every=config.checkpoint_every,
        log_every=config.log_every,
    )
    task = evaluation.task(init)
    rows = evenly_spaced(len(evaluation.test), EVAL_IMAGES)

    def look(model: nn.Module) -> dict[str, float]:
        found = evaluation.measure(model, rows)[evaluation.score]  # type: ignore[arg-type]
        return {evaluation.score: 0.0 if found is None else found}  # None: no object in these few images

    # Layer-wise decay presumes that early layers know something: from scratch it is off.
    decay = config.layer_decay if init == "result" else 1.0
    return fit(
        task,
        evaluation.batches,
        layer_groups(task, config.weight_decay, decay),
        settings,
        place,
        validate=look,
        identity=identity,
        num_images=len(evaluation.train),
        name=f"{evaluation.name}, {INITS[init]}",
        console=evaluation.console,
    )


def autocast_for(device: torch.device, precision: str) -> torch.autocast:
    """The autocast that the engine trains under, for a test after it."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")
