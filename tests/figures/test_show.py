"""``dmjd show`` in Python: every kind of figure of a run."""

import json
import shutil
import subprocess
import sys

import pytest
from figure_models import model_for
from PIL import Image

import dmjd
from dmjd.config.pretrain import PretrainConfig
from dmjd.data.sources.registry import open_source
from dmjd.encoders.stored import encoder_bytes, encoder_metadata
from dmjd.encoders.weights import ENCODER_FILE
from dmjd.figures.kinds import KINDS
from dmjd.figures.show import save_reconstruction_figure, show
from dmjd.images.preprocess import Preprocess
from dmjd.runs.build import build_model
from dmjd.runs.checkpoint import RunFolder


@pytest.fixture
def run(tmp_path, image_folder):
    config = PretrainConfig(
        data=str(image_folder), img_size=(32, 48), encoder="vit_tiny_patch8", embed_dim=(32,), depth=(1,), num_heads=2,
        decoder_dim=32, decoder_depth=1, decoder_heads=2,
    )  # fmt: skip
    model = build_model(config)
    model.encoder.preprocess = Preprocess((32, 48))
    folder = RunFolder(tmp_path / "run")
    folder.validate_config(config)
    state = {
        "progress": {"step": 3, "images": 9, "seconds": 1.0},
        "encoder": encoder_metadata(model.encoder),
        "config": json.loads(config.to_json()),
    }
    folder.save(3, {f"model.{key}": value for key, value in model.state_dict().items()}, state)
    folder.close()
    (tmp_path / "run" / ENCODER_FILE).write_bytes(encoder_bytes(model.encoder))
    return tmp_path / "run"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("duplicates", "outliers")])
def test_a_figure_depends_on_the_seed(run, kind, tmp_path):
    first = show(kind, run, out=tmp_path / "a.png", num_images=1)
    again = show(kind, run, out=tmp_path / "b.png", num_images=1)
    other = show(kind, run, out=tmp_path / "c.png", num_images=1, seed=1)
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()


def test_unreadable_images_are_skipped(run, image_folder, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    for i in range(20):
        (few / f"{i}.jpg").write_text("no image")
    with pytest.raises(ValueError, match="no image"):
        show("masks", run, data=few, out=tmp_path / "a.png")
    shutil.copy(next(image_folder.rglob("*.png")), few / "good.png")
    assert show("masks", run, data=few, out=tmp_path / "a.png").exists()


def test_errors_are_explained(run, tmp_path):
    (tmp_path / "empty").mkdir()
    for call, message in [
        (lambda: show("mask", run), "did you mean 'masks'"),
        (lambda: show("neighbours", run), "did you mean 'neighbors'"),
        (lambda: show("masks", tmp_path / "empty"), "is not a run folder"),
        (lambda: show("masks", run, num_images=0), "num_images"),
        (lambda: show("neighbors", run, num_candidates=1), "num_candidates"),
        (lambda: show("attention", tmp_path / "empty"), "holds no encoder.safetensors"),
        (lambda: show("attention", run / ENCODER_FILE), "pass --data"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    for file in (run / "checkpoints").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="no checkpoint yet"):
        show("masks", run)


def test_reconstruction_figures_of_a_model(image_folder, tmp_path):
    model = model_for()
    path = save_reconstruction_figure(model, open_source(image_folder), tmp_path / "images" / "step.png", num_images=2)
    with Image.open(path) as image:
        assert min(image.size) > 300


def test_the_former_module_is_an_error_with_the_new_name():
    with pytest.raises(AttributeError, match=r"dmjd\.visualize' is now 'dmjd\.figures'"):
        _ = dmjd.visualize
    assert all(callable(getattr(dmjd.figures, name)) for name in dmjd.figures.__all__)


def test_the_names_of_the_kinds_import_nothing_slow():
    code = "import sys, dmjd.figures.kinds; print([m for m in ('torch', 'numpy', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": ""}, "run must not be empty"),
        ({"out": ""}, "out must not be empty"),
        ({"out": "figure.xyz"}, "cannot write an image as 'figure.xyz'"),
        ({"data": ""}, "data must not be empty"),
        ({"num_images": 0}, "num_images must be at least 1, got 0"),
        ({"num_images": 10**9}, "num_images must be at most 200"),
        ({"num_images": True}, "num_images must be int, got True"),
        ({"num_candidates": 1}, "num_candidates must be at least 2, got 1"),
        ({"num_candidates": 10**9}, "num_candidates must be at most"),
        ({"seed": float("nan")}, "seed must be int, got nan"),
        ({"seed": -1}, "seed must lie between 0 and"),
        ({"seed": 2**64}, "seed must lie between 0 and"),
        ({"labels": "file"}, "labels must be one of none, folder, column"),
        ({"kind": "mask"}, "did you mean 'masks'"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_opened(changes, message):
    with pytest.raises(ValueError, match=message):
        show(**{"kind": "neighbors", "run": "no-run"} | changes)
