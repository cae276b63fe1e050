"""Training curves."""

import json

import pytest

from dmjd.figures.curves import curves_figure


def test_curves_show_logged_scalars_and_skip_an_incomplete_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = [{"step": s, "loss": 1 / s, "mim": 0.6 / s, "lr": 1e-3 * s, "images_per_s": 9.0} for s in range(1, 30)]
    lines.insert(10, {"step": 10, "knn_top1": 0.4})
    file.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 30, "lo')
    figure = curves_figure(file)
    assert [axes.get_title() for axes in figure.axes] == ["loss", "learning rate", "online kNN, top-1"]
    assert [line.get_label() for line in figure.axes[0].lines] == ["loss", "mim"]
    assert figure.axes[2].lines[0].get_xydata().tolist() == [[10, 0.4]]


def test_curves_of_nothing_are_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no curves yet"):
        curves_figure(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_bytes(b'[1]\n3\n{"step": "x"}\n\xff\n{"step": 1, "loss": [1]}\n' + b"[" * 9999)
    with pytest.raises(ValueError, match="no curves yet"):
        curves_figure(tmp_path / "metrics.jsonl")
    for missing, message in ((tmp_path, "cannot be read"), (tmp_path / "none", "cannot be read"), ("", "not be empty")):
        with pytest.raises(ValueError, match=message):
            curves_figure(missing)
