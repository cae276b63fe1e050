"""FIFOs, folders, sockets and links to themselves in place of each file that commands read or write.

Each command ends within seconds, with one line that names the file or with its work done; never with a hang.
"""

import contextlib
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import run
from state_files import COMMANDS, TRAIN, Command, make_base
from storm.table import record

from dmjd.cli.main import main

SECONDS = 60.0


def _bind(path: Path) -> None:
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as one:  # the path itself may be too long
        one.bind(path.name)


KINDS: dict[str, Callable[[Path], None]] = {
    "FIFO": os.mkfifo,
    "folder": Path.mkdir,
    "socket": _bind,
    "link": lambda path: path.symlink_to(path.name),
}


def _train(*more: object) -> Command:
    return Command(
        lambda root: ["pretrain", "folder", "--data", root / "data", "--out", root / "run", *TRAIN, *more],
        lambda root: None,
    )


MORE = {
    "fresh": _train("--steps", 1),
    "longer": _train("--steps", 5, "--eval-every", 5),
    "final": _train("--final-eval"),
}

# file, relative to the base folder -> commands that read or write it
FILES = {
    "run/config.json": ("fresh", "pretrain", "knn", "half", "masks", "export", "compare"),
    "run/files.txt": ("fresh", "pretrain", "knn", "half", "masks"),
    "run/.lock": ("fresh", "pretrain"),
    "run/unreadable.txt": ("fresh", "pretrain"),
    "run/metrics.jsonl": ("fresh", "pretrain", "compare"),
    "run/encoder.safetensors": ("fresh", "pretrain", "knn", "half", "masks", "export"),
    "run/checkpoints": ("fresh", "pretrain", "knn"),
    "run/checkpoints/final.safetensors": ("fresh", "pretrain", "longer", "knn", "half", "masks", "export", "compare"),
    "run/checkpoints/step-000000002.safetensors": ("fresh", "pretrain", "knn", "half", "masks", "export"),
    "run/figures": ("fresh", "longer"),
    "run/figures/curves.png": ("fresh", "longer"),
    "run/figures/final.png": ("longer",),
    "run/evaluation": ("knn", "finetune", "compare"),
    "run/evaluation/.lock": ("knn", "finetune"),
    "run/evaluation/earlier": ("knn",),
    "run/evaluation/knn.json": ("knn", "compare", "final"),
    "run/evaluation/baselines.json": ("knn", "compare"),
    "run/evaluation/finetune.json": ("finetune", "compare"),
    "run/evaluation/finetune/classifier.safetensors": ("finetune",),
    "features.parquet": ("parquet",),
    "features.npy": ("npy",),
    "features.rows.parquet": ("npy",),
    "half.parquet.parts": ("half",),
    "half.parquet.parts/.lock": ("half",),
    "half.parquet.parts/settings.json": ("half",),
    "half.parquet.parts/part-000000000000-000000000004.parquet": ("half",),
    "out/masks.png": ("masks",),
    "out/vit.safetensors": ("export",),
}


@pytest.mark.slow
def test_special_files_in_place_of_state_files(tmp_path):
    work, base, log = tmp_path / "work", tmp_path / "base", tmp_path / "log"
    shutil.copytree(make_base(work), base)
    commands, lost = COMMANDS | MORE, []
    cases = [(name, file, kind) for file, names in FILES.items() for name in names for kind in KINDS]
    for name, file, kind in cases:
        shutil.rmtree(work)
        shutil.copytree(base / "data" if name == "fresh" else base, work / "data" if name == "fresh" else work)
        path = work / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        KINDS[kind](path)
        code = run(main, [str(word) for word in commands[name].arguments(work)], log=log, seconds=SECONDS)
        text = log.read_text(errors="replace")
        named = path.name in text or "half.parquet.parts" in text  # other weights than those of the parts
        if code not in (0, 2) or "Traceback" in text or (code == 2 and not named):
            lost.append((name, file, kind, code, text[-400:]))
    record("special files in place of state files", tried=len(cases), lost=len(lost))
    assert not lost, "\n".join(map(str, lost))
