"""Whether results may be ranked together: on the same data with as many labels, of the newest weights of a run."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmjd.config.evaluation import EvaluationConfig
from dmjd.encoders.headers import CHECKPOINTS, WEIGHTS_KEY, read_headers
from dmjd.encoders.stored import weights_hash_of
from dmjd.encoders.weights import ENCODER_FILE
from dmjd.evaluation.tables import labels_text

EARLIER = "measured before the run went on"

Result = Mapping[str, Any]  # the content of evaluation/<task>.json


def other_data(first: Result, other: Result) -> str | None:
    """Why a result is not comparable with the first one, in words; None if it is.

    Low-shot evaluations draw other images for other seeds: they are comparable if they draw as many.
    """
    (train, test), (other_train, other_test) = _fingerprints(first), _fingerprints(other)
    few = any(value is not None for value in _low_shot(first))
    if few and None not in (train, other_train) and train != other_train:
        train, other_train = first["data"].get("train"), other["data"].get("train")
    pairs = {
        "other test set": (test, other_test),
        "other number of labels": ((*_low_shot(first), _num_train(first)), (*_low_shot(other), _num_train(other))),
        "other training images": (train, other_train),
    }
    words = [word for word, (one, two) in pairs.items() if one != two and None not in (one, two)]
    if "other number of labels" in words:  # then the images are others too
        words = [word for word in words if word != "other training images"]
    return f"not comparable: {', '.join(words)}" if words else None


def _fingerprints(result: Result) -> tuple[str | None, str | None]:
    """Those of the training and of the test set, None if they are not recorded."""
    train, _, test = str(result.get("data", {}).get("fingerprint") or "").partition("/")
    return train or None, test or None


def _low_shot(result: Result) -> tuple[Any, Any]:
    settings = {**result.get("configuration", {}), **result.get("overrides", {})}
    return settings.get("labels_per_class"), settings.get("label_fraction")


def _num_train(result: Result) -> Any:
    return result.get("data", {}).get("num_train")


def data_texts(result: Result) -> tuple[str, str]:
    """Test set and labels of a result: ("digits: 2,000 images", "10 labels a class"); "-" for what is unknown."""
    data = result.get("data", {})
    name, count = data.get("test"), data.get("num_test")
    part = " (val)" if data.get("split") == "val" else ""
    test = "-" if name is None else _short(name) + part + (f": {count:,} images" if isinstance(count, int) else "")
    labels, (per_class, fraction) = labels_text(data), _low_shot(result)
    if labels is None and per_class is not None:
        labels = str(per_class)
    if labels is not None:
        return test, f"{labels} labels a class"
    if fraction is not None:
        return test, f"{100 * fraction:g} % of the labels"
    return test, f"{_num_train(result):,} labels" if isinstance(_num_train(result), int) else "-"


def _short(name: str) -> str:
    """The last two parts of a path: the set and its test part."""
    return "/".join(Path(name).parts[-2:]) if Path(name).is_absolute() else name


def newest_weights(run: Path) -> str | None:
    """The hash of the newest weights of a run; None if it has none, as a folder of results only."""
    headers, _ = read_headers(run / CHECKPOINTS)
    if headers and (weights := headers[0].metadata.get(WEIGHTS_KEY)) is not None:
        return str(weights)
    file = run / ENCODER_FILE  # version 0.1 did not record the hash
    return weights_hash_of(file.read_bytes()) if headers and file.is_file() else None


def redo_command(task: str, run: Path, result: Result) -> str:
    """The command that measures a result again, with the settings that were given for it."""
    words = ["dmjd", "evaluate", task, str(run)]
    words += flag_words(EvaluationConfig.from_former(result.get("overrides", {})))
    for baseline in result.get("baselines", {}).values():
        words += ["--baseline", baseline["source"]]
    if result.get("seed"):
        words += ["--seed", str(result["seed"])]
    return shlex.join(words)


def flag_words(settings: Mapping[str, Any]) -> list[str]:
    """Settings as words of a command line: ``--name value``; ``--name`` or ``--no-name`` for booleans."""
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return words
