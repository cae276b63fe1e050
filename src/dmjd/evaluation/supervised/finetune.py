"""Fine-tuning as a classifier with the recipe of MAE and the paper, from a pre-trained encoder and from scratch."""

import shutil
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from dmjd.config.checks import check_out, check_path
from dmjd.config.finetune import FinetuneConfig
from dmjd.data.cache import evenly_spaced
from dmjd.data.eval_loader import EvalLoader
from dmjd.data.labeled_loader import LabeledBatches
from dmjd.data.sources.base import Source
from dmjd.data.sources.subset import SubsetSource
from dmjd.encoders.base import Encoder, known_preprocess
from dmjd.encoders.classifier import CLASSIFIER_FILE, CLASSIFIER_KEY, ImageClassifier, classifier_bytes, load_classifier
from dmjd.encoders.registry import fresh_like
from dmjd.encoders.stored import weights_hash
from dmjd.encoders.weights import is_shared, load_encoder
from dmjd.engine.console import tracked
from dmjd.engine.loop import Task
from dmjd.evaluation.low_shot import LowShot, describe_labels, summarize
from dmjd.evaluation.metrics import accuracies, label_ranks
from dmjd.evaluation.results import check_results_folder, data_fingerprint
from dmjd.evaluation.setup import config_of, given_data, open_sets, open_validation, recorded
from dmjd.evaluation.supervised.evaluation import STARTS, SupervisedEvaluation, save_comparison
from dmjd.evaluation.supervised.trainer import FitResult, FitSettings, num_steps
from dmjd.evaluation.tables import TOO_SHORT_KEY
from dmjd.evaluation.trained_baselines import TrainedBaseline, describe_baselines, load_baselines
from dmjd.figures.attempt import attempt_figure
from dmjd.figures.confusion import save_confusion_figure
from dmjd.files import digest_of, write_bytes
from dmjd.nn.dropout import set_row_keys

BEST_FILE = "best.safetensors"  # the classifier at its best validation

EVAL_IMAGES = 2_000  # images for validation during training

MAX_WARMUP = 0.2  # fraction of a training that is too short for the published five epochs


class FinetuneTask(Task):
    """Cross-entropy of a classifier with soft targets."""

    def __init__(self, classifier: ImageClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    @property
    def encoder(self) -> Encoder:
        """The classifier's encoder."""
        return self.classifier.encoder

    def forward(self, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
        """(images [b, C, H, W] normalized, targets [b, classes], keys [b] int64) -> {"loss"}."""
        images, targets, keys = batch
        set_row_keys(self.classifier, keys)
        return {"loss": nn.functional.cross_entropy(self.classifier(images).float(), targets)}


def finetune(run: str | Path, **options: Any) -> dict[str, Any]:
    """Fine-tune a pre-trained encoder as a classifier, and one with random weights with the same schedule.

    Each training has its own folder under ``evaluation/finetune/``. Called again, it resumes, and skips what is
    finished. From scratch, layer-wise decay is off. While it trains, it is evaluated on at most 2,000 images of the
    validation part of the data, never on the test part. The result is that of the *last* step on the test part. Without
    a validation part of its own, "best" is selected on test images, so it is biased upwards.

    Args:
        run: a run folder; or an encoder file or checkpoint, with ``data`` and ``out``.
        options: settings, the fields of :class:`~dmjd.config.finetune.FinetuneConfig`.

    Returns:
        The content of ``evaluation/finetune.json``: "result" and "random_init" with "top1", "top5", "best", ...

    Raises:
        Stopped: after a signal; everything is saved.
        ValueError: if settings or data are invalid; raised before training.
    """
    config = FinetuneConfig(**options)
    run = check_path("run", run)
    if config.out is None and not run.is_dir() and (run.exists() or is_shared(run)):
        raise ValueError(f"{run} is not a folder: say where the classifier goes with --out DIR")
    run_config = config_of(run)
    check_results_folder(Path(config.out).expanduser() if config.out is not None else run)
    config = config.replace(flip=options.get("flip", run_config.flip))
    encoder = load_encoder(run)
    others = load_baselines(config.baseline or (), known_preprocess(encoder), trainable=True)
    given = given_data(config)
    train, test, test_labels = open_sets(run_config, run, encoder, given)
    validation = open_validation(run_config, encoder, given, train, test)
    val: dict[str, Any] = {} if validation is None else {"val": validation[0], "val_labels": validation[1]}
    low_shot = LowShot(config.labels_per_class, config.label_fraction, config.seeds)
    machine: dict[str, Any] = {
        "device": config.device,
        "precision": config.precision,
        "num_workers": config.num_workers,
    }
    evaluations, *of_others = (
        [
            Finetuning(config, one, _subset(train, low_shot, seed), test, test_labels, **machine, **val, seed=seed)
            for seed in low_shot.seeds_from(config.seed)
        ]
        for one in (encoder, *(other.encoder for other in others))
        if one is not None
    )
    overrides = recorded(given) | low_shot.describe() | config.given(options)
    if config.precision != "auto":
        overrides["precision"] = config.precision
    folder = check_out("out", config.out) if config.out is not None else run
    return _compare(evaluations, folder, config.seed, overrides, dict(zip(others, of_others, strict=True)))


def _subset(train: Source, low_shot: LowShot, seed: int) -> Source:
    assert train.labels is not None
    return SubsetSource(train, low_shot.rows(train.labels, seed))


def _compare(
    evaluations: list["Finetuning"],
    folder: Path,
    seed: int,
    overrides: dict[str, Any],
    others: Mapping[TrainedBaseline, list["Finetuning"]],
) -> dict[str, Any]:
    """Run all seeds from both starts and of each baseline; write the result and the classifier of the first seed."""
    results: dict[str, list[dict[str, Any]]] = {start: [] for start in STARTS}
    if short := evaluations[0].config.too_short(len(evaluations[0].train)):
        evaluations[0].console.warn(f"finetune: {short}")
    for evaluation in evaluations:
        for start in STARTS:
            results[start].append(evaluation.run(start, folder))
    first = results["result"][0]
    described = {name: first[name] for name in Finetuning.described}
    classifier = _read_classifier(folder / first["folder"])
    described[CLASSIFIER_KEY] = digest_of(classifier)
    described |= {TOO_SHORT_KEY: short} if short else {}
    seeds = [evaluation.seed for evaluation in evaluations]
    summaries = {start: _summary(found, seeds) for start, found in results.items()}
    encoder, scores = evaluations[0].encoder, []
    for other, found in others.items():
        evaluations[0].console.say(f"finetune, baseline {other.name}:")
        scores.append(_summary([evaluation.run("result", folder) for evaluation in found], seeds))
    described |= describe_baselines(encoder, weights_hash(encoder), list(others), scores)
    files = {folder / "evaluation" / "finetune" / CLASSIFIER_FILE: classifier}
    return save_comparison(folder, "finetune", summaries, encoder, seed, files, overrides=overrides, **described)


def _summary(results: list[dict[str, Any]], seeds: list[int]) -> dict[str, Any]:
    """Means over seeds, without what describes the training."""
    return summarize([{k: v for k, v in one.items() if k not in Finetuning.described} for one in results], seeds)


def _read_classifier(folder: Path) -> bytes:
    """The bytes of the classifier of a finished training.

    Raises:
        ValueError: if it is missing or damaged.
    """
    file = folder / CLASSIFIER_FILE
    try:
        load_classifier(file)
        return file.read_bytes()
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}; delete {folder}, and the same command trains it again") from None


class Finetuning(SupervisedEvaluation):
    """Fine-tuning on one training set, from both starts.

    Args:
        config: configuration, which need not be resolved.
        encoder: the pre-trained encoder; it is not changed.
        train, test: labeled sets.
        test_labels: [n] int64, indices into the classes of ``train``.
        val_labels: those of ``val``, if there is such a set.
        others: other arguments of :class:`SupervisedEvaluation`.
    """

    name = "finetune"
    described = ("configuration", "data")
    config: FinetuneConfig

    def __init__(
        self,
        config: FinetuneConfig,
        encoder: Encoder,
        train: Source,
        test: Source,
        test_labels: Tensor,
        *,
        val_labels: Tensor | None = None,
        **others: Any,
    ) -> None:
        config = config.resolve(len(train), encoder.img_size, encoder.embed_dim)
        super().__init__(config, encoder, train, test, **others)
        self.test_labels = test_labels
        self._validated_labels = test_labels if val_labels is None else val_labels

    def identity(self) -> dict[str, Any]:
        """The configuration."""
        return {"configuration": self.config.identity() | {"precision": self.precision}}

    def run(self, start: str, folder: Path) -> dict[str, Any]:
        """See :meth:`SupervisedEvaluation.run`. Checkpoints are deleted; the classifier files are kept."""
        result = super().run(start, folder)
        shutil.rmtree(folder / result["folder"] / "checkpoints", ignore_errors=True)
        return result

    def task(self, start: str) -> FinetuneTask:
        """Build a classifier with a new head."""
        config, preprocess = self.config, known_preprocess(self.encoder)
        assert config.drop_path is not None
        assert config.test_crop is not None
        encoder = fresh_like(self.encoder, seed=self.seed, drop_path=config.drop_path)
        if start == "result":
            encoder.load_state_dict(self.encoder.state_dict())
        model = ImageClassifier(encoder, self.train.classes, config.test_crop)
        model.init_head(self.seed)
        num_classes = len(self.train.classes)
        self._labeled = LabeledBatches(self.train, config, preprocess, num_classes, self.seed, self.num_workers)
        if start == "result":
            self.console.say(f"finetune, seed {self.seed}: {self.parts_text()}")
        return FinetuneTask(model)

    def settings(self) -> FitSettings:
        """Settings of the training."""
        config, num_images = self.config, len(self.train)
        assert config.batch_size is not None
        steps = num_steps(config.epochs, config.steps, num_images, config.batch_size)
        epochs = steps * config.batch_size / num_images
        return FitSettings.from_config(
            config,
            num_images,
            warmup=min(MAX_WARMUP, config.warmup_epochs / epochs),
            ema=config.ema,
            num_evals=round(1 / config.eval_every) if config.eval_every else 0,
            seed=self.seed,
            precision=self.precision,
            device=self.device,
        )

    def batches(self, start_step: int, fabric: Fabric) -> Generator[tuple[Tensor, Tensor, Tensor], None, None]:
        """Augmented images, soft targets and keys."""
        return self._labeled(start_step, fabric)

    def validate(self, task: FinetuneTask) -> dict[str, float]:
        """Accuracies on at most 2,000 images of the validation set, or of the test set if there is none."""
        rows = evenly_spaced(len(self.validated), EVAL_IMAGES)
        return accuracies(self._predict(task, self.validated, self._validated_labels, rows)[0])

    def evaluate(self, fitted: FitResult, start: str) -> dict[str, Any]:
        """Test the last and the best model; save a confusion matrix and, if pre-trained, the classifiers."""
        task = fitted.model
        assert isinstance(task, FinetuneTask)
        with fitted.testing():
            ranks, predictions, labels = self._predict(task, self.test, self.test_labels)
        keep = start == "result"
        if keep:
            write_bytes(fitted.folder / CLASSIFIER_FILE, classifier_bytes(task.classifier))
        file = fitted.folder / "confusion.png"
        attempt_figure(lambda: save_confusion_figure(labels, predictions, self.train.classes, file), self.console)
        last = best = accuracies(ranks)
        with fitted.best_weights(), fitted.testing():
            if fitted.best["step"] < fitted.step:  # otherwise it is the last model, just tested
                best = accuracies(self._predict(task, self.test, self.test_labels)[0])
            if keep:
                write_bytes(fitted.folder / BEST_FILE, classifier_bytes(task.classifier))
        best = {"step": fitted.best["step"], **best}
        return last | {"best": best, "data": self._data(len(ranks))} | self.identity()

    def _data(self, num_test: int) -> dict[str, Any]:
        assert self.train.labels is not None
        return {
            "train": self.train.name,
            "test": self.test.name,
            "fingerprint": data_fingerprint(self.train, self.test),
            **self.described_parts(),
            "num_train": len(self.train),
            "num_test": num_test,
            "num_unreadable": self._labeled.unreadable.count + len(self.test) - num_test,
            "classes": len(self.train.classes),
            **describe_labels(self.train.labels, self.test_labels.numpy()),
        }

    def _predict(
        self, task: FinetuneTask, source: Source, true_labels: Tensor, rows: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Predict readable images ``rows`` (None: all) of a set with labels [n].

        Returns:
            Rank of the label, predicted class and label, [n] int64 each.
        """
        model = task.classifier
        device, preprocess = model.head.weight.device, model.test_preprocess
        ranks, predictions, labels = [], [], []
        loader = EvalLoader(source, preprocess, num_workers=self.num_workers, indices=rows)
        for batch in tracked(loader, f"images of {source.title}", len(loader), lambda batch: batch.size):
            images = model.crop(preprocess.normalize(batch.raw.to(device)))
            label = true_labels[batch.index]
            scores = model(images).float().cpu()  # b, classes
            ranks.append(label_ranks(scores, label))
            predictions.append(scores.argmax(1))
            labels.append(label)
        if not ranks:
            raise ValueError(f"none of the {len(source)} images of {source.name} can be read")
        return torch.cat(ranks), torch.cat(predictions), torch.cat(labels)
