"""Results of evaluations as files in a run folder."""

import contextlib
import itertools
import json
import platform
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from dmjd import __version__
from dmjd.checked_json import check_json, read_json, signed, verified
from dmjd.config.checks import check_out, check_path
from dmjd.data.sources.base import Source, short_hash
from dmjd.encoders.base import Encoder
from dmjd.encoders.stored import encoder_metadata, weights_hash
from dmjd.files import check_writable, locked, make_folder, move, remove_leftovers, write_bytes, write_text
from dmjd.result_files import BASELINES, EVALUATION, headline, is_number, read_evaluation
from dmjd.warning import DMJDWarning

PARTS = ("result", "random_init", "raw_pixels")  # what is measured: the encoder and its two baselines


def data_fingerprint(train: Source, test: Source) -> str:
    """Identifier of the images and labels of both sets."""
    return "/".join(map(part_fingerprint, (train, test)))


def part_fingerprint(source: Source) -> str:
    """Identifier of the images and labels of a set."""
    return f"{source.fingerprint()}-{source.content_hash()}"


def tested_split(test: Source) -> str:
    """The part of the data that was tested on, for a result: "test", or "val" where that served as one."""
    return "val" if test.split == "val" else "test"


def versions() -> dict[str, str]:
    """Versions that a result may depend on."""
    return {"dmjd": __version__, "torch": torch.__version__, "python": platform.python_version()}


def key_of(encoder: Encoder, *parts: Any) -> str:
    """12-digit hash of the version, the encoder's architecture and preprocessing (not its weights), and ``parts``."""
    return key_of_parts(encoder_metadata(encoder), __version__, *parts)


def key_of_parts(*parts: Any) -> str:
    """12-digit hash of JSON types."""
    return short_hash(json.dumps(part, sort_keys=True, default=str) for part in parts)


def results_folder(run: str | Path, out: str | Path | None = None) -> Path | None:
    """The folder of ``evaluation/``: ``out``, else the run folder; None if the run is a file and ``out`` not given."""
    if out is not None:
        return check_out("out", out)
    run = check_path("run", run)
    return run if run.is_dir() else None


def check_results_folder(folder: Path) -> None:
    """Check before long work that results can be written to ``evaluation/`` in a folder.

    Raises:
        ValueError: if they cannot.
    """
    for part in ("earlier", ""):
        check_writable(folder / EVALUATION / part, flag="results in", folder=True)


def write_result(folder: Path, task: str, result: Mapping[str, Any], files: Mapping[Path, bytes] | None = None) -> None:
    """Write ``evaluation/<task>.json``; a different earlier result, readable or not, is kept in ``earlier/``.

    Args:
        folder: the run folder.
        task: name of the task.
        result: the content.
        files: other files that belong to the result. No other process writes between them and the result.
    """
    evaluation = folder / EVALUATION
    file, content = evaluation / f"{task}.json", json.dumps(signed(result), indent=2) + "\n"
    with _locked(evaluation):
        for path, data in (files or {}).items():
            write_bytes(path, data)
        if file.exists():
            with contextlib.suppress(ValueError):
                if verified(read_json(file, dict[str, Any]), str(file)) == json.loads(json.dumps(result)):
                    return
            _keep(file, file.read_bytes() if file.is_file() else None, evaluation / "earlier")
        write_text(file, content)


def _keep(file: Path, content: bytes | None, earlier: Path) -> None:
    """Copy a result to the folder of earlier ones, unless it is there; a folder (None) is moved."""
    make_folder(earlier)
    remove_leftovers(earlier)
    kept = list(earlier.glob(f"{file.stem}-*.json"))
    if content is not None and any(one.is_file() and one.read_bytes() == content for one in kept):
        return
    free = next(n for n in itertools.count(1) if not (earlier / f"{file.stem}-{n}.json").exists())
    target = earlier / f"{file.stem}-{free}.json"
    if content is None:
        move(file, target)
    else:
        write_bytes(target, content)


@contextlib.contextmanager
def _locked(evaluation: Path) -> Iterator[None]:
    """Let one process at a time write to a folder of results, and delete what killed ones left."""
    make_folder(evaluation)
    with locked(evaluation / ".lock"):
        remove_leftovers(evaluation)
        yield


class Baselines:
    """Results of baselines, kept in a run folder so that each configuration is measured once.

    Args:
        folder: the run folder; None: nothing is written.
    """

    def __init__(self, folder: Path | None) -> None:
        self._file = folder / EVALUATION / BASELINES if folder is not None else None
        self._results = self._read()

    def _read(self) -> dict[str, dict[str, Any]]:
        """The entries of the file. Damaged ones are left out with a warning: they are measured again."""
        if self._file is None or not self._file.exists():
            return {}
        try:
            found = read_json(self._file, dict[str, Any])
        except ValueError as error:
            warnings.warn(f"{error}; baselines are measured again", DMJDWarning, stacklevel=4)
            return {}
        good = {}
        for key, entry in found.items():
            with contextlib.suppress(ValueError):
                own = verified(check_json(entry, dict[str, Any], key), key, key)
                if headline(own) is not None:
                    good[key] = own
        if len(good) < len(found):
            warnings.warn(
                f"{self._file}: {len(found) - len(good)} damaged entries are measured again", DMJDWarning, stacklevel=4
            )
        return good

    def get(self, key: str) -> dict[str, Any] | None:
        """The result of a configuration, or None."""
        return self._results.get(key)

    def put(self, key: str, result: dict[str, Any]) -> None:
        """Store the result of a configuration, next to those that other processes stored meanwhile."""
        self._results[key] = result
        if self._file is None:
            return
        try:
            with _locked(self._file.parent):
                self._results = self._read() | {key: result}
                entries = {name: signed(entry, name) for name, entry in sorted(self._results.items())}
                write_text(self._file, json.dumps(entries, indent=2) + "\n")
        except ValueError as error:  # they can be measured again, which is no reason to lose the result
            warnings.warn(f"{error}; this baseline is not kept", DMJDWarning, stacklevel=2)


def read_result(file: str | Path, encoder: Encoder) -> dict[str, Any] | None:
    """Read an earlier result of the same weights with default settings; None if there is none.

    Args:
        file: ``<run>/evaluation/<task>.json``.
        encoder: the encoder to compare with.
    """
    try:
        result = read_evaluation(Path(file))
    except (FileNotFoundError, ValueError):
        return None  # missing, damaged or written by another version
    score = headline(result["result"])
    complete = all(is_number(result[part].get(score)) for part in PARTS if result.get(part) is not None)
    same = result.get("encoder") == weights_hash(encoder) and result.get("overrides") == {}
    return result if same and complete else None
