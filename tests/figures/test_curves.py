"""Training curves."""

import json
from itertools import pairwise

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

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


@pytest.mark.parametrize("scale", [1.0, 1e-5, 123_456.0, -1e30])
def test_panels_with_their_numbers_and_titles_do_not_overlap(scale, tmp_path):
    names = ("loss", "lr", "effective_rank", "neighbors_kept", "drift_cosine", "knn_top1")
    lines = [{"step": 1000 * s} | dict.fromkeys(names, scale * (1 + s / 7)) for s in range(1, 30)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    figure = curves_figure(tmp_path / "metrics.jsonl")
    FigureCanvasAgg(figure).draw()
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    assert len(boxes) == 6
    assert all(left.x1 <= right.x0 for left, right in pairwise(boxes))
    assert min(boxes[0].x0, *(box.y0 for box in boxes)) >= 0
    assert boxes[-1].x1 <= figure.bbox.width
    assert max(box.y1 for box in boxes) <= figure.bbox.height


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
