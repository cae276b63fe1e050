"""What may change between the runs that resume each other: images are repaired, removed, or moved to another path."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from dmjd.config.sources import Data, given_sources
from dmjd.data.cache import try_read
from dmjd.data.sources.addresses import is_url, without_secrets
from dmjd.data.sources.base import Changes, Source
from dmjd.data.sources.list_formats import ENDINGS
from dmjd.data.sources.mixture import MixtureSource
from dmjd.data.sources.paths import SHARDS, one_line
from dmjd.data.unreadable import MISSING, Report, UnreadableImages


@dataclass(frozen=True)
class Began:
    """The set that a run began with.

    Attributes:
        fingerprint: see :meth:`~dmjd.data.sources.base.Source.fingerprint`.
        content: see :meth:`~dmjd.data.sources.base.Source.content_sample`; None: former versions did not record it.
    """

    fingerprint: str
    content: Mapping[int, str] | None = None

    @classmethod
    def of(cls, source: Source) -> "Began":
        """A set as it is now."""
        return cls(source.fingerprint(), source.content_sample())


def recheck(
    source: Source, began: Began, reports: Iterable[Report], warn: Callable[[str], None], joined: Source | None = None
) -> UnreadableImages:
    """Compare a set with the one a run began with, and continue the record of unreadable images.

    The list of images stays that of the start, so that the order stays, too. Unreadable images may be repaired, which
    are used then, or removed, which do not count any more. Labels are not compared: they do not train anything.

    Args:
        source: the set as it is now.
        began: the set the run began with.
        reports: (name, reason) of the images that were unreadable.
        warn: called with a message about images that have changed.
        joined: the images that have joined the set.

    Raises:
        ValueError: if it is another set: the list is another one, or most images have changed.
    """
    reports = list(reports)
    known = {name for name, _ in reports}
    changed: dict[str, None] = {}
    for name, one in _new_changes(source, began, known):
        if len(one.names) > one.compared / 2:
            raise ValueError(
                f"the images in {name} are not those this run began with: of {one.compared} compared, "
                f"{len(one.names)} have changed, {one.names[0]} for one; put them back, or give another --out"
            )
        changed |= dict.fromkeys(one.names)
    if changed:
        warn(
            f"at least {len(changed)} image(s) have changed since the run began, {next(iter(changed))} for one: "
            "it goes on with the images as they are now"
        )
    now = _read_again(source, known) | ({} if joined is None else _read_again(joined, known))
    still = [(name, reason) for name, reason in reports if now.get(name, reason) is not None]
    removed = [name for name, reason in still if now.get(name) == MISSING and reason != MISSING]
    return UnreadableImages(still, removed)


def check_moved(source: Source, began: Began, reports: Iterable[Report], former: str) -> None:
    """Check that a set at another path than before is the one a run began with. No compared image may differ.

    Args:
        source: the set as it is now.
        began: the set the run began with.
        reports: (name, reason) of the images that were unreadable, which may differ, with names as they are now.
        former: the former path.

    Raises:
        ValueError: if it is another set, or if the run recorded too little to tell.
    """
    cure = f"a run may go on with the same images at another path only; give --data {former}, or another --out"
    if began.content is None:
        raise ValueError(
            f"the run began in version 0.1, which did not record enough to compare {source.name} with {former}: "
            f"resume it once with --data {former}, or give another --out"
        )
    for changed, one in _new_changes(source, began, {name for name, _ in reports}, cure):
        if one.names:
            raise ValueError(
                f"{changed}: of {one.compared} images compared, {len(one.names)} differ from those this run began "
                f"with, {one.names[0]} for one; {cure}"
            )


def moved_reports(reports: Iterable[Report], former: Data, data: Data) -> list[Report]:
    """The reports of unreadable images of a set that was at another path, with the names they have now."""
    paths = [[_start(one.data) for one in given_sources(each)] for each in (former, data)]
    pairs = list(zip(*paths, strict=False))

    def moved(name: str) -> str:
        before, now = next((pair for pair in pairs if name.startswith(pair[0])), ("", ""))
        return now + name.removeprefix(before)

    return [(moved(name), reason) for name, reason in reports]


def _start(data: str) -> str:
    """What the names of the images in a folder, in shards of a pattern, or below that of a list begin with."""
    data = without_secrets(data) if is_url(data) else data
    if "*" in data or data.lower().endswith((*SHARDS, *ENDINGS)):
        data = re.split(r"[*?\[{]", data, maxsplit=1)[0].rpartition("/")[0]
    return one_line(data).rstrip("/") + "/"


def _new_changes(
    source: Source, began: Began, known: set[str], cure: str = "give another --out"
) -> Iterator[tuple[str, Changes]]:
    """What has changed in the list of images and their sizes, and in their content, besides known images.

    Yields:
        The name of the set, or of a source of a mixture, and its changes.

    Raises:
        ValueError: if the list is another one.
    """
    for one, before in _each(source, began):
        changes = one.changes(before.fingerprint)
        if changes is None:
            damaged = f" If they are, {one.listing} is damaged: delete it." if one.listing is not None else ""
            raise ValueError(f"the images in {one.name} are not those this run began with; {cure}.{damaged}")
        for each in (changes, _changed_content(one, before.content or {})):
            yield one.name, Changes([name for name in each.names if name not in known], each.compared)


def _each(source: Source, began: Began) -> list[tuple[Source, Began]]:
    """A set, or each source of a mixture, and what it began with."""
    if not isinstance(source, MixtureSource) or not (prints := source.divided(began.fingerprint)):
        return [(source, began)]
    content = began.content
    contents = [
        None if content is None else {i - start: content[i] for i in content if start <= i < start + len(one)}
        for start, one in zip(source.starts, source.sources, strict=True)
    ]
    return [(one, Began(*each)) for one, each in zip(source.sources, zip(prints, contents, strict=True), strict=True)]


def _changed_content(source: Source, before: Mapping[int, str]) -> Changes:
    """The sampled images whose content has changed, of those that could be read then and now."""
    now = source.content_sample() if before else {}
    both = [index for index in before if index in now]
    return Changes([source.describe(index) for index in both if before[index] != now[index]], len(both))


def _read_again(source: Source, names: set[str]) -> dict[str, str | None]:
    """Why each of the named images is unreadable now; None if it is not."""
    reasons: dict[str, str | None] = {}
    for index in range(len(source)) if names else ():
        if (name := source.describe(index)) in names:
            image = try_read(source, index)
            reasons[name] = None if isinstance(image, np.ndarray) else image[1]
    return reasons
