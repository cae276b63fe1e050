"""Base of segmentation and detection: encoder, batches, validation and test."""

from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from lightning.fabric import Fabric

from dmjd.config.checks import check_out, check_path
from dmjd.config.dense import DenseConfig
from dmjd.data.cache import evenly_spaced
from dmjd.data.dense_loader import Augmentation, Example, ExampleBatch, ExampleLoader, read_examples
from dmjd.data.sources.base import Source
from dmjd.data.unreadable import Report
from dmjd.encoders.base import Encoder, known_preprocess
from dmjd.encoders.registry import fresh_like, resized
from dmjd.encoders.weights import load_encoder
from dmjd.engine.loop import Task
from dmjd.evaluation.results import check_results_folder, data_fingerprint
from dmjd.evaluation.supervised.evaluation import STARTS, SupervisedEvaluation, save_comparison
from dmjd.evaluation.supervised.trainer import FitResult, FitSettings
from dmjd.figures.attempt import attempt_figure

EVAL_IMAGES = 32  # images for validation during training

NOT_IN_RESULT = ("num_images", "checkpoint_every", "log_every")  # settings that do not change a result

_TEST_BATCH = 8


def open_encoder(run: str | Path, out: str | Path | None) -> tuple[Encoder, Path]:
    """Open the encoder and the folder for results.

    Raises:
        ValueError: if there is no encoder, it has no preprocessing, or no folder for results is given.
    """
    path = check_path("run", run)
    if out is None and path.exists() and not path.is_dir():
        raise ValueError(f"{run} is not a run folder: say where results go with --out DIR")
    folder = check_out("out", out) if out is not None else path
    if out is not None or path.is_dir():
        check_results_folder(folder)
    encoder = load_encoder(path if path.exists() else run)
    known_preprocess(encoder)
    if out is None and not path.is_dir():
        raise ValueError(f"{run} is not a run folder: say where results go with --out DIR")
    return encoder, folder


S = TypeVar("S", bound=Source)


def open_parts(
    config: DenseConfig, opened: Callable[[str, str], S], has_part: Callable[[str, str], bool]
) -> tuple[S, S | None]:
    """Open the test set and, if the data has one besides, the set for validation during training.

    Args:
        config: the configuration, with data.
        opened: opens a part of data.
        has_part: whether data has a part.
    """
    data = str(config.data)
    test_data = data if config.test_data is None else config.test_data
    # A test set without parts is used as a whole.
    whole = config.test_data is not None and config.split == "test" and not has_part(test_data, "test")
    test = opened(test_data, "train" if whole else config.split)
    return test, opened(data, "val") if test.split != "val" and has_part(data, "val") else None


def rounded_up(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """The smallest (height, width) not below ``size`` that is divisible by ``multiple``."""
    return -(-size[0] // multiple) * multiple, -(-size[1] // multiple) * multiple


class DenseEvaluation(SupervisedEvaluation):
    """Segmentation or detection on one pair of sets; arguments as :class:`SupervisedEvaluation`.

    Attributes:
        score: name of the score that selects the best model.
    """

    score: str
    config: DenseConfig
    train: Any  # an ExampleSource with classes
    test: Any

    @property
    @abstractmethod
    def canvas(self) -> tuple[int, int]:
        """(h, w) of training images, divisible by the patch."""

    @abstractmethod
    def build(self, encoder: Encoder) -> Task:
        """Build the task for an encoder, with new weights from torch's random state."""

    @abstractmethod
    def augment(self) -> Augmentation:
        """The augmentation of training images."""

    @abstractmethod
    def measure(self, task: Any, source: Any, rows: np.ndarray | None = None) -> dict[str, Any]:
        """Scores of a task in evaluation mode on images ``rows`` (None: all) of a set."""

    @abstractmethod
    def draw(self, task: Any, rows: np.ndarray, file: Path) -> None:
        """Save a figure of predictions on test images."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Information about the data, for the result."""

    def task(self, start: str) -> Task:
        """Build the task of a start. All weights other than the encoder's are new and equal for both starts."""
        if start == "random_init":
            encoder = fresh_like(self.encoder, seed=self.seed, img_size=self.canvas, drop_path=self.config.drop_path)
        else:
            encoder = resized(self.encoder, self.canvas, drop_path=self.config.drop_path)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self.build(encoder)

    def settings(self) -> FitSettings:
        """Settings of the training."""
        return FitSettings.from_config(
            self.config,
            len(self.train),
            warmup=self.config.warmup,
            num_evals=self.config.num_evals,
            seed=self.seed,
            precision=self.precision,
            device=self.device,
        )

    def identity(self) -> dict[str, Any]:
        """Classes and configuration."""
        settings = {k: v for k, v in self.config.to_dict().items() if k not in NOT_IN_RESULT}
        return {"classes": self.train.classes, "configuration": settings | {"precision": self.precision}}

    def batches(self, start_step: int, fabric: Fabric) -> Generator[ExampleBatch, None, None]:
        """Augmented images and targets."""
        loader = ExampleLoader(
            self.train,
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

    def validate(self, task: Task) -> dict[str, float]:
        """The score on at most 32 images of the validation set, or of the test set if there is none."""
        score = self.measure(task, self.validated, evenly_spaced(len(self.validated), EVAL_IMAGES))[self.score]
        return {self.score: 0.0 if score is None else score}  # None: no object in these few images

    def evaluate(self, fitted: FitResult, start: str) -> dict[str, Any]:
        """Scores on the whole test set; saves a figure of predictions."""
        with fitted.testing() as task:
            if self.config.num_images:
                shown = evenly_spaced(len(self.test), self.config.num_images)
                file = fitted.folder / "predictions.png"
                attempt_figure(lambda: self.draw(task, shown, file), self.console)
            scores = self.measure(task, self.test)
        return scores | {"num_unreadable": len(self.unreadable)}

    def read(self, source: Any, rows: np.ndarray | None) -> Iterator[list[Example]]:
        """Read images of a set in batches. After a whole pass, ``unreadable`` holds those that could not be read."""
        self.unreadable: list[Report] = []
        yield from read_examples(
            source, batch_size=_TEST_BATCH, num_workers=self.num_workers, indices=rows, unreadable=self.unreadable
        )
        if len(self.unreadable) == (len(source) if rows is None else len(rows)) > 0:
            raise ValueError(
                f"none of the images of {source.name} can be read; {self.unreadable[0][0]}: {self.unreadable[0][1]}"
            )

    def compare(self, folder: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Train and test from both starts, and write ``evaluation/<task>.json``.

        Args:
            folder: the run folder.
            overrides: settings given by the caller.
        """
        steps = self.settings().steps
        self.console.say(self._summary(steps))
        results = {start: self.run(start, folder) for start in STARTS}
        data = {
            "train": self.train.name,
            "test": self.test.name,
            **self.described_parts(),
            "num_train": len(self.train),
            "num_test": len(self.test),
            "fingerprint": data_fingerprint(self.train, self.test),
        }
        return save_comparison(
            folder,
            self.name,
            results,
            self.encoder,
            self.seed,
            configuration=self.config.to_dict() | {"steps": steps, "precision": self.precision},
            overrides={name: list(v) if isinstance(v, tuple) else v for name, v in overrides.items()},
            data=data | self.describe(),
        )

    def _summary(self, steps: int) -> str:
        """Describe what will be trained, so that a wrong number of classes or a wrong size is noticed early."""
        train, encoder, (height, width) = self.train, self.encoder, self.canvas
        return (
            f"{self.name}: {self.parts_text()}\n"
            f"  {len(train.classes)} classes: {', '.join(train.classes[:12])}{', ...' * (len(train.classes) > 12)}\n"
            f"  {encoder.name}, pre-trained at {encoder.img_size[0]} x {encoder.img_size[1]}, "
            f"now at {height} x {width}; {steps} steps of {self.config.batch_size}, "
            "twice: with its weights and with random ones"
        )
