"""What stands below a table of results."""

import re

from support import GOLDEN

from dmjd.cli.main import main
from dmjd.evaluation.run import evaluate
from dmjd.evaluation.tables import context_lines
from dmjd.result_files import read_evaluation


def test_a_table_says_what_was_measured_how_and_where_the_file_is(run, capsys):
    """Without opening the JSON: data, sizes, labels, chance level, seeds, protocol."""
    flags = ["--labels-per-class", "4", "--device", "cpu"]
    assert main(["evaluate", "knn", str(run), *flags]) == 0
    out = capsys.readouterr().out
    data = run.parent / "my data"
    assert (
        f"trained on 8 images of {data}/train, tested on 12 images of {data}/test, 2 classes, 4 labels a class" in out
    )
    assert "chance 100.0 % (always the most frequent class)" in out  # the test part holds cats only
    assert "± is the standard deviation over 3 seeds" in out
    assert "knn: the 1 most similar training images vote" in out
    assert f"JSON: {run / 'evaluation' / 'knn.json'}\n" in out  # on one line, whatever the width of the terminal


def test_the_lines_of_several_tasks_and_of_no_folder(run):
    knn, tuned = evaluate("knn", run, device="cpu"), evaluate("finetune", run, steps=2, device="cpu", num_workers=0)
    lines = context_lines({"knn": knn}, None)
    assert "one seed (0)" in lines
    assert lines[-1].startswith("JSON: none was written")
    text = "\n".join(context_lines({"finetune": tuned}, run))
    assert re.search(r"finetune: the whole encoder is trained for 2 steps of 16 images", text)
    assert "12 labels a class" in text


def test_a_result_of_version_0_1_says_what_it_knows():
    result = read_evaluation(GOLDEN / "run_v0.1" / "evaluation" / "knn.json")
    assert context_lines({"knn": result}, None)[:3] == [
        "trained on 50 images of digits, tested on 2,000 images of digits, 10 classes",
        "± is the standard deviation over 3 seeds",
        "knn: the 20 most similar training images vote; frozen features",
    ]
