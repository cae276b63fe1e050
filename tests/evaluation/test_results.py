"""Results as files: none is lost, and a result is reused only for the same weights and settings."""

import json

from support import tiny_encoder

from dmjd.evaluation.results import Baselines, read_result, write_result
from dmjd.evaluation.run import evaluate


def test_an_earlier_result_is_never_lost(tmp_path):
    for top1 in (0.1, 0.1, 0.2, 0.3):  # an equal result is not kept twice
        write_result(tmp_path, "knn", {"result": {"top1": top1}})

    def top1(name):
        return json.loads((tmp_path / "evaluation" / name).read_text())["result"]["top1"]

    assert [top1(name) for name in ("earlier/knn-1.json", "earlier/knn-2.json", "knn.json")] == [0.1, 0.2, 0.3]
    assert len(list((tmp_path / "evaluation" / "earlier").iterdir())) == 2


def test_an_earlier_result_counts_for_the_same_weights_and_default_settings_only(run):
    file = run / "evaluation" / "linear.json"
    assert read_result(file, tiny_encoder()) is None
    evaluate("linear", run, epochs=2)
    assert read_result(file, tiny_encoder()) is None
    result = evaluate("linear", run)
    assert read_result(file, tiny_encoder()) == result
    assert read_result(file, tiny_encoder(seed=1)) is None
    file.write_text(file.read_text()[:50])
    assert read_result(file, tiny_encoder()) is None


def test_baselines_are_kept_and_damaged_ones_are_forgotten(tmp_path):
    Baselines(tmp_path).put("a", {"top1": 0.5})
    assert Baselines(tmp_path).get("a") == {"top1": 0.5}
    (tmp_path / "evaluation" / "baselines.json").write_text("{")
    assert Baselines(tmp_path).get("a") is None
    Baselines(None).put("a", {"top1": 0.5})  # no folder to write to
