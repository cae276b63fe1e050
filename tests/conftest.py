"""Shared fixtures."""

import gc
import os
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from dmjd.figures.grid import save_figure

# Two test processes share the cores; more threads would wait for each other, here and in processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# Compiled modules are kept, also where the environment says otherwise: each of a hundred processes would compile the
# package and rewrite the assertions of all tests again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Nothing that is imported for the collection of the tests is ever freed, so there is nothing to look for.
gc.disable()
# Every run of a test draws two figures. As many pixels as users get would take most of the time of a tiny training.
matplotlib.rcParams["savefig.dpi"] = 30
# Folders whose tests do not look at figures: there they are saved, but blank.
BLANK = {"data", "encoders", "engine", "interop", "nn", "pretraining", "runs", "sources", "tests"}
# The figures that a training leaves, and tests that need what they show.
SAVED_BY_TRAININGS = (
    "dmjd.pretraining.callbacks.save_reconstruction_figure",
    "dmjd.pretraining.callbacks.save_curves_figure",
    "dmjd.evaluation.supervised.finetune.save_confusion_figure",
)
SHOWN = {"test_seams.py", "test_invalid_pixels.py", "test_class_names.py"}


def pytest_collection_finish():
    """From here on only what the tests make is searched for garbage: millions of objects of libraries are not."""
    if "hypothesis" in sys.modules:  # which, imported later, would miss references among what is left out
        gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="module")
def figures_where_they_matter(request):
    """The figures of a tiny run take longer than all else that it does."""

    def leave_blank(canvas: FigureCanvasAgg) -> None:
        canvas.renderer = canvas.get_renderer()
        canvas.renderer.clear()
        if "draw" in vars(canvas.figure):  # how savefig learns of the renderer, to measure a figure
            canvas.figure.draw(canvas.renderer)

    def save_blank(*arguments: object, **options: object) -> Path:
        return save_figure(Figure(figsize=(1, 1)), arguments[-1])

    folder = request.path.parent.name
    with pytest.MonkeyPatch.context() as patch:
        if folder in BLANK:
            patch.setattr(FigureCanvasAgg, "draw", leave_blank)
        if folder in BLANK | {"evaluation"} and request.path.name not in SHOWN:
            for name in SAVED_BY_TRAININGS:
                patch.setattr(name, save_blank)
        yield


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """24 images of different sizes in two class folders."""
    root = tmp_path_factory.mktemp("my images é")
    rng = np.random.default_rng(0)
    for i in range(24):
        folder = root / ("cats" if i % 2 else "dogs")
        folder.mkdir(exist_ok=True)
        height, width = (int(v) for v in rng.integers(40, 90, 2))
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    return root
