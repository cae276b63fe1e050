"""Evaluations beside trained models: models of timm and other runs, with their own preprocessing, in one pass."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from support import FEATURE_SIZE, mistake, tiny_encoder

from dmjd.cli.main import main
from dmjd.data.sources.folder import FolderSource
from dmjd.data.sources.registry import open_source
from dmjd.encoders.registry import create_encoder
from dmjd.encoders.stored import encoder_bytes, weights_hash
from dmjd.encoders.weights import ENCODER_FILE
from dmjd.evaluation.comparability import redo_command
from dmjd.evaluation.compare import compare, comparison_figure, comparison_tables
from dmjd.evaluation.frozen.features import Features, extract, extract_all
from dmjd.evaluation.frozen.knn import knn
from dmjd.evaluation.results import read_evaluation, write_result
from dmjd.evaluation.run import evaluate
from dmjd.evaluation.tables import context_lines, training_text
from dmjd.evaluation.trained_baselines import load_baselines, locate_baseline
from dmjd.images.preprocess import Preprocess


@pytest.fixture(scope="module")
def cnn(tmp_path_factory) -> Path:
    """A convolutional model of timm in a folder, for images of 40 pixels."""
    folder = tmp_path_factory.mktemp("models") / "resnet"
    torch.manual_seed(0)
    overlay = {"input_size": (3, 40, 40), "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.4, 0.3)}
    model = timm.create_model("test_resnet", pretrained_cfg_overlay=overlay)
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    """A vision transformer of timm in a folder, for images of 32 pixels."""
    folder = tmp_path_factory.mktemp("models") / "vit"
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    timm.models.save_for_hf(model, folder, model_args=sizes, safe_serialization=True)
    return folder


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """Names of the images that are decoded."""
    names: list[str] = []
    read = FolderSource.read
    monkeypatch.setattr(FolderSource, "read", lambda self, i: (names.append(self.describe(i)), read(self, i))[1])
    return names


def test_a_cnn_and_a_run_are_measured_as_alone_with_each_image_read_once(run, cnn, tmp_path, reads):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / ENCODER_FILE).write_bytes(encoder_bytes(tiny_encoder(seed=7)))
    alone = evaluate("knn", other, k=3, out=tmp_path / "alone")["result"]
    reads.clear()
    result = evaluate("knn", run, k=3, baseline=[f"local-dir:{cnn}", str(other)], num_workers=0)
    assert len(reads) == len(set(reads)) == 24 + 12
    assert read_evaluation(run / "evaluation" / "knn.json") == result
    assert set(result["baselines"]) == {"resnet", "other"}
    assert result["baselines"]["other"]["result"] == alone
    assert result["baselines"]["other"]["weights"] == weights_hash(tiny_encoder(seed=7))
    assert result["baselines"]["resnet"]["img_size"] == [40, 40]

    model = timm.create_model(f"local-dir:{cnn}", pretrained=True, num_classes=0).eval()
    preprocess = Preprocess((40, 40), 3, (0.1, 0.2, 0.3), (0.5, 0.4, 0.3))
    sets = [open_source(run.parent / "my data", split=split, labels="folder") for split in ("train", "test")]
    with torch.no_grad():
        xs = [model(preprocess([one.stored(i) for i in range(len(one))])) for one in sets]
    train, test = (
        Features(F.layer_norm(x, x.shape[1:], eps=1e-6), torch.as_tensor(one.labels), torch.arange(len(one)))
        for x, one in zip(xs, sets, strict=True)
    )
    assert result["baselines"]["resnet"]["result"] == knn(train, test, k=3)  # the one class of the test set is 0


def test_other_sizes_are_made_from_the_same_image(image_folder):
    """In one pass, and with worker processes, features are those of a pass of their own."""
    source, encoder = open_source(image_folder, labels="folder"), tiny_encoder()
    other = create_encoder("vit_tiny_patch8", img_size=24, embed_dim=32, depth=1, num_heads=2).eval()
    other.preprocess = Preprocess((24, 24), 3, (0.2, 0.3, 0.4))
    parts = {"one": lambda x: encoder.encode(x), "two": lambda x: other.encode(x)}
    for workers in (0, 1):
        both = extract_all(
            parts, source, encoder.preprocess, own={"two": other.preprocess}, batch_size=7, num_workers=workers
        )
        for name, model in (("one", encoder), ("two", other)):
            torch.testing.assert_close(both[name].x, extract(model, source).x, rtol=1e-4, atol=1e-4)


def test_one_baseline_more_does_not_measure_the_others_again(run, cnn, vit, monkeypatch):
    evaluate("knn", run, baseline=[str(cnn)])
    before = json.loads((run / "evaluation" / "knn.json").read_text())
    calls = []
    monkeypatch.setattr(
        "dmjd.evaluation.frozen.protocol.extract_all",
        lambda extractors, *args, **kwargs: (calls.append(set(extractors)), extract_all(extractors, *args, **kwargs))[
            1
        ],
    )
    after = evaluate("knn", run, baseline=[str(vit), str(cnn)])
    assert calls == [{"result", "baseline 0"}] * 2  # the encoder and the new one, on both sets
    assert after["baselines"]["resnet"] == before["baselines"]["resnet"]
    assert after["overrides"] == {}  # the encoder's own result depends on none of them


def test_all_frozen_tasks_take_baselines(run, cnn, vit):
    """The sweep searches layers of encoders of ours, and takes the pooled feature of a model of timm."""
    result = evaluate("linear_sweep", run, epochs=2, baseline=[str(cnn), str(run)])
    assert result["baselines"]["resnet"]["result"]["features"] == "pooled by timm"
    line = (
        "linear_sweep: resnet has one feature, the one that timm pools; layers and poolings are searched for encoders"
    )
    assert [text for text in context_lines({"linear_sweep": result}, None) if text.startswith(line)]
    alone = evaluate("linear_sweep", run, epochs=2, baseline=[str(run)])
    assert not [text for text in context_lines({"linear_sweep": alone}, None) if "timm pools" in text]
    assert result["baselines"]["run"]["result"] == result["result"]
    assert result["baselines"]["run"]["result"]["features"].startswith("block ")
    assert set(evaluate("linear", run, epochs=2, baseline=vit)["baselines"]) == {"vit"}


def test_names_of_baselines_stay_different(run, cnn, tmp_path):
    twin = tmp_path / "deep" / "resnet"
    shutil.copytree(cnn, twin)
    found = load_baselines([cnn, twin, f"local-dir:{cnn}"], Preprocess(FEATURE_SIZE))
    assert [one.name for one in found] == [f"{cnn.parent.name}/resnet", "deep/resnet"]
    file = run / ENCODER_FILE
    assert [one.name for one in load_baselines([file], Preprocess(FEATURE_SIZE))] == [f"run/{ENCODER_FILE}"]


def test_fine_tuning_beside_a_vit_and_a_run(run, vit, cnn, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    options = {"steps": 2, "device": "cpu", "num_workers": 0}
    result = evaluate("finetune", run, **options, baseline=[str(vit), str(other)])
    assert {name: set(one["result"]) >= {"top1", "best", "steps"} for name, one in result["baselines"].items()} == {
        "vit": True,
        "other": True,
    }
    assert result["baselines"]["other"]["result"]["top1"] == result["result"]["top1"]  # the same weights
    assert result["baselines"]["vit"]["img_size"] == [32, 32]
    before = {file: file.stat().st_mtime_ns for file in run.rglob("result.json")}
    assert evaluate("finetune", run, **options, baseline=[str(vit), str(other)]) == result
    assert {file: file.stat().st_mtime_ns for file in run.rglob("result.json")} == before
    capsys.readouterr()
    flags = ["--steps", "2", "--device", "cpu", "--num-workers", "0"]
    error = mistake(capsys, "evaluate", "finetune", run, *flags, "--baseline", f"local-dir:{cnn}")
    assert "cannot be fine-tuned here, only evaluated frozen" in error
    assert "ResNet" in error


def test_the_command_shows_baselines_with_their_training(run, cnn, capsys):
    flags = ["--device", "cpu", "--baseline", f"local-dir:{cnn}", "--baseline", str(run)]
    assert main(["evaluate", "knn", str(run), *flags]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if "│" in line]
    assert [row.split("│")[1].strip() for row in rows] == [
        "this encoder",
        "resnet",
        "run",
        "random initialization",
        "raw pixels",
    ]
    result = read_evaluation(run / "evaluation" / "knn.json")
    assert redo_command("knn", run, result) == f"dmjd evaluate knn {run} --baseline local-dir:{cnn} --baseline {run}"


@pytest.mark.parametrize(
    ("training", "text"),
    [
        ({"minutes": None, "device": None, "images": None}, "-"),
        (
            {"minutes": 12.04, "device": "CPU, 2 threads", "images": 96000},
            "12.0 min, CPU, 2 threads; 96,000 images seen",
        ),
        ({"minutes": 600, "device": "NVIDIA H100", "images": None}, "10.0 h, NVIDIA H100"),
        ({}, "-"),
    ],
)
def test_the_cost_of_a_training_in_words(training, text):
    assert training_text(training) == text


def test_runs_are_compared_beside_their_baselines(run, cnn, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    for folder in (run, other):
        evaluate("knn", folder, baseline=[str(cnn)])
    comparison = compare(run, other)
    (found,) = comparison.baselines.values()
    assert {name: one.runs for name, one in found.items()} == {"resnet": ("run", "other")}  # measured twice, shown once
    table = comparison_tables(comparison)[0]
    assert [str(cell) for cell in table.columns[0].cells] == ["run", "other", "baseline resnet"]
    assert len(comparison_figure(comparison).axes[0].lines) > 0
    content = read_evaluation(other / "evaluation" / "knn.json")
    content["baselines"]["resnet"]["weights"] = "0" * 16
    write_result(other, "knn", content)
    assert list(compare(run, other).baselines["knn", "top1"]) == ["resnet (run)", "resnet (other)"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("timm/", "timm/ lacks the name of a model: give one, such as timm/vit_small_patch16_224"),
        ("timm/resnet5O", r"timm has no model 'resnet5O'; did you mean 'resnet50'"),
        ("timm/resnet50.a1_in2k", r"did you mean 'resnet50\.a1_in1k'"),
        ("resnet5O", r"no baseline 'resnet5O'; did you mean 'timm/resnet50'"),
        ("runs/missing", r"no baseline 'runs/missing'\. Give a run folder, an encoder file, timm/NAME"),
        ("local-dir:missing", r"--baseline local-dir:missing: there is no folder missing"),
        ("", "must not be empty"),
    ],
)
def test_an_unknown_baseline_is_named_with_a_suggestion(source, message):
    with pytest.raises(ValueError, match=message):
        locate_baseline(source)


def test_without_a_network_the_message_says_where_it_was_searched(run, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("dmjd.hub._reachable", lambda endpoint: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    error = mistake(capsys, "evaluate", "knn", run, "--device", "cpu", "--baseline", "timm/resnet18.a1_in1k")
    assert "--baseline local-dir:FOLDER" in error
    assert "cannot be reached, and they are not in its cache" in error


def test_a_baseline_of_other_channels_or_values_is_one_line(run, tmp_path, capsys):
    for name, preprocess in (
        ("six", Preprocess(FEATURE_SIZE, 6, (0.5,) * 6, (0.2,) * 6)),
        ("range", Preprocess(FEATURE_SIZE, 3, value_range=(0.0, 1000.0))),
    ):
        encoder = create_encoder(
            "vit_tiny_patch8", img_size=FEATURE_SIZE, in_chans=preprocess.in_chans, embed_dim=32, depth=1, num_heads=2
        )
        encoder.preprocess = preprocess
        (tmp_path / f"{name}.safetensors").write_bytes(encoder_bytes(encoder))
    flags = ["--device", "cpu", "--baseline"]
    error = mistake(capsys, "evaluate", "knn", run, *flags, tmp_path / "six.safetensors")
    assert "takes images of 6 channels, the evaluated encoder of 3" in error
    assert "value range (0.0, 1000.0)" in mistake(
        capsys, "evaluate", "knn", run, *flags, tmp_path / "range.safetensors"
    )
    assert not (run / "evaluation" / "knn.json").exists()


def test_a_gray_encoder_beside_a_color_model(run, cnn, tmp_path):
    """The gray images are repeated as three channels, as when a color model reads them."""
    encoder = create_encoder("vit_tiny_patch8", img_size=FEATURE_SIZE, in_chans=1, embed_dim=32, depth=1, num_heads=2)
    encoder.preprocess = Preprocess(FEATURE_SIZE, 1, (0.5,), (0.2,))
    (tmp_path / "gray.safetensors").write_bytes(encoder_bytes(encoder))
    data = {"data": run.parent / "my data", "labels": "folder"}
    result = evaluate("knn", tmp_path / "gray.safetensors", **data, baseline=[str(cnn)])
    assert 0 <= result["baselines"]["resnet"]["result"]["top1"] <= 1


def test_a_model_that_does_not_pool_is_refused(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", global_pool="", pretrained_cfg_overlay={"input_size": (3, 32, 32)})
    timm.models.save_for_hf(model, tmp_path / "maps", model_args={"global_pool": ""}, safe_serialization=True)
    with pytest.raises(ValueError, match=r"features of shape \[\d+, \d+, \d+\] for an image"):
        load_baselines([tmp_path / "maps"], Preprocess(FEATURE_SIZE))
