"""A place that cannot be written is refused before any work: before the encoder, which is damaged here, is read."""

import pytest
from support import mistake

from dmjd.config import recipes

COMMANDS = {
    "show": ["show", "attention", "RUN", "--out", "PLACE.png"],
    "export": ["export", "RUN", "--format", "timm", "--out", "PLACE.safetensors"],
    "embed": ["embed", "RUN", "--out", "PLACE.parquet"],
    "compare": ["compare", "RUN", "--out", "PLACE.png"],
    "knn": ["evaluate", "knn", "RUN", "--out", "PLACE"],
    "frozen": ["evaluate", "frozen", "RUN", "--out", "PLACE"],
    "finetune": ["evaluate", "finetune", "RUN", "--out", "PLACE"],
    "segmentation": ["evaluate", "segmentation", "RUN", "--data", "nowhere", "--out", "PLACE"],
    "detection": ["evaluate", "detection", "RUN", "--data", "nowhere", "--out", "PLACE"],
    "inspect": ["inspect", "nowhere", "--out", "PLACE.png"],
    "bench": ["bench", "--data", "nowhere", "--json", "PLACE.json"],
}


@pytest.mark.parametrize("place", ["FILE/x", "FILE/new/x", "/proc/x", "/sys/new/x"])
@pytest.mark.parametrize("command", COMMANDS)
def test_refused_before_the_work(command, place, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "encoder.safetensors").write_bytes(b"damaged")
    (run / "config.json").write_text(recipes.digits(out=str(run), steps=1).to_json())
    (tmp_path / "file").write_text("")
    place = place.replace("FILE", str(tmp_path / "file"))
    arguments = [argument.replace("RUN", str(run)).replace("PLACE", place) for argument in COMMANDS[command]]
    error = mistake(capsys, *arguments)
    assert place in error
    assert "cannot be written" in error
    assert len(error.splitlines()) == 1
