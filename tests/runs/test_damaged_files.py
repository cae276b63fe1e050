"""A few of the damaged state files of ``tests/storm``: those that commands once ended on with a traceback."""

import shutil

import pytest
from state_files import COMMANDS, judge, make_base

CASES = [
    ("compare", "run/config.json", "deep"),
    ("compare", "run/evaluation/knn.json", "deep"),
    ("compare", "run/evaluation/knn.json", "not UTF-8"),
    ("compare", "run/evaluation/finetune.json", "other content"),
    ("compare", "run/checkpoints/final.safetensors", "cut"),
    ("export", "run/encoder.safetensors", "other type"),
    ("export", "run/encoder.safetensors", "deep"),
    ("export", "run/encoder.safetensors", "flip"),
    ("export", "run/checkpoints/final.safetensors", "folder"),
    ("export", "run/checkpoints/step-000000002.safetensors", "flip"),
    ("pretrain", "run/files.txt", "flip"),
    ("pretrain", "run/checkpoints/final.safetensors", "flip"),
    ("masks", "run/config.json", "other type"),
    ("masks", "run/config.json", "folder"),
    ("masks", "run/files.txt", "other type"),
    ("masks", "run/files.txt", "deep"),
    ("masks", "run/checkpoints/final.safetensors", "other type"),
    ("half", "half.parquet.parts/settings.json", "other content"),
    ("half", "half.parquet.parts/part-000000000000-000000000004.parquet", "cut"),
    ("npy", "features.npy", "flip"),
    ("npy", "features.rows.parquet", "other content"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The undamaged folder, and the folder that commands work on."""
    root = tmp_path_factory.mktemp("state")
    shutil.copytree(make_base(root / "work"), root / "base")
    return root / "base", root / "work"


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_damage_is_named_or_repaired(folders, case, capsys):
    base, work = folders
    shutil.rmtree(work)
    shutil.copytree(base, work)
    assert COMMANDS[case[0]].run(work) == 0
    found = judge(base, work, case, 7, capsys, COMMANDS[case[0]].outcome(work))
    assert not found.problems, found.printed
