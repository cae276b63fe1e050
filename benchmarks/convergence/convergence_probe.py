"""Held-out training images, and probes of an encoder on them during training, for ``convergence.py``."""

import argparse
import dataclasses
import io
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import dmjd
from dmjd.config.pretrain import PretrainConfig
from dmjd.data.eval_loader import read_all
from dmjd.data.sources.base import Source
from dmjd.data.sources.registry import align_labels, open_source
from dmjd.encoders.base import Encoder
from dmjd.engine.loop import Report, TrainState
from dmjd.evaluation.frozen.features import Features, pooled
from dmjd.evaluation.frozen.knn import knn
from dmjd.evaluation.frozen.linear import linear_probe
from dmjd.evaluation.frozen.quality import FeatureQuality
from dmjd.evaluation.low_shot import hold_out
from dmjd.files import atomic, write_text
from dmjd.images.preprocess import Preprocess
from dmjd.model import MaskedImageModel
from dmjd.nn.modes import evaluating
from dmjd.pretraining.held_out import HeldOutLoss
from dmjd.targets.teacher import load_teacher, teacher_preprocess

sys.path.insert(0, str(Path(__file__).parents[1]))
from labels import labels_of


def split(data: str, folder: Path, held_out: float, held_out_data: str | None = None) -> None:
    """Write held-out images as test.parquet and the training images as train.parquet, once.

    Held out is a part of the training images, or all of ``held_out_data``, whose classes are some of the training set.
    """
    files = {name: folder / f"{name}.parquet" for name in ("train", "test")}
    if all(file.exists() for file in files.values()):
        return
    folder.mkdir(parents=True, exist_ok=True)
    source: Source = open_source(data, split="train", labels=labels_of(data))
    if held_out_data is not None:
        other = open_source(held_out_data, split="train", labels=labels_of(held_out_data))
        parts = {"train": (source, np.arange(len(source))), "test": (other, np.arange(len(other)))}
    else:
        held = hold_out(source.labels, held_out, seed=0)
        parts = {"train": (source, np.flatnonzero(~held)), "test": (source, np.flatnonzero(held))}
    numbers = {name: number for number, name in enumerate(source.classes)}
    for name, (chosen, rows) in parts.items():
        with atomic(files[name]) as temporary:
            pq.write_table(pa.Table.from_pylist([_row(chosen, int(i), numbers) for i in rows]), temporary)


def _row(source: Source, index: int, numbers: dict[str, int]) -> dict[str, Any]:
    """A row in Hugging Face's image schema, with the number of its class; bytes are kept unchanged."""
    stored = source.stored(index)
    if isinstance(stored, str | Path):
        stored = Path(stored).read_bytes()  # photographs cost in a run what they cost a user
    if not isinstance(stored, bytes):
        buffer = io.BytesIO()
        Image.fromarray(source.read(index)).save(buffer, format="png")
        stored = buffer.getvalue()
    return {"image": {"bytes": stored, "path": None}, "label": numbers[source.classes[source.labels[index]]]}


class Probe:
    """kNN and linear probe of an encoder on fixed subsets of the training and the held-out images.

    Args:
        data: folder of :func:`split`. side: of the images, in pixels. num_train, num_test: images, evenly spaced.
        device: of the encoder. precision: of features, "fp32" or "bf16".
    """

    def __init__(
        self, data: Path, side: int, num_train: int, num_test: int, device: torch.device, precision: str
    ) -> None:
        self.preprocess = Preprocess((side, side))
        self.device, self.precision, self.sets = device, precision, []
        train, test = (open_source(str(data), split=name, labels="column") for name in ("train", "test"))
        labels = {"train": train.labels, "test": align_labels(train, test)}  # a small test part may lack classes
        for name, source, count in (("train", train, num_train), ("test", test, num_test)):
            rows = np.unique(np.linspace(0, len(source) - 1, count).astype(np.int64))
            images = read_all(source, self.preprocess, rows)
            self.sets.append(dataclasses.replace(images, labels=torch.from_numpy(labels[name][images.index.numpy()])))

    def __call__(self, encoder: Encoder) -> dict[str, float]:
        """Top-1 accuracies, 0 to 1; the encoder is left unchanged."""
        extract = pooled(encoder, self.precision)

        def features(raw: Tensor) -> Tensor:
            with evaluating(encoder):
                return extract(self.preprocess.normalize(raw))

        return self.scores(features)

    def scores(self, extract: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Top-1 accuracies of any features: ``extract`` maps images [B, C, H, W] on the 0..255 scale to [B, D]."""
        train, test = (
            Features(
                torch.cat([extract(raw.to(self.device)).float().cpu() for raw in each.raw.split(512)]),
                each.labels,
                each.index,
            )
            for each in self.sets
        )
        tasks = {"knn": knn, "linear": linear_probe}
        return {name: task(train, test, device=self.device)["top1"] for name, task in tasks.items()}


def teacher_scores(teacher: str, probe: Probe) -> dict[str, dict[str, float]]:
    """Scores of the frozen features of a trained model, pooled over positions: its input size -> accuracies.

    The images are those of the probe, enlarged to the teacher's own size, and as they are.
    """
    model = load_teacher(teacher).to(probe.device).eval()
    preprocess = teacher_preprocess(model, teacher)

    @torch.no_grad()
    def extract(raw: Tensor, size: tuple[int, int]) -> Tensor:
        if tuple(raw.shape[2:]) != size:
            raw = F.interpolate(raw.float(), size, mode="bicubic", antialias=True).clamp(0, 255)
        features = model.forward_features(preprocess.normalize(raw))  # type: ignore[operator]
        return F.layer_norm(features.mean(dim=(2, 3)), (features.shape[1],))

    sizes = dict.fromkeys((probe.preprocess.img_size, preprocess.img_size))
    return {f"{size[0]} x {size[1]}": probe.scores(partial(extract, size=size)) for size in sizes}


def test_scores(run: Path, given: argparse.Namespace, out: Path, precision: str) -> dict[str, Any]:
    """kNN and linear probe of a run on the test set, with random weights and raw pixels, by the library's protocol."""
    results = dmjd.evaluation.evaluate_all(
        {"knn": {}, "linear": {}},
        run,
        data=given.data,
        labels=labels_of(given.data),
        out=out,
        device=given.device,
        precision=precision,
        label_fraction=given.label_fraction,
        seeds=1,
    )
    return {
        task: {who: result[who] for who in ("result", "random_init", "raw_pixels")} for task, result in results.items()
    }


class Measures:
    """What a run can measure without labels, on the training images and the loss on the held-out ones.

    Args:
        data: folder of :func:`split`. model, config: of the run. preprocess: of its encoder. device: of the model.
    """

    def __init__(
        self, data: Path, model: MaskedImageModel, config: PretrainConfig, preprocess: Preprocess, device: torch.device
    ) -> None:
        train, test = (open_source(str(data), split=name, labels="column") for name in ("train", "test"))
        self.model = model
        self.quality = FeatureQuality(train, preprocess, device)
        self.held_out = HeldOutLoss(test, config, preprocess, device)

    def __call__(self) -> dict[str, float]:
        """Name -> value."""
        return self.quality(self.model.encoder) | self.held_out(self.model)


class ProbeHook:
    """Probes at given points of a run, written to a file that survives interruptions.

    Args:
        encoder: of the run. probe: evaluates it. points: progress of the run (0 to 1) at each probe, ascending.
        file: JSON lines, progress under "share". measures: what else a line holds.
    """

    def __init__(self, encoder: Encoder, probe: Probe, points: list[float], file: Path, measures: Measures) -> None:
        self.encoder, self.probe, self.points, self.file, self.measures = encoder, probe, points, file, measures
        self.lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        self._began = False

    def __call__(self, report: Report) -> None:
        """Probe when a point has been passed."""
        if not self._began:  # after an interruption, probes later than the checkpoint are repeated
            self.lines = [line for line in self.lines if line["step"] < report.state.step]
            self._began = True
        last = self.lines[-1]["share"] if self.lines else -1.0
        due = [point for point in self.points if last < point <= report.progress]
        if due:
            self.write(due[-1], report.state)

    def write(self, progress: float, state: TrainState) -> None:
        """Probe now."""
        self.lines.append({"share": progress} | asdict(state) | self.probe(self.encoder) | self.measures())
        write_text(self.file, "".join(json.dumps(line) + "\n" for line in self.lines))
