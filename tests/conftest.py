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
from PIL import Image

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
# Folders whose tests do not look at figures: there they are made and saved, but blank.
BLANK = {"data", "encoders", "engine", "interop", "nn", "pretraining", "runs", "sources", "tests"}


def pytest_collection_finish():
    """From here on only what the tests make is searched for garbage: millions of objects of libraries are not."""
    if "hypothesis" in sys.modules:  # which, imported later, would miss references among what is left out
        gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="module")
def figures_where_they_matter(request):
    """Drawing two figures takes twice as long as all else that a tiny run does."""

    def leave_blank(canvas: FigureCanvasAgg) -> None:
        canvas.renderer = canvas.get_renderer()
        canvas.renderer.clear()
        if "draw" in vars(canvas.figure):  # how savefig learns of the renderer, to measure a figure
            canvas.figure.draw(canvas.renderer)

    with pytest.MonkeyPatch.context() as patch:
        if request.path.parent.name in BLANK:
            patch.setattr(FigureCanvasAgg, "draw", leave_blank)
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
