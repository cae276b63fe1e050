"""Results as files: none is lost, and a result is reused only for the same weights and settings."""

import contextlib
import json
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest
from support import mistake, tiny_encoder

from dmjd.evaluation.results import Baselines, read_evaluation, read_result, write_result
from dmjd.evaluation.run import evaluate
from dmjd.files import locked
from dmjd.result_files import headline


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


def test_counts_are_no_scores(tmp_path):
    counts = {"ap": None, "num_unreadable": 0, "steps": 3}
    assert headline(counts) is None
    assert headline(counts | {"ap50": 0.1}) == "ap50"
    write_result(tmp_path, "detection", {"result": counts})
    with pytest.raises(ValueError, match="it has no number in its result"):
        read_evaluation(tmp_path / "evaluation" / "detection.json")


def test_baselines_are_kept_and_damaged_ones_are_forgotten(tmp_path):
    Baselines(tmp_path).put("a", {"top1": 0.5})
    assert Baselines(tmp_path).get("a") == {"top1": 0.5}
    (tmp_path / "evaluation" / "baselines.json").write_text("{")
    assert Baselines(tmp_path).get("a") is None
    Baselines(None).put("a", {"top1": 0.5})  # no folder to write to


def test_writers_at_the_same_time_do_not_lose_each_others_baselines(tmp_path):
    def put(name: str) -> None:
        for i in range(12):
            Baselines(tmp_path).put(f"{name} {i}", {"top1": 0.5})

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(put, ("knn", "linear", "sweep")))
    found = json.loads((tmp_path / "evaluation" / "baselines.json").read_text())
    assert found.keys() == {f"{name} {i}" for name in ("knn", "linear", "sweep") for i in range(12)}


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"[1]", b'{"a": 3}', b'{"a": {}}', b"\xff", b'{"a": {"top1": "x"}}']
)
def test_damaged_baselines_are_measured_again_with_a_warning(tmp_path, content):
    Baselines(tmp_path).put("b", {"top1": 0.5})
    (tmp_path / "evaluation" / "baselines.json").write_bytes(content)
    with pytest.warns(UserWarning, match=r"baselines\.json.* measured again"):
        baselines = Baselines(tmp_path)
    assert baselines.get("a") is None
    with pytest.warns(UserWarning, match="measured again"):
        baselines.put("b", {"top1": 0.25})
    assert Baselines(tmp_path).get("b") == {"top1": 0.25}


def test_baselines_that_cannot_be_kept_do_not_cost_the_result(tmp_path):
    baselines = Baselines(tmp_path)
    (tmp_path / "evaluation" / "baselines.json").mkdir(parents=True)
    with pytest.warns(UserWarning, match="this baseline is not kept"):
        baselines.put("a", {"top1": 0.5})
    assert baselines.get("a") == {"top1": 0.5}


def test_an_unreadable_earlier_result_is_kept_aside(tmp_path):
    evaluation = tmp_path / "evaluation"
    (evaluation / "knn.json").mkdir(parents=True)
    write_result(tmp_path, "knn", {"result": {"top1": 0.1}})
    assert (evaluation / "earlier" / "knn-1.json").is_dir()
    (evaluation / "knn.json").write_bytes(b"\xff{")
    write_result(tmp_path, "knn", {"result": {"top1": 0.2}})
    assert (evaluation / "earlier" / "knn-2.json").read_bytes() == b"\xff{"
    assert read_evaluation(evaluation / "knn.json") == {"result": {"top1": 0.2}}


def test_a_kill_between_keeping_and_writing_keeps_a_result_once(tmp_path):
    write_result(tmp_path, "knn", {"result": {"top1": 0.1}})
    file = tmp_path / "evaluation" / "knn.json"
    write_result(tmp_path, "knn", {"result": {"top1": 0.2}})
    file.write_bytes((tmp_path / "evaluation" / "earlier" / "knn-1.json").read_bytes())  # the state at the kill
    write_result(tmp_path, "knn", {"result": {"top1": 0.2}})
    assert len(list((tmp_path / "evaluation" / "earlier").iterdir())) == 1


@pytest.mark.parametrize("task", ["knn", "finetune"])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(run, tmp_path, task, capsys):
    (tmp_path / "file").write_text("")
    (run / "encoder.safetensors").write_bytes(b"")  # it would be an error to read it
    for out in (tmp_path / "file" / "results", "/proc/results", "/sys/results"):
        assert f"results in {out}/evaluation" in mistake(capsys, "evaluate", task, run, "--out", out)
    (run / "evaluation").write_text("")
    assert "cannot be written: Not a directory" in mistake(capsys, "evaluate", task, run)


def test_no_other_process_writes_between_a_result_and_its_files(tmp_path):
    """Of two fine-tunings that end together, one leaves both: its classifier and its result."""
    classifier = tmp_path / "classifier.safetensors"
    result = {"result": {"top1": 0.5}}
    (tmp_path / "evaluation").mkdir()
    with locked(tmp_path / "evaluation" / ".lock"):
        writer = threading.Thread(target=write_result, args=(tmp_path, "finetune", result, {classifier: b"weights"}))
        writer.start()
        time.sleep(0.2)
        assert writer.is_alive()
        assert not classifier.exists()
    writer.join(10)
    assert classifier.read_bytes() == b"weights"
    assert read_evaluation(tmp_path / "evaluation" / "finetune.json") == result


RESULT = {"result": {"top1": 0.2515, "counts": {1: 3}}, "configuration": {"k": 20, "note": "é"}, "encoder": "a1"}


@pytest.mark.parametrize("seed", range(25))
def test_a_flipped_bit_never_changes_a_result_unseen(tmp_path, seed):
    """Not in results that are read, nor in baselines, which are measured again."""
    random = Random(seed)
    write_result(tmp_path, "knn", RESULT)
    plain = json.loads(json.dumps(RESULT))
    assert read_evaluation(tmp_path / "evaluation" / "knn.json") == plain
    for name in "ab":
        Baselines(tmp_path).put(name, {"top1": 0.5, "per_class": {"x": 0.25}})
    for name in ("knn.json", "baselines.json"):
        file = tmp_path / "evaluation" / name
        content = bytearray(file.read_bytes())
        position = random.choice([i for i, one in enumerate(content) if not chr(one).isspace()])
        content[position] ^= 1 << random.randrange(8)
        file.write_bytes(content)
    with contextlib.suppress(ValueError):
        found = read_evaluation(tmp_path / "evaluation" / "knn.json")
        assert found == plain or len(found) > len(plain)  # in the name of the digest
    with warnings.catch_warnings(record=True) as caught:
        kept = Baselines(tmp_path)
    values = [kept.get(name) for name in "ab"]
    assert caught or any(value is not None and len(value) > 2 for value in values)  # likewise
    assert all(value is None or value.items() >= {"top1": 0.5, "per_class": {"x": 0.25}}.items() for value in values)


def test_an_edited_result_is_refused_with_a_way_on(tmp_path):
    write_result(tmp_path, "knn", RESULT)
    file = tmp_path / "evaluation" / "knn.json"
    file.write_text(file.read_text().replace("0.2515", "0.2516"))
    with pytest.raises(ValueError, match=r"knn.json is not a result .* does not match its digest.*delete sha256 in it"):
        read_evaluation(file)
    content = json.loads(file.read_text())
    del content["sha256"]  # as former versions wrote it
    file.write_text(json.dumps(content))
    assert read_evaluation(file)["result"]["top1"] == 0.2516
    write_result(tmp_path, "knn", content)  # equal: nothing is kept aside
    assert not (tmp_path / "evaluation" / "earlier").exists()
