"""What may change between the runs that resume each other: images are repaired or removed."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from dmjd.data.cache import try_read
from dmjd.data.sources.base import Changes, Source
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


def recheck(source: Source, began: Began, reports: Iterable[Report], warn: Callable[[str], None]) -> UnreadableImages:
    """Compare a set with the one a run began with, and continue the record of unreadable images.

    The list of images stays that of the start, so that the order stays, too. Unreadable images may be repaired, which
    are used then, or removed, which do not count any more. Labels are not compared: they do not train anything.

    Args:
        source: the set as it is now.
        began: the set the run began with.
        reports: (name, reason) of the images that were unreadable.
        warn: called with a message about images that have changed.

    Raises:
        ValueError: if it is another set: the list is another one, or most images have changed.
    """
    reports = list(reports)
    changes = source.changes(began.fingerprint)
    if changes is None:
        raise ValueError(f"the images in {source.name} are not those this run began with; give another --out")
    known = {name for name, _ in reports}
    changed: dict[str, None] = {}
    for one in (changes, _changed_content(source, began.content or {})):
        new = [name for name in one.names if name not in known]
        if len(new) > one.compared / 2:
            raise ValueError(
                f"the images in {source.name} are not those this run began with: of {one.compared} compared, "
                f"{len(new)} have changed, {new[0]} for one; put them back, or give another --out"
            )
        changed |= dict.fromkeys(new)
    if changed:
        warn(
            f"at least {len(changed)} image(s) have changed since the run began, {next(iter(changed))} for one: "
            "it goes on with the images as they are now"
        )
    now = _read_again(source, known)
    still = [(name, reason) for name, reason in reports if now.get(name, reason) is not None]
    removed = [name for name, reason in still if now.get(name) == MISSING and reason != MISSING]
    return UnreadableImages(still, removed)


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
