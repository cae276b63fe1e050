"""Damaged state files: a run with everything that commands read, ways to damage a file, and what must hold then."""

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import TINY

from dmjd.cli.failures import MAX_ERROR_LINES
from dmjd.cli.main import main
from dmjd.encoders.classifier import load_classifier

STEPS = 4
DEEP = 100_000

TRAIN = [*TINY, "--labels", "folder", "--steps", STEPS, "--checkpoint-every", 2, "--batch-size", 8, "--num-workers", 0]
READ = ["--num-workers", 0, "--device", "cpu"]
TUNE = [*READ, "--steps", 2, "--batch-size", 8, "--eval-every", 1]


def make_base(root: Path) -> Path:
    """A folder with labeled images, a finished run with evaluations, and finished and half features."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 8)):
        for i in range(count):
            folder = root / "data" / split / ("dark", "light")[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            image = rng.integers(0, 120, (32, 32, 3)) + 120 * (i % 2)
            Image.fromarray(image.astype(np.uint8)).save(folder / f"{i:02}.png")
    for name in ("pretrain", "knn", "finetune", "parquet", "npy"):
        assert COMMANDS[name].run(root) == 0
    parts = root / "half.parquet.parts"
    parts.mkdir()
    whole = pq.read_table(root / "features.parquet")
    settings = json.loads(whole.schema.metadata[b"dmjd"])["settings"]
    (parts / "settings.json").write_text(json.dumps(settings))
    for first, last in ((0, 4), (4, 12)):
        part = whole.slice(first, last - first).replace_schema_metadata({"dmjd": "[]"})
        pq.write_table(part, parts / f"part-{first:012d}-{last:012d}.parquet", write_page_checksum=True)
    return root


@dataclass(frozen=True)
class Command:
    """A command on a copy of the base folder, and what it makes, which must not depend on damage."""

    arguments: Callable[[Path], list[object]]
    outcome: Callable[[Path], Any]

    def run(self, root: Path) -> int:
        return main([str(argument) for argument in self.arguments(root)])


def _weights(root: Path) -> Any:
    tensors = load_file(root / "run" / "checkpoints" / "final.safetensors")
    return {k: v.tolist() for k, v in tensors.items()}, load_file(root / "run" / "encoder.safetensors").keys()


def _result(task: str) -> Callable[[Path], Any]:
    def read(root: Path) -> Any:
        content = json.loads((root / "run" / "evaluation" / f"{task}.json").read_text())
        return {part: content[part]["top1"] for part in ("result", "random_init")} | {"encoder": content["encoder"]}

    return read


def _classifier(root: Path) -> Any:
    model = load_classifier(root / "run")
    return _result("finetune")(root), {key: value.tolist() for key, value in model.state_dict().items()}


def _table(name: str) -> Callable[[Path], Any]:
    def read(root: Path) -> Any:
        return pq.read_table(root / name).to_pylist()

    return read


def _array(root: Path) -> Any:
    return np.load(root / "features.npy").tolist(), pq.read_table(root / "features.rows.parquet").to_pylist()


def _exported(root: Path) -> Any:
    return {key: value.tolist() for key, value in load_file(root / "out" / "vit.safetensors").items()}


def _embed(name: str) -> Callable[[Path], list[object]]:
    return lambda root: ["embed", root / "run", "--out", root / name, *READ]


COMMANDS = {
    "pretrain": Command(
        lambda root: ["pretrain", "folder", "--data", root / "data", "--out", root / "run", *TRAIN], _weights
    ),
    "knn": Command(lambda root: ["evaluate", "knn", root / "run", *READ], _result("knn")),
    "finetune": Command(lambda root: ["evaluate", "finetune", root / "run", *TUNE], _classifier),
    "parquet": Command(_embed("features.parquet"), _table("features.parquet")),
    "npy": Command(_embed("features.npy"), _array),
    "half": Command(_embed("half.parquet"), _table("half.parquet")),
    "again": Command(_embed("again.parquet"), _table("again.parquet")),
    "masks": Command(
        lambda root: ["show", "masks", root / "run", "--out", root / "out" / "masks.png"],
        lambda root: (root / "out" / "masks.png").exists(),
    ),
    "export": Command(
        lambda root: ["export", root / "run", "--format", "safetensors", "--out", root / "out" / "vit.safetensors"],
        _exported,
    ),
    "compare": Command(lambda root: ["compare", root / "run"], lambda root: None),
}

# file, relative to the base folder (with a wildcard) -> commands that read it
FILES = {
    "run/config.json": ("pretrain", "knn", "masks", "again", "compare"),
    "run/encoder.safetensors": ("pretrain", "knn", "again", "export", "masks"),
    "run/checkpoints/final.safetensors": ("pretrain", "knn", "again", "export", "masks", "compare"),
    "run/checkpoints/step-000000002.safetensors": ("pretrain", "knn", "masks", "export"),
    "run/metrics.jsonl": ("pretrain",),
    "run/files.txt": ("pretrain", "knn", "masks", "again"),
    "run/.lock": ("pretrain",),
    "run/evaluation/knn.json": ("knn", "compare"),
    "run/evaluation/finetune.json": ("compare", "finetune"),
    "run/evaluation/baselines.json": ("knn",),
    "run/evaluation/finetune/pre-trained*/result.json": ("finetune",),
    "run/evaluation/finetune/pre-trained*/config.json": ("finetune",),
    "run/evaluation/finetune/pre-trained*/classifier.safetensors": ("finetune",),
    "run/evaluation/finetune/classifier.safetensors": ("finetune",),
    "features.parquet": ("parquet",),
    "features.npy": ("npy",),
    "features.rows.parquet": ("npy",),
    "half.parquet.parts/settings.json": ("half",),
    "half.parquet.parts/part-000000000000-000000000004.parquet": ("half",),
    "half.parquet.parts/part-000000000004-000000000012.parquet": ("half",),
}


def _cut(file: Path, random: Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: random.randrange(max(1, len(content)))])


def _flip(file: Path, random: Random) -> None:
    content = bytearray(file.read_bytes())
    if content:
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    file.write_bytes(content)


def _delete(file: Path, random: Random) -> None:
    file.unlink()


def _empty(file: Path, random: Random) -> None:
    file.write_bytes(b"")


def _folder(file: Path, random: Random) -> None:
    file.unlink()
    file.mkdir()


def _image(file: Path, random: Random) -> None:
    Image.new("RGB", (8, 8)).save(file, "PNG")


def _not_utf8(file: Path, random: Random) -> None:
    file.write_bytes(b"\xff\xfe{" + file.read_bytes()[3:])


def _deep(file: Path, random: Random) -> None:
    _edit(file, random, '"@"', "[" * DEEP + "]" * DEEP)


def _other_type(file: Path, random: Random) -> None:
    values = ['{"a": 1}', "[[[]]]", "1" + "0" * 400, '"x"', "true", "null", "-3", "NaN"]
    _edit(file, random, '"@"', random.choice(values))


def _other_content(file: Path, random: Random) -> None:
    _edit_text(file, lambda text: random.choice(["{}", "[]", "3", "null", '"x"', "[" * DEEP, "{" * 3]))


DAMAGES = {
    "cut": _cut,
    "flip": _flip,
    "delete": _delete,
    "empty": _empty,
    "folder": _folder,
    "image": _image,
    "not UTF-8": _not_utf8,
    "deep": _deep,
    "other type": _other_type,
    "other content": _other_content,
}


def _edit(file: Path, random: Random, mark: str, value: str) -> None:
    """Replace a random value of the JSON in a file by other JSON."""

    def change(text: str) -> str:
        content = json.loads(text)
        holders = [holder for holder in _containers(content) if len(holder)]
        if not holders:
            return value
        holder = random.choice(holders)
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        holder[random.choice(keys)] = json.loads(mark)
        return json.dumps(content).replace(mark, value, 1)

    _edit_text(file, change)


def _containers(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    own = [value] if isinstance(value, dict | list) else []
    return own + [found for one in inner for found in _containers(one)]


def _edit_text(file: Path, change: Callable[[str], str]) -> None:
    """Change the JSON of a file: a text, a line of metrics, the metadata of tensors or of a table."""
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            metadata = json.loads(opened.metadata()["dmjd"])
        metadata.pop("sha256", None)  # as of a program that keeps no digest
        tensors = {key: torch.clone(value) for key, value in load_file(file).items()}
        save_file(tensors, file, {"dmjd": change(json.dumps(metadata))})
    elif file.suffix == ".parquet":
        table = pq.read_table(file)
        text = change(table.schema.metadata[b"dmjd"].decode())
        pq.write_table(table.replace_schema_metadata({"dmjd": text}), file)
    elif file.suffix == ".jsonl":
        lines = file.read_text().splitlines()
        file.write_text("\n".join([change(lines[0]), *lines[1:]]) + "\n")
    elif file.suffix == ".json" or file.name == "files.txt":
        file.write_text(change(file.read_text()))
    else:
        file.write_text(change("{}"))


@dataclass
class Finding:
    """What a command did with a damaged file; without problems, nothing was lost."""

    problems: list[str] = field(default_factory=list)
    code: int = 0
    printed: str = ""


def judge(base: Path, work: Path, case: tuple[str, str, str], seed: int, capture: Any, expected: Any) -> Finding:
    """Damage a file in a copy of the base folder, run a command, and check what comes out.

    Args:
        base: of :func:`make_base`.
        work: where the copy goes; the path must be the same for all cases, because a run stores it.
        case: command, file and damage.
        seed: of the damage.
        capture: pytest's ``capsys``.
        expected: what the command makes on the undamaged folder.
    """
    name, pattern, damage = case
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(base, work)
    (file,) = work.glob(pattern)
    DAMAGES[damage](file, Random(seed))
    capture.readouterr()
    found = Finding()
    command = COMMANDS[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found.code = command.run(work)
        except Exception as error:
            found.problems.append(f"traceback: {type(error).__name__}: {error}"[:300])
            return found
    found.printed = capture.readouterr().err
    warned = "warning: " in found.printed or any(file.name in str(one.message) for one in caught)
    if found.code == 2:
        lines = found.printed[found.printed.find("error: ") :].splitlines()
        if len(lines) > MAX_ERROR_LINES or "Traceback" in found.printed:
            found.problems.append("the message is too long")
        if not any(part in found.printed for part in (file.name, str(file.parent))):
            found.problems.append("the message does not name the file")
    elif found.code != 0:
        found.problems.append(f"exit code {found.code}")
    elif command.outcome(work) != expected and not (warned and name not in ("pretrain", "half")):
        found.problems.append("another result without a word")
    return found
