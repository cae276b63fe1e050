"""Base of fine-tuning, segmentation and detection: train from pre-trained and from random weights, and test both."""

import json
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from lightning.fabric import Fabric

from dmjd.checked_json import read_json, signed, verified
from dmjd.config.dense import DenseConfig
from dmjd.config.finetune import FinetuneConfig
from dmjd.data.sources.base import Source
from dmjd.encoders.base import Encoder
from dmjd.encoders.stored import weights_hash
from dmjd.engine.console import Console
from dmjd.engine.layer_decay import layer_groups
from dmjd.engine.loop import Task
from dmjd.evaluation.results import data_fingerprint, key_of, part_fingerprint, tested_split, versions, write_result
from dmjd.evaluation.supervised.similar import find_similar
from dmjd.evaluation.supervised.trainer import FitResult, FitSettings, fit
from dmjd.files import write_text
from dmjd.result_files import headline

STARTS = {"result": "pre-trained", "random_init": "from scratch"}  # key of a result -> its initial weights


class SupervisedEvaluation(ABC):
    """A task on one pair of sets, trained from both starts with the same schedule.

    Args:
        config: resolved configuration.
        encoder: the pre-trained encoder; it is not changed.
        train, test: the sets.
        val: the set for validation during training, which selects the best model; None: a part of the test set.
        device, precision, num_workers: of
            the caller.
        seed: seed of new weights, order and augmentation.

    Attributes:
        name: name of the task.
        described: parts of a result that describe it.
    """

    name: ClassVar[str]
    described: ClassVar[tuple[str, ...]] = ()
    config: FinetuneConfig | DenseConfig

    def __init__(
        self,
        config: FinetuneConfig | DenseConfig,
        encoder: Encoder,
        train: Source,
        test: Source,
        *,
        device: str,
        precision: str,
        num_workers: int | None,
        seed: int,
        val: Source | None = None,
    ) -> None:
        self.config, self.encoder, self.train, self.test, self.val = config, encoder, train, test, val
        self.device, self.precision, self.num_workers, self.seed = device, precision, num_workers, seed
        self.console = Console()

    @property
    def validated(self) -> Any:
        """The set for validation during training."""
        return self.test if self.val is None else self.val

    def described_parts(self) -> dict[str, Any]:
        """Which part of the data was tested on, and which one validated on during training, for the result."""
        val = self.validated
        return {"split": tested_split(self.test), "validation": {"name": val.name, "split": val.split, "num": len(val)}}

    def parts_text(self) -> str:
        """The parts of the data, and what each is for, in a message."""
        train, test = ((part.title, len(part)) for part in (self.train, self.test))
        text = f"train: {train[0]}, {train[1]:,} images; test: {test[0]}, {test[1]:,}"
        if self.val is not None:
            return f"{text}; evaluated on {self.val.title}, {len(self.val):,}, while it trains"
        return f"{text}, also while it trains: there is no validation part of its own"

    @abstractmethod
    def task(self, start: str) -> Task:
        """Build the untrained task of a start; its ``encoder`` has pre-trained ("result") or random weights."""

    @abstractmethod
    def settings(self) -> FitSettings:
        """Settings of the training."""

    @abstractmethod
    def batches(self, start_step: int, fabric: Fabric) -> Generator[Any, None, None]:
        """Endless micro-batches from a step on; closing the generator ends its worker processes."""

    @abstractmethod
    def validate(self, task: Any) -> dict[str, float]:
        """Scores on :attr:`validated`, or a part of it, during training; the first one selects the best model."""

    @abstractmethod
    def evaluate(self, fitted: FitResult, start: str) -> dict[str, Any]:
        """Result of a finished training on the whole test set, as JSON types."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Everything a result depends on besides encoder, start, seed and data, as JSON types."""

    def finished(self, file: Path) -> dict[str, Any]:
        """Read the result of a finished training.

        Raises:
            ValueError: if it, or a file that belongs to it, is damaged.
        """
        try:
            result = verified(read_json(file, dict[str, Any]), str(file))
            if headline(result) is None or any(not isinstance(result.get(name), dict) for name in self.described):
                raise ValueError(f"{file}: it is not the result of a training")
        except ValueError as error:
            raise ValueError(f"{error}; delete it, and the same command makes it again") from None
        return result

    def run(self, start: str, folder: Path) -> dict[str, Any]:
        """Train from one start and test, in a subfolder whose name contains a hash of all that the result depends on.

        Called again, it resumes, or reads the finished result. From scratch, layer-wise decay is off: it assumes that
        the early layers are trained.

        Args:
            start: a key of :data:`STARTS`.
            folder: run folder; the subfolder is ``evaluation/<task>/<subfolder>``.
        """
        identity = {
            "init": start,
            "seed": self.seed,
            "encoder": weights_hash(self.encoder) if start == "result" else key_of(self.encoder),
            "data": data_fingerprint(self.train, self.test),
            **self.identity(),
        }
        if self.val is not None:
            identity["validation"] = part_fingerprint(self.val)
        key = key_of(self.encoder, identity)
        subfolder = f"evaluation/{self.name}/{STARTS[start].replace(' ', '-')}-seed{self.seed}-{key}"
        file = folder / subfolder / "result.json"
        if file.exists():
            return self.finished(file) | {"folder": subfolder}
        name = f"{self.name}, {STARTS[start]}, seed {self.seed}"
        if not (folder / subfolder).exists() and (found := find_similar(folder / subfolder, identity)) is not None:
            self.console.say(f"{name}: a new training, because {found}")
        task = self.task(start)
        decay = self.config.layer_decay if start == "result" else 1.0
        assert decay is not None
        fitted = fit(
            task,
            self.batches,
            layer_groups(task, self.config.weight_decay, decay),
            self.settings(),
            folder / subfolder,
            validate=self.validate,
            identity=identity,
            num_images=len(self.train),
            name=name,
            console=self.console,
        )
        result = self.evaluate(fitted, start) | {"steps": fitted.step, "folder": subfolder}
        write_text(file, json.dumps(signed(result), indent=2) + "\n")
        return result


def save_comparison(
    folder: Path,
    task: str,
    results: Mapping[str, Any],
    encoder: Encoder,
    seed: int,
    files: Mapping[Path, bytes] | None = None,
    **described: Any,
) -> dict[str, Any]:
    """Write ``evaluation/<task>.json`` and return its content.

    Args:
        results: start -> result.
        files: other files that belong to the result.
        described: "configuration", "overrides" and "data".
    """
    content = {
        "task": task,
        **results,
        **described,
        "encoder": weights_hash(encoder),
        "seed": seed,
        "versions": versions(),
    }
    write_result(folder, task, content, files)
    return content
