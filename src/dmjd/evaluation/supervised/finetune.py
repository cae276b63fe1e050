"""Fine-tuning as a classifier: the paper's recipe (MAE's), beside the same schedule from random weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dmjd.config.finetune import FinetuneConfig
from dmjd.data.cache import evenly_spaced
from dmjd.data.eval_loader import EvalLoader
from dmjd.data.labeled_loader import LabeledBatches
from dmjd.data.sources.base import Source
from dmjd.data.sources.subset import SubsetSource
from dmjd.encoders.base import Encoder
from dmjd.encoders.classifier import CLASSIFIER_FILE, ImageClassifier, classifier_bytes
from dmjd.encoders.registry import fresh_like, resized
from dmjd.encoders.weights import load_encoder, weights_hash
from dmjd.engine.layer_decay import layer_groups
from dmjd.engine.loop import Task
from dmjd.evaluation.low_shot import LowShot, summarize
from dmjd.evaluation.metrics import accuracies, label_ranks
from dmjd.evaluation.results import data_fingerprint, key_of, versions, write_result
from dmjd.evaluation.setup import config_of, given_data, open_sets
from dmjd.evaluation.supervised.trainer import FitResult, FitSettings, fit, num_steps
from dmjd.figures.confusion import save_confusion_figure
from dmjd.files import write_bytes, write_text

BEST_FILE = "best.safetensors"  # a classifier like the other

EVAL_IMAGES = 2_000  # of the test set, at num_evals while training

MOST_WARMUP = 0.2  # of a run too short for the published five epochs

SCRATCH_LAYER_DECAY = 1.0

INITS = {"result": "pre-trained", "random_init": "from scratch"}


class FinetuneTask(Task):
    """Cross-entropy of a classifier against soft targets."""

    def __init__(self, classifier: ImageClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """(images [b, C, H, W] normalized, targets [b, classes]) -> {"loss"}."""
        images, targets = batch
        return {"loss": nn.functional.cross_entropy(self.classifier(images).float(), targets)}


def finetune(run: str | Path, **options: Any) -> dict[str, Any]:
    """Fine-tune a trained encoder as a classifier, and one with random weights on the same schedule.

    Each training has its own folder below ``evaluation/finetune/``, named by everything it depends on. The same call
    resumes an interrupted training and does not repeat a finished one, the random baseline included.

    From scratch, only layer-wise learning-rate decay is off: it assumes that early layers are trained. The result is
    that of the *last* step. "best" was selected on up to 2,000 test images, so it is optimistic.

    Args:
        run: a run folder; or an encoder file or checkpoint, with ``data`` and ``out``.
        options: settings, the fields of :class:`~dmjd.config.finetune.FinetuneConfig`.

    Returns:
        The content of ``evaluation/finetune.json``: "result" and "random_init" with "top1", "top5", "best", ...

    Raises:
        Stopped: after a signal, with everything saved.
        ValueError: for a mistake of the caller, before training.
    """
    config = FinetuneConfig(**options)
    run = Path(run).expanduser()
    if config.out is None and not run.is_dir() and run.exists():
        raise ValueError(f"{run} is a file: say where the classifier goes with --out DIR")
    folder = Path(config.out).expanduser() if config.out is not None else run
    run_config = config_of(run)
    config = config.replace(flip=options.get("flip", run_config.flip))
    encoder = load_encoder(run)
    given = given_data(config.data, config.test_data, config.labels)
    train, test, test_labels = open_sets(run_config, run, encoder, given)
    trainings = _Trainings(
        config, encoder, train, test, test_labels, folder, config.device, config.num_workers, config.precision
    )
    low_shot = LowShot(config.labels_per_class, config.label_fraction, config.seeds)
    seeds = low_shot.seeds_from(config.seed)
    results = trainings.run_all(seeds, low_shot)
    first = results["result"][0]
    classifier = folder / "evaluation" / "finetune" / CLASSIFIER_FILE
    write_bytes(classifier, (folder / first["folder"] / CLASSIFIER_FILE).read_bytes())
    result = {
        "task": "finetune",
        **{init: summarize([_scores_of(r) for r in each], seeds) for init, each in results.items()},
        "configuration": first["configuration"],
        "overrides": given | low_shot.describe() | config.own(options) | _precision_override(config),
        "data": first["data"],
        "encoder": weights_hash(encoder),
        "seed": config.seed,
        "versions": versions(),
    }
    write_result(folder, "finetune", result)
    return result


def _precision_override(config: FinetuneConfig) -> dict[str, Any]:
    return {} if config.precision == "auto" else {"precision": config.precision}


def _scores_of(result: dict[str, Any]) -> dict[str, Any]:
    """A training's result without what the evaluation says once for all."""
    return {name: value for name, value in result.items() if name not in ("configuration", "data")}


class _Trainings:
    """All trainings of one evaluation: both starts, every seed."""

    def __init__(
        self,
        config: FinetuneConfig,
        encoder: Encoder,
        train: Source,
        test: Source,
        test_labels: Tensor,
        folder: Path,
        device: str,
        num_workers: int | None,
        precision: str,
    ) -> None:
        self.config, self.encoder, self.train, self.test = config, encoder, train, test
        self.test_labels, self.folder, self.device = test_labels, folder, device
        self.num_workers, self.precision = num_workers, precision

    def run_all(self, seeds: list[int], low_shot: LowShot) -> dict[str, list[dict[str, Any]]]:
        """Start of training -> the results of all seeds."""
        assert self.train.labels is not None
        results: dict[str, list[dict[str, Any]]] = {init: [] for init in INITS}
        for seed in seeds:
            rows = low_shot.rows(self.train.labels, seed)
            for init in INITS:
                results[init].append(self.run(init, rows, seed))
        return results

    def run(self, init: str, rows: np.ndarray, seed: int) -> dict[str, Any]:
        """The result of one training; a finished one is read."""
        source = SubsetSource(self.train, rows)
        config = self.config.resolve(len(source), self.encoder.img_size, self.encoder.embed_dim)
        identity = {
            "init": init,
            "seed": seed,
            "encoder": weights_hash(self.encoder) if init == "result" else key_of(self.encoder),
            "data": data_fingerprint(source, self.test),
            "configuration": config.identity() | {"precision": self.precision},
        }
        place = f"evaluation/finetune/{INITS[init].replace(' ', '-')}-seed{seed}-{key_of(self.encoder, identity)}"
        done = self.folder / place / "result.json"
        if done.exists():
            return json.loads(done.read_text(encoding="utf-8"))
        model = self._classifier(config, init, seed)
        assert self.encoder.preprocess is not None
        classes = len(self.train.classes)
        batches = LabeledBatches(source, config, self.encoder.preprocess, classes, seed, self.num_workers)
        fitted = self._fit(model, config, source, batches, init, seed, self.folder / place, identity)
        result = self._verdict(fitted, source, batches.unreadable.count, keep=init == "result")
        result |= {"folder": place, "configuration": identity["configuration"]}
        write_text(done, json.dumps(result, indent=2) + "\n")
        shutil.rmtree(fitted.folder / "checkpoints")  # what is worth keeping has a file of its own
        return result

    def _classifier(self, config: FinetuneConfig, init: str, seed: int) -> ImageClassifier:
        assert config.drop_path is not None
        assert config.test_crop is not None
        if init == "result":
            encoder = resized(self.encoder, drop_path=config.drop_path)
        else:
            encoder = fresh_like(self.encoder, seed=seed, drop_path=config.drop_path)
        model = ImageClassifier(encoder, self.train.classes, config.test_crop)
        model.init_head(seed)
        return model

    def _fit(
        self,
        model: ImageClassifier,
        config: FinetuneConfig,
        source: Source,
        batches: LabeledBatches,
        init: str,
        seed: int,
        folder: Path,
        identity: dict[str, Any],
    ) -> FitResult:
        assert config.batch_size is not None
        assert config.blr is not None
        assert config.layer_decay is not None
        steps = num_steps(config.epochs, config.steps, len(source), config.batch_size)
        epochs = steps * config.batch_size / len(source)
        settings = FitSettings(
            steps=steps,
            batch_size=config.batch_size,
            lr=config.blr * config.batch_size / 256,
            min_lr=config.min_lr,
            warmup=min(MOST_WARMUP, config.warmup_epochs / epochs),
            accumulate=config.accumulate,
            clip_grad=config.clip_grad,
            ema=config.ema,
            seed=seed,
            precision=self.precision,
            num_evals=round(1 / config.eval_every) if config.eval_every else 0,
            device=self.device,
            checkpoint_every=config.checkpoint_every,
            log_every=config.log_every,
        )
        rows = evenly_spaced(len(self.test), EVAL_IMAGES)
        return fit(
            FinetuneTask(model),
            batches,
            layer_groups(model, config.weight_decay, config.layer_decay if init == "result" else SCRATCH_LAYER_DECAY),
            settings,
            folder,
            validate=lambda task: accuracies(self._scores(task, rows)[0]),
            identity=identity,
            num_images=len(source),
            name=f"fine-tuning, {INITS[init]}, seed {seed}",
        )

    def _scores(self, task: nn.Module, rows: np.ndarray | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Rank of the truth, first guess and truth, [n] int64 each, of the readable test images ``rows`` (all)."""
        model = task.classifier
        assert isinstance(model, ImageClassifier)
        device = model.head.weight.device
        preprocess = model.test_preprocess
        ranks, guesses, truths = [], [], []
        for batch in EvalLoader(self.test, preprocess, num_workers=self.num_workers, indices=rows):
            images = model.crop(preprocess.normalize(batch.raw.to(device)))
            truth = self.test_labels[batch.index]
            scores = model(images).float().cpu()  # b, classes
            ranks.append(label_ranks(scores, truth))
            guesses.append(scores.argmax(1))
            truths.append(truth)
        if not ranks:
            raise ValueError(f"none of the {len(self.test)} images of {self.test.name} can be read")
        return torch.cat(ranks), torch.cat(guesses), torch.cat(truths)

    def _verdict(self, fitted: FitResult, source: Source, num_unreadable: int, keep: bool) -> dict[str, Any]:
        """Last and best model on the whole test set; an image of confusions and, with ``keep``, the two as files."""
        model = fitted.model.classifier
        assert isinstance(model, ImageClassifier)
        with fitted.testing():
            ranks, guesses, truths = self._scores(fitted.model)
        if keep:
            write_bytes(fitted.folder / CLASSIFIER_FILE, classifier_bytes(model))
        save_confusion_figure(truths, guesses, self.train.classes, fitted.folder / "confusion.png")
        last = best = accuracies(ranks)
        with fitted.best_weights(), fitted.testing():
            if fitted.best["step"] < fitted.step:  # else it is the last one, which was just tested
                best = accuracies(self._scores(fitted.model)[0])
            if keep:
                write_bytes(fitted.folder / BEST_FILE, classifier_bytes(model))
        return last | {
            "best": {"step": fitted.best["step"], **best},
            "steps": fitted.step,
            "data": {
                "train": self.train.name,
                "test": self.test.name,
                "fingerprint": data_fingerprint(source, self.test),
                "num_train": len(source),
                "num_test": len(ranks),
                "num_unreadable": num_unreadable + len(self.test) - len(ranks),
                "classes": len(self.train.classes),
            },
        }
