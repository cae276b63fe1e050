"""What the computed parts of a report need of a run: its model, its encoder and its images."""

import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

from dmjd.data.sources.base import Source
from dmjd.encoders.base import Encoder, known_preprocess
from dmjd.encoders.weights import load_encoder
from dmjd.engine.device import pick_device
from dmjd.model import MaskedImageModel
from dmjd.runs.build import load_model, open_images


class Trained:
    """Parts of a run, loaded when they are first used.

    Each raises ValueError if it cannot be loaded, e.g. because a teacher or the images moved.

    Args:
        run: the run folder.
        device: "auto", "cpu" or "cuda", for the encoder.
        given: which images, if not the run's own, and how to read them: arguments of
            :func:`~dmjd.runs.build.open_images`.
    """

    def __init__(self, run: Path, device: str = "auto", **given: Any) -> None:
        self._run, self._device, self._given = run, device, given

    @cached_property
    def model(self) -> MaskedImageModel:
        """The pre-training model at its newest checkpoint."""
        with warnings.catch_warnings(action="ignore"):
            return load_model(self._run)[0]

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder of the newest weights."""
        with warnings.catch_warnings(action="ignore"):
            return load_encoder(self._run, pick_device(self._device))

    @cached_property
    def source(self) -> Source:
        """The images."""
        return open_images(self._run, known_preprocess(self.encoder), **self._given)


class InTraining(Trained):
    """The parts of a training that has just ended in this process."""

    def __init__(self, run: Path, model: MaskedImageModel, source: Source) -> None:
        super().__init__(run)
        self.__dict__.update(model=model, encoder=model.encoder, source=source)
