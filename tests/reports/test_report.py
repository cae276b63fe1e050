"""``dmjd report``: what stands in the page, and what happens with runs that are incomplete or damaged."""

import re
import shlex
import shutil
import struct
import sys
import zlib
from html import unescape

import forked
import pytest
from support import TINY, mistake

import dmjd
from dmjd.cli.main import main
from dmjd.engine.console import Console
from dmjd.files import try_lock
from dmjd.reports.report import report_training
from dmjd.reports.trained import Trained


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the run, to damage."""
    return shutil.copytree(finished, tmp_path / "run")


def text_of(html: str) -> str:
    """The page without scripts and data URIs."""
    return re.sub(r"data:image/[^\"]*", "", re.sub(r"<script.*?</script>", "", html, flags=re.S))


def made(*runs, **settings) -> str:
    out = dmjd.report(*runs, **{"num_images": 40} | settings)
    return out.read_text(encoding="utf-8")


def test_the_page_says_what_was_trained(single):
    html = single.read_text(encoding="utf-8")
    text = text_of(html)
    said = [
        "61 of data",
        "vit_tiny_patch8, 32 x 32 x 3",
        "folder (mim: hog, vis: hog), from random weights",
        "40 steps",
    ]
    said += ["random init", "raw pixels", "points", "1 images could not be read", "not an image"]
    for part in said:
        assert part in text, part
    assert "Left out" not in text
    for name in ("reconstructions", "masks", "targets", "attention", "map", "neighbors", "duplicates"):
        assert f'id="{name}"' in html
    assert "dmjd pretrain folder --data" in text
    assert "dmjd evaluate knn" in text


def test_names_are_escaped(single):
    html = single.read_text(encoding="utf-8")
    for name in ("<img src=x", "<script>alert(1)", "<b>bold", "<i>"):
        assert name not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "\\u003cimg src=x" in html  # in the data of the script
    assert "\x1b" not in html
    assert "\\x1b[31mred.png" in html


def test_several_runs_share_the_curves(both):
    html = both.read_text(encoding="utf-8")
    assert "<h1>2 runs</h1>" in html
    assert html.count('"run": 1') >= 6


def test_a_run_that_is_still_training(copy, tmp_path):
    shutil.rmtree(copy / "checkpoints")  # so that no figures are made
    lock = try_lock(copy / ".lock")
    assert lock is not None
    with lock:
        assert "still training" in text_of(made(copy, out=tmp_path / "r.html", num_images=0))


def test_a_run_without_checkpoint_or_metrics(copy, tmp_path):
    for name in ("checkpoints", "figures"):
        shutil.rmtree(copy / name)
    for name in ("metrics.jsonl", "encoder.safetensors", "environment.json", "unreadable.txt"):
        (copy / name).unlink()
    shutil.rmtree(copy / "evaluation")
    moved = copy.rename(copy.with_name("a name"))
    text = text_of(made(moved, out=tmp_path / "r.html"))
    assert f"dmjd evaluate knn {shlex.quote(str(moved))} --labels folder" in unescape(text)
    for part in ("nothing saved yet", "metrics.jsonl", "has no checkpoint yet", "holds no encoder.safetensors",
                 "did not record its environment"):  # fmt: skip
        assert part in text, part


def png_of(width: int, height: int) -> bytes:
    """The header of a PNG, without pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def test_damaged_files_cost_their_part_only(copy, tmp_path):
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')
    (copy / "evaluation" / "knn.json").write_text("{")
    (copy / "evaluation" / "linear.json").mkdir()
    (copy / "figures" / "final.png").write_text("no image")
    (copy / "figures" / "step-000000001.png").write_bytes(png_of(200_000, 200_000))
    (copy / "environment.json").write_text("[")
    (copy / "unreadable.txt").write_bytes(b"\xff\xfe\x00name\tbad\n")
    html = made(copy, out=tmp_path / "r.html")
    assert "is not a result of dmjd evaluate" in html
    assert '"step": [1, 2, 3' in html
    assert "Visible tokens, targets and predictions" in html  # made again


def test_a_damaged_result_is_named_and_the_others_are_shown(copy, finished, tmp_path):
    (copy / "evaluation" / "linear.json").write_text("{")
    for runs in ((copy,), (finished, copy)):
        text = text_of(made(*runs, out=tmp_path / "r.html", num_images=0))
        assert text.count("knn: top1") == 1
        assert f"Left out: {copy / 'evaluation' / 'linear.json'} is not a result of dmjd evaluate" in unescape(text)
        assert "random init" in text


def test_images_that_moved(copy, finished, tmp_path):
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace(str(finished.parent / "data"), str(tmp_path / "gone")))
    text = text_of(made(copy, out=tmp_path / "r.html"))
    assert text.count("Left out") >= 5
    assert str(tmp_path / "gone") in text
    text = text_of(made(copy, out=tmp_path / "r.html", data=finished.parent / "data"))
    assert "Map of the embeddings" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{empty}"], "is not a run folder"),
        (["{run}", "{empty}"], "is not a run folder"),
        (["{empty}/none"], "is not a run folder"),
        (["{run}", "--out", "report.pdf"], "end it in .html"),
        (["{run}", "--out", "{empty}/file/report.html"], "file"),
        (["{run}", "--num-images", "-1"], "--num-images"),
        (["{run}", "--device", "tpu"], "device"),
        (["{run}", "--seed", "-1"], "seed"),
        (["{run}", "--data", ""], "must not be empty"),
        ([], "RUN"),
    ],
)
def test_mistakes_are_one_line(arguments, message, finished, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    given = [a.format(run=finished, empty=tmp_path) for a in arguments]
    assert message in mistake(capsys, "report", *given)
    assert not list(tmp_path.glob("*.html"))


def test_a_kill_while_it_is_written_leaves_the_former_report_or_none(copy, tmp_path):
    command = ["report", str(copy), "--out", str(copy / "report.html"), "--num-images", "0"]
    for former in (None, "<p>former</p>"):
        if former is not None:
            (copy / "report.html").write_text(former)
        killed = forked.run(forked.killed_before, "report.html", command, log=tmp_path / "log", seconds=120)
        assert killed == -9, (tmp_path / "log").read_text()
        assert [file.read_text() for file in copy.glob("*.html")] == ([] if former is None else [former])
    assert len(list(copy.glob(".report.html.*"))) == 1  # what it had written
    assert main(command) == 0
    assert list(copy.glob("*report.html*")) == [copy / "report.html"]


def test_a_missing_extra_is_named(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    line = "a report needs plotly and jinja2: pip install 'dmjd[report]'"
    assert mistake(capsys, "report", finished, "--out", tmp_path / "r.html") == f"error: {line}\n"
    end_training(finished)
    assert capsys.readouterr().err == f"no report.html: {line}\n"


def end_training(run) -> None:
    trained = Trained(run)
    report_training(run, trained.model, trained.source, 1.0, Console())


def test_a_failing_report_does_not_fail_the_training(copy, capsys):
    (copy / "report.html").mkdir()
    end_training(copy)
    assert capsys.readouterr().err.startswith("warning: report.html could not be made: ")


def test_a_training_ends_with_a_report(finished, tmp_path, capsys):
    assert not (finished / "report.html").exists()  # --no-report
    out, data = tmp_path / "run", finished.parent / "data"
    flags = [word for word in TINY if word != "--no-report"]
    arguments = ["--data", str(data), "--steps", "3", "--batch-size", "16", "--num-workers", "0", "--out", str(out)]
    assert main(["pretrain", "folder", *arguments, *flags]) == 0
    assert f"report: {out / 'report.html'}" in capsys.readouterr().err
    html = (out / "report.html").read_text()
    assert "finished" in html
    assert "there was no time for it at the end of this run" in html
