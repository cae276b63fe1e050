"""The confusion matrix of a classifier."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from dmjd.figures.grid import save_figure
from dmjd.text import drawable

MANY_CLASSES = 30  # with more, names and numbers do not fit into the figure


def save_confusion_figure(truths: Tensor, predictions: Tensor, classes: list[str], file: Path) -> None:
    """Write the confusion matrix: one row per ground-truth class, in percent of its images.

    Args:
        truths, predictions: [n] int64 indices into ``classes``.
    """
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix  # slow to import

    count = len(classes)
    shares = confusion_matrix(truths.numpy(), predictions.numpy(), labels=np.arange(count), normalize="true")
    side = min(14.0, 3 + 0.5 * count)
    figure = Figure(figsize=(side, side), layout="constrained")
    named = count <= MANY_CLASSES
    display = ConfusionMatrixDisplay(100 * shares, display_labels=[drawable(name, 20) for name in classes])
    display.plot(ax=figure.subplots(), include_values=named, values_format=".0f", cmap="Blues", colorbar=not named)
    display.ax_.set(title="percent of each ground-truth class", xlabel="prediction", ylabel="ground truth")
    if named:
        display.ax_.tick_params(axis="x", labelrotation=90)
    else:
        display.ax_.set(xticks=[], yticks=[])
    save_figure(figure, file)
