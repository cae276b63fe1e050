"""What may change between the runs that resume each other: images are repaired or removed."""

from collections.abc import Callable, Iterable

import numpy as np

from dmjd.data.cache import try_read
from dmjd.data.sources.base import Source
from dmjd.data.unreadable import MISSING, Report, UnreadableImages


def recheck(
    source: Source, fingerprint: str, reports: Iterable[Report], warn: Callable[[str], None]
) -> UnreadableImages:
    """Compare a set with the one a run began with, and continue the record of unreadable images.

    The list of images stays that of the start, so that the order stays, too. Unreadable images may be repaired, which
    are used then, or removed, which do not count any more.

    Args:
        source: the set as it is now.
        fingerprint: that of the set the run began with.
        reports: (name, reason) of the images that were unreadable.
        warn: called with a message about images that have changed.

    Raises:
        ValueError: if it is another set: the list is another one, or most images have changed.
    """
    reports = list(reports)
    changes = source.changes(fingerprint)
    known = {name for name, _ in reports}
    changed = [name for name in changes.names if name not in known] if changes is not None else []
    if changes is None or len(changed) > changes.compared / 2:
        raise ValueError(f"the images in {source.name} are not those this run began with; give another --out")
    if changed:
        warn(
            f"at least {len(changed)} image(s) have changed since the run began, {changed[0]} for one: "
            "it goes on with the images as they are now"
        )
    now = _read_again(source, known)
    still = [(name, reason) for name, reason in reports if now.get(name, reason) is not None]
    removed = [name for name, reason in still if now.get(name) == MISSING and reason != MISSING]
    return UnreadableImages(still, removed)


def _read_again(source: Source, names: set[str]) -> dict[str, str | None]:
    """Why each of the named images is unreadable now; None if it is not."""
    reasons: dict[str, str | None] = {}
    for index in range(len(source)) if names else ():
        if (name := source.describe(index)) in names:
            image = try_read(source, index)
            reasons[name] = None if isinstance(image, np.ndarray) else image[1]
    return reasons
