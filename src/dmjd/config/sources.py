"""The sources of images that a run is given: a path or name, or several, each with an optional weight: ``B:0.3``.

Imports no torch.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from dmjd.text import printable, without_secrets

Data = str | Sequence[str]  # of one source, or of several

_WEIGHT = re.compile(r"(.+):([+-]?(?:(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|nan|inf|infinity))", re.IGNORECASE | re.DOTALL)

_SHARDS, _MOST_SHARDS = (".tar", ".zip"), 8  # which a shell makes of a pattern without quotes

_LEAST = 1e-9  # a smaller weight draws no image in any run

_QUERY_LEFT_OUT = "?..."  # at the end of an address that is stored

_ROUNDING = 0.01  # of weights such as 0.334 0.333 0.334


class GivenSource(NamedTuple):
    """A path or name, and the share of the samples that is to be drawn from it, if it is given."""

    data: str
    weight: float | None = None

    @property
    def text(self) -> str:
        """As it is given: ``B:0.3``; a path that ends like a weight gets a separator behind it."""
        if self.weight is not None:
            return f"{self.data}:{self.weight!r}"
        return os.path.join(self.data, "") if _WEIGHT.fullmatch(self.data) else self.data


def given_sources(data: Data) -> list[GivenSource]:
    """The sources of ``data``, in order. A single text is a path or name without a weight.

    An existing path wins: with a folder ``a:0.3``, that is the folder.
    """
    if isinstance(data, str):
        return [GivenSource(data)]
    return [_parse(text) for text in data]


def _parse(text: str) -> GivenSource:
    match = _WEIGHT.fullmatch(text)
    if match is None or os.path.exists(os.path.expanduser(text)):
        return GivenSource(text)
    return GivenSource(match[1], float(match[2]))


def data_text(data: Data) -> str:
    """The sources in one line, as messages show them."""
    return without_secrets(data if isinstance(data, str) else ", ".join(data))


def stored_data(data: Data | None) -> Data | None:
    """The sources as files hold them: "..." stands for a password, and for what follows "?" in an address."""
    if data is None or isinstance(data, str):
        return data if data is None else _stored(data)
    return tuple(source._replace(data=_stored(source.data)).text for source in given_sources(data))


def _stored(address: str) -> str:
    if (shown := without_secrets(address)) == address:
        return address
    return f"{shown}{_QUERY_LEFT_OUT}" if "?" in address and "?" not in shown else shown


def check_whole(address: str) -> None:
    """ValueError for an address of :func:`stored_data` whose password or signature is left out."""
    if ":...@" in address or address.endswith(_QUERY_LEFT_OUT):
        raise ValueError(
            f"the whole address of {without_secrets(address)} is not known, since runs keep no passwords and nothing "
            "that follows ?: give it (--data, --test-data)"
        )


def check_sources(sources: Sequence[GivenSource]) -> str | None:
    """Check weights, and that no source is given twice.

    Returns:
        A message, if the weights do not sum to 1 and are divided by their sum; else None.

    Raises:
        ValueError: for a weight that is not a share of the samples, weights that sum to more than 1 or leave nothing
            for sources without one, and a source that is given twice.
    """
    for source in sources:
        _check_weight(source, alone=len(sources) == 1)
    shards = [source.data for source in sources if source.data.lower().endswith(_SHARDS)]
    if len(shards) > _MOST_SHARDS:
        pattern = printable(os.path.join(os.path.dirname(shards[0]), f"*{os.path.splitext(shards[0])[1]}"))
        raise ValueError(f"{len(shards)} shards would be as many sets: quote a pattern, which is one: '{pattern}'")
    places = Counter(_place(source.data) for source in sources)
    if twice := next((source.data for source in sources if places[_place(source.data)] > 1), None):
        raise ValueError(f"--data names {printable(twice)} twice: give it once, with a weight if it is to count more")
    weights = [source.weight for source in sources if source.weight is not None]
    total = math.fsum(weights)
    if len(weights) < len(sources):
        if total > 1 - _LEAST:
            rest = next(source.data for source in sources if source.weight is None)
            raise ValueError(f"the weights of --data sum to {total:g}, which leaves no samples for {printable(rest)}")
        return None
    if total > 1 + _ROUNDING:
        raise ValueError(
            f"the weights of --data sum to {total:g}: they are shares of the samples drawn, and sum to at most 1"
        )
    different = abs(total - 1) > _LEAST
    return f"the weights of --data sum to {total:g}, not 1: each is divided by that" if different else None


def overlapping(sources: Sequence[GivenSource]) -> str | None:
    """A message, if the folder of one source lies in that of another, so that its images count twice; else None."""
    places = {source.data: _place(source.data) for source in sources}
    for inner, place in places.items():
        for outer, other in places.items():
            if os.path.isdir(other) and place.startswith(os.path.join(other, "")):
                return f"--data: {printable(inner)} lies in {printable(outer)}: its images may count for both"
    return None


def _check_weight(source: GivenSource, alone: bool) -> None:
    name, weight = printable(source.data), source.weight
    if weight is None:
        return
    if alone:
        raise ValueError(f"--data {name} is a single set, for which the weight {weight:g} means nothing: leave it out")
    if not _LEAST <= weight <= 1:
        raise ValueError(
            f"the weight of {name} in --data must be a share of the samples, greater than 0 and at most 1, got "
            f"{weight:g}"
        )


def _place(data: str) -> str:
    path = os.path.expanduser(data)
    return os.path.realpath(path) if os.path.exists(path) else data


def moved_sources(old: Data, new: Data) -> str | None:
    """How the sources of a run that is resumed differ, besides their paths: "old -> new", or None.

    The paths may be others, if the images are the same; number, order and weights must stay.
    """
    before, after = (given_sources(stored_data(data) or ()) for data in (old, new))
    same_weights = [source.weight for source in before] == [source.weight for source in after]
    reordered = before != after and Counter(before) == Counter(after)
    if same_weights and not reordered:
        return None
    return f"{data_text(old)} -> {data_text(new)}"
