"""Comparison of runs: their scores, and the settings in which they differ."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
from rich.console import Console
from support import GOLDEN

from dmjd.cli.main import main
from dmjd.config.pretrain import PretrainConfig
from dmjd.evaluation.comparability import EARLIER, redo_command
from dmjd.evaluation.compare import Comparison, Score, compare, comparison_figure, comparison_tables
from dmjd.warning import DMJDWarning


def result(top1: float, **changes) -> dict:
    """A shortened version of what an evaluation writes."""
    parts = {"result": {"top1": top1, "top5": 0.9}, "random_init": {"top1": 0.1}, "raw_pixels": {"top1": 0.3}}
    rest = {"configuration": {"k": 20}, "seed": 0, "data": {"train": "d", "fingerprint": "a/b"}}
    return parts | rest | changes


def run_folder(path, results: dict, **settings):
    (path / "evaluation").mkdir(parents=True)
    (path / "config.json").write_text(PretrainConfig(data="d", out=str(path), **settings).to_json())
    for task, content in results.items():
        (path / "evaluation" / f"{task}.json").write_text(json.dumps(content))
    return path


@pytest.fixture
def runs(tmp_path):
    first = run_folder(tmp_path / "x" / "run", {"knn": result(0.5), "linear": result(0.75)}, theta=1.0)
    segmentation = {
        "result": {"mean_iou": 0.4, "mean_iou_std": 0.02},
        "random_init": {"mean_iou": None},
    }
    second = run_folder(
        tmp_path / "y" / "run",
        {"knn": result(0.25, configuration={"k": 5}), "segmentation": segmentation},
        theta=4.0,
        checkpoint_every=7,
    )
    (second / "evaluation" / "baselines.json").write_text('{"0123": {"top1": 0.1}}')
    return first, second


def printed(found) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in comparison_tables(found):
        console.print(table)
    return console.export_text()


def test_scores_and_what_differs(runs):
    found = compare(*runs)
    assert found.runs == ["x/run", "y/run"]
    assert list(found.scores) == [("knn", "top1"), ("linear", "top1"), ("segmentation", "mean_iou")]
    assert found.scores["knn", "top1"]["y/run"] == {
        "result": Score(0.25),
        "random_init": Score(0.1),
        "raw_pixels": Score(0.3),
    }
    assert set(found.scores["linear", "top1"]) == {"x/run"}
    assert found.scores["segmentation", "mean_iou"]["y/run"] == {"result": Score(0.4, 0.02)}
    assert found.differences == {"theta": ["1.0", "4.0"], "knn.k": ["20", "5"]}
    text = printed(found)
    assert all(word in text for word in ("50.0", "75.0", "40.0 ± 2.0", "theta", "knn.k"))


def test_evaluations_on_different_data_are_distinguished(runs):
    file = runs[0] / "evaluation" / "knn.json"
    file.write_text(json.dumps(result(0.5, data={"fingerprint": "c/d"}, seed=1)))
    differences = compare(*runs).differences
    assert differences["knn.data"] == ["c/d", "a/b"]
    assert differences["knn.seed"] == ["1", "0"]


def test_other_images_and_another_teacher_are_differences(tmp_path):
    """Both may change on resume, because files move."""
    first, second = (
        run_folder(tmp_path / name, {"knn": result(0.5)}, target="teacher", teacher=name) for name in ("one", "two")
    )
    settings = json.loads((second / "config.json").read_text())
    (second / "config.json").write_text(json.dumps(settings | {"data": "other"}))
    assert compare(first, second).differences == {"data": ["d", "other"], "teacher": ["one", "two"]}


def test_a_run_does_not_differ_from_itself(runs):
    found = compare(runs[0], f"{runs[0]}/")
    assert found.runs == ["run"]
    assert not found.differences
    assert "settings that differ" not in printed(found)


def test_a_bar_for_each_result_and_marks_for_its_baselines(runs):
    figure = comparison_figure(compare(*runs))
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "knn: top1, %",
        "linear: top1, %",
        "segmentation: mean_iou, %",
    ]
    knn, linear, segmentation = figure.axes
    assert [patch.get_width() for patch in knn.patches] == [50, 25]
    assert [line.get_xdata()[0] for line in knn.lines] == [10, 30, 10, 30]
    assert [label.get_text() for label in linear.get_yticklabels()] == ["x/run", "y/run"]
    assert [text.get_text() for text in linear.texts] == ["75.0", "-"]  # each number once, at its bar
    assert [patch.get_width() for patch in segmentation.patches] == [40]


def test_the_command_prints_tables_and_draws(runs, tmp_path, capsys):
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "new" / "bars.png")]) == 0
    assert "theta" in capsys.readouterr().out
    assert (tmp_path / "new" / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_errors_say_what_to_do(runs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()

    def refused(message: str, *arguments: object) -> None:
        assert main(["compare", *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err

    refused("holds no evaluation/*.json: make one with dmjd evaluate knn", *runs, tmp_path / "empty")
    refused("end it in .png", *runs, "--out", tmp_path / "bars.xyz")
    file = runs[0] / "evaluation" / "knn.json"
    for content in ("{", "[]", '{"result": 3}'):
        file.write_text(content)
        refused(f"{file} is not a result of dmjd evaluate", *runs)
    file.write_text('{"result": {"note": "x"}}')
    refused("has no number in its result", *runs)
    file.unlink()
    (runs[0] / "config.json").write_text("{")
    refused("config.json is not a run's configuration", *runs)
    with pytest.raises(ValueError, match="at least one run"):
        compare()


def test_settings_of_former_versions_are_compared_under_their_new_names(runs):
    config = json.loads((runs[0] / "config.json").read_text())
    config["max_bad"] = config.pop("max_unreadable")
    (runs[0] / "config.json").write_text(json.dumps(config | {"theta": 4.0}))
    for run, name in zip(runs, ("looks", "num_evals"), strict=True):
        (run / "evaluation" / "knn.json").write_text(json.dumps(result(0.5, configuration={name: 3})))
    assert not compare(*runs).differences


def test_names_of_runs_are_shown_as_they_are(tmp_path, capsys, monkeypatch):
    """Rich would read [lr=1e-3] as markup and show both runs as "exp"."""
    monkeypatch.setenv("COLUMNS", "250")
    names = ["exp[lr=1e-3]", "exp[lr=1e-4]", "[b]x[b]", "$x_1$", ":smile:", "a\x1b[31mb", "caf\udce9", "_x"]
    folders = [run_folder(tmp_path / name, {"knn": result(0.5)}, seed=i) for i, name in enumerate(names)]
    assert main(["compare", *map(str, folders), "--out", str(tmp_path / "bars.png")]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in names[:5])
    assert "a\\x1b[31mb" in out
    assert "caf\\udce9" in out
    labels = [label.get_text() for label in comparison_figure(compare(*folders)).axes[0].get_yticklabels()]
    assert labels[0] == "exp[lr=1e-3]"
    assert labels[3] == r"\$x_1\$"
    assert (tmp_path / "bars.png").exists()


def test_an_empty_name_is_not_the_current_folder(runs, monkeypatch):
    monkeypatch.chdir(runs[0])
    with pytest.raises(ValueError, match="run must not be empty"):
        compare("")
    with pytest.raises(ValueError, match="out must not be empty"):
        compare(*runs, out="")


def test_a_chart_of_very_many_runs_can_be_drawn(tmp_path):
    scores = {("knn", "top1"): {}, ("linear", "top1"): {}}
    many = Comparison([f"run {i}" for i in range(1000)], scores, {})
    figure = comparison_figure(many)
    assert max(figure.get_size_inches()) * figure.dpi < 2**16


def test_other_test_sets_and_label_counts_are_not_ranked_together(tmp_path):
    """The first run of a task is what the others are compared with; the reason stands in the row, and at the bar."""
    data = {"train": "d", "test": "d", "fingerprint": "a/b", "num_train": 100, "num_test": 2000}
    low_shot = {"configuration": {"labels_per_class": 5}}
    few = {"num_train": 50, "labels_per_class": [5, 5]}
    contents = {
        "first": result(0.5, data=data),
        "other_test": result(0.9, data=data | {"fingerprint": "a/c", "test": "/x/y/test"}),
        "few": result(0.8, data=data | few | {"fingerprint": "d/b"}, **low_shot),
        "same": result(0.4, data=data),
    }
    folders = [run_folder(tmp_path / name, {"knn": one}) for name, one in contents.items()]
    found = compare(*folders)
    assert found.notes["knn", "top1"] == {
        "other_test": "not comparable: other test set",
        "few": "not comparable: other number of labels",
    }
    assert found.tested["knn", "top1"]["few"] == ("d: 2,000 images", "5 labels a class")
    assert found.tested["knn", "top1"]["other_test"] == ("y/test: 2,000 images", "100 labels")
    text = printed(found)
    order = [text.index(f" {name} ") for name in ("first", "same", "other_test", "few")]
    assert order == sorted(order)  # those that are not comparable stand below
    assert "(not comparable: other test set)" in text
    figure = comparison_figure(found)
    assert [patch.get_alpha() for patch in figure.axes[0].patches] == [1.0, 0.35, 0.35, 1.0]
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[1].endswith("\nnot comparable: other test set")


def test_low_shot_results_of_other_seeds_are_comparable(tmp_path):
    """They draw other images of the same set, as many of each class."""
    low_shot = {"overrides": {"labels_per_class": 5}}
    sets = [{"train": name, "fingerprint": f"{name}{i}/b", "num_train": 50} for i, name in enumerate("ddx")]
    folders = [
        run_folder(tmp_path / f"run{i}", {"knn": result(0.5, data=data, seed=i, **low_shot)})
        for i, data in enumerate(sets)
    ]
    assert compare(*folders).notes["knn", "top1"] == {"run2": "not comparable: other training images"}


def test_results_of_earlier_weights_are_marked_with_the_command_that_measures_again(tmp_path):
    """The flags that were given are those of the command; runs of version 0.1 are recognized by their encoder file."""
    run = shutil.copytree(GOLDEN / "run_v0.1", tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = compare(run, GOLDEN / "run_v0.1")
    assert not any(found.notes.values())
    shutil.copy(GOLDEN / "run_v0.1_nine_steps.safetensors", run / "encoder.safetensors")  # it was trained on
    with pytest.warns(DMJDWarning) as caught:
        found = compare(run, GOLDEN / "run_v0.1")
    assert found.notes["knn", "top1"] == {found.runs[0]: EARLIER}
    texts = [str(one.message) for one in caught]
    command = f"dmjd evaluate knn {run} --labels-per-class 5"
    assert f"{run}: knn was measured before the run went on; measure again: {command}" in texts


def test_commands_that_measure_again():
    given = {"data": "my images", "labels": "folder", "flip": False, "crop_scale": [0.5, 1.0]}
    assert redo_command("finetune", Path("runs/a"), {"overrides": given, "seed": 3}) == (
        "dmjd evaluate finetune runs/a --data 'my images' --labels folder --no-flip --crop-scale 0.5 1.0 --seed 3"
    )


def test_teacher_and_init_are_among_the_settings_that_differ(tmp_path):
    taught = run_folder(tmp_path / "a", {"knn": result(0.5)}, target="teacher", teacher="vit_tiny_patch16_224")
    begun = run_folder(tmp_path / "b", {"knn": result(0.5)}, init="runs/x", labels="folder")
    differences = compare(taught, begun).differences
    assert differences["teacher"] == ["vit_tiny_patch16_224", "-"]
    assert differences["init"] == ["-", "runs/x"]
    assert "labels" not in differences  # they do not change the weights
