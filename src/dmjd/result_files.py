"""The files of results in a run folder, ``evaluation/<task>.json``: what they hold, and how they are read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from dmjd.checked_json import check_json, read_json, verified

EVALUATION = "evaluation"  # folder of the results in a run folder

BASELINES = "baselines.json"

REPORT_FILE = "report.html"

MAX_SCORE = 1e300

NOT_SCORES = ("num_unreadable", "num_train", "num_test", "steps", "seed")  # numbers of a result that are no scores


class BaselineFile(TypedDict):
    """What ``evaluation/<task>.json`` holds for a trained model that was evaluated beside the encoder.

    ``training`` has "minutes", "device" and "images", None if unknown.
    """

    result: dict[str, Any]
    source: str
    weights: str
    training: dict[str, Any]


class ResultFile(TypedDict):
    """What ``evaluation/<task>.json`` holds; see :func:`dmjd.evaluate`."""

    result: dict[str, Any]
    random_init: NotRequired[dict[str, Any] | None]
    raw_pixels: NotRequired[dict[str, Any] | None]
    baselines: NotRequired[dict[str, BaselineFile]]
    training: NotRequired[dict[str, Any]]
    configuration: NotRequired[dict[str, Any]]
    overrides: NotRequired[dict[str, Any]]
    data: NotRequired[dict[str, Any]]
    encoder: NotRequired[str]


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_SCORE


def headline(scores: Mapping[str, Any]) -> str | None:
    """The main score of a result: its first number that is a score; None if it holds none."""
    return next((name for name, value in scores.items() if is_number(value) and name not in NOT_SCORES), None)


def read_evaluation(file: Path) -> dict[str, Any]:
    """Read ``evaluation/<task>.json``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or not a result; the message says what to do.
    """
    try:
        content = verified(read_json(file, dict[str, Any]), str(file))
        result = check_json(content, ResultFile, str(file))["result"]
        if headline(result) is None:
            raise ValueError("it has no number in its result")
    except ValueError as error:
        reason = str(error).removeprefix(f"{file}: ")
        raise ValueError(f"{file} is not a result of dmjd evaluate ({reason}): delete it, or evaluate again") from None
    return content
