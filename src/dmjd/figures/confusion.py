"""The confusion matrix of a classifier."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix
from torch import Tensor

from dmjd.files import atomic

FEW_CLASSES = 30  # as many have names and numbers in the image of their confusions


def save_confusion_figure(truths: Tensor, guesses: Tensor, classes: list[str], file: Path) -> None:
    """An image of the confusion matrix: rows are the true classes, each in shares of its own images.

    Args:
        truths, guesses: [n] int64 indices into ``classes``.
    """
    count = len(classes)
    shares = confusion_matrix(truths.numpy(), guesses.numpy(), labels=np.arange(count), normalize="true")
    side = min(14.0, 3 + 0.5 * count)
    figure = Figure(figsize=(side, side), layout="constrained")
    few = count <= FEW_CLASSES
    display = ConfusionMatrixDisplay(100 * shares, display_labels=[name[:20] for name in classes])
    display.plot(ax=figure.subplots(), include_values=few, values_format=".0f", cmap="Blues", colorbar=not few)
    display.ax_.set_title("share of each true class, %")
    display.ax_.set_xlabel("answer")
    display.ax_.set_ylabel("truth")
    if few:
        display.ax_.tick_params(axis="x", labelrotation=90)
    else:
        display.ax_.set(xticks=[], yticks=[])
    with atomic(file) as temporary:
        figure.savefig(temporary, format="png")
