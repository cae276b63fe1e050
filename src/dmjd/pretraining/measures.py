"""What a pre-training run measures at its evaluations: kNN with labels, and without them features and held-out loss."""

from collections.abc import Callable, Collection, Mapping

from dmjd.config.pretrain import PretrainConfig
from dmjd.data.sources.base import Source
from dmjd.data.unreadable import Report
from dmjd.encoders.registry import fresh_like
from dmjd.engine.console import Console
from dmjd.evaluation.frozen.drift import NUM_IMAGES as DRIFT_IMAGES
from dmjd.evaluation.frozen.drift import Drift
from dmjd.evaluation.frozen.online_knn import OnlineKnn
from dmjd.evaluation.frozen.quality import LEAST_IMAGES, FeatureQuality
from dmjd.model import MaskedImageModel
from dmjd.pretraining.budget import EvaluationBudget
from dmjd.pretraining.held_out import HeldOutLoss
from dmjd.runs.checkpoint import RunFolder
from dmjd.runs.health import warnings_of
from dmjd.runs.metrics import read_metrics

KNN, DRIFT, FEATURES, HELD_OUT = "online kNN", "drift from the start", "features without labels", "held-out loss"

NAMES = (KNN, DRIFT, FEATURES, HELD_OUT)

START_FEATURES = "start_features.safetensors"  # in the folder of a run that began from trained weights


class Measures:
    """All measures of a run. One that fails, e.g. because no image can be read, is left out from then on.

    Args:
        config, model, folder: of the run; the encoder has its preprocessing.
        console: for messages.
        budget: whose ``once`` covers what only the first evaluation does.

    Attributes:
        num_images: images that an evaluation encodes.
        unreadable: (name, reason) of held-out images that could not be read.
    """

    def __init__(
        self,
        config: PretrainConfig,
        model: MaskedImageModel,
        folder: RunFolder,
        console: Console,
        budget: EvaluationBudget,
    ) -> None:
        assert model.encoder.preprocess is not None
        self._config, self._model, self._console, self._budget = config, model, console, budget
        self._start_features = folder.path / START_FEATURES
        self._preprocess = model.encoder.preprocess
        self._device = next(model.parameters()).device.type
        self._measures: dict[str, Callable[[], dict[str, float]]] = {}  # by name in messages
        self._baselines: dict[str, float] = {}
        self._lines = read_metrics(folder.metrics) if folder.metrics.exists() else []
        self._warned: set[str] = set()
        self.num_images = 0
        self.unreadable: list[Report] = []

    def start(self, source: Source, held_out: Source | None, test: Source | None, fresh: bool) -> None:
        """Prepare the measures.

        Args:
            source: the images to train on.
            held_out: images that are not trained on.
            test: labeled test set for kNN, if there are labels.
            fresh: whether the run has not begun: then the encoder has its starting weights.

        Raises:
            ValueError: if labels cannot be used.
        """
        given = (self._preprocess, self._device)
        if self._config.init is not None:
            try:
                encoder = self._model.encoder if fresh else None
                drift = Drift(source, self._preprocess, self._start_features, encoder, self._device)
                self._add(DRIFT, lambda: drift(self._model.encoder), DRIFT_IMAGES)
            except ValueError as error:
                self._console.warn(f"drift from the starting weights is not measured: {error}")
        if test is not None:
            knn = OnlineKnn(source, test, *given)
            self._add(KNN, lambda: self._measure_knn(knn), knn.num_images)
        if len(source) >= LEAST_IMAGES:
            quality = FeatureQuality(source, *given)
            self._add(FEATURES, lambda: self._measure_features(quality), quality.num_images)
        if held_out is not None:
            loss = HeldOutLoss(held_out, self._config, *given)
            self._add(HELD_OUT, lambda: self._measure_held_out(loss), loss.num_images)

    def _add(self, name: str, measure: Callable[[], dict[str, float]], num_images: int) -> None:
        self._measures[name] = measure
        self.num_images += num_images

    def __call__(self, step: int, when: str, names: Collection[str] = NAMES) -> dict[str, float]:
        """Measure, show and return what ``names`` says; ``when`` begins the lines, e.g. "step 100"."""
        scores: dict[str, float] = {}
        for name in [name for name in self._measures if name in names]:
            try:
                scores |= self._measures[name]()
            except ValueError as error:
                self._console.warn(f"{name}: not measured: {error}")
                del self._measures[name]
        for line in lines_of(scores):
            self._console.say(f"{when}: {line}")
        self._lines.append({"step": step} | scores)
        for kind, warning in warnings_of(self._config, self._lines).items():
            if kind not in self._warned:
                self._console.warn(f"{when}: {warning}")
                self._warned.add(kind)
        return scores

    def _measure_knn(self, knn: OnlineKnn) -> dict[str, float]:
        """Accuracy of online kNN and its baselines."""
        if not self._baselines:
            fresh = fresh_like(self._model.encoder, seed=self._config.seed).to(self._device)
            with self._budget.once():
                self._baselines = knn.baselines(fresh)
        return {"knn_top1": knn(self._model.encoder)} | self._baselines

    def _measure_features(self, quality: FeatureQuality) -> dict[str, float]:
        with self._budget.once():
            quality.read()
        return quality(self._model.encoder)

    def _measure_held_out(self, loss: HeldOutLoss) -> dict[str, float]:
        with self._budget.once():
            loss.read()
        self.unreadable = loss.unreadable
        return loss(self._model)


def lines_of(scores: Mapping[str, float]) -> list[str]:
    """What was measured, in words: one line for kNN, one for the drift, one for measures without labels."""
    lines = []
    if knn := {name: value for name, value in scores.items() if name.startswith("knn_")}:
        shown = ", ".join(f"{name.removeprefix('knn_')} {100 * value:.1f}" for name, value in knn.items())
        lines.append(f"online kNN, %: {shown}")
    if "drift_cosine" in scores:
        lines.append(
            f"features against those at the start: cosine {scores['drift_cosine']:.3f}, "
            f"shared neighbors {100 * scores['drift_neighbors']:.0f} %"
        )
    words = {
        "held_out_loss": "held-out loss {:.4f}",
        "effective_rank": "effective rank {:.1f}",
        "neighbors_kept": "{:.0%} of the neighbors kept",
    }
    if measured := [text.format(scores[name]) for name, text in words.items() if name in scores]:
        lines.append(", ".join(measured))
    return lines
