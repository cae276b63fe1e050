"""How many worker processes make sense on a machine, and how many it allows."""

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator

from dmjd.warning import DMJDWarning

_SPARE_FILES = 32  # for everything else than workers: images, checkpoints, logs


def allowed_workers(num_workers: int, files_each: int) -> int:
    """The number of workers that the limit of open files allows; raises the limit where the system permits it."""
    try:
        import resource  # Unix only

        used = len(os.listdir("/proc/self/fd"))
    except (ImportError, OSError):
        return num_workers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = used + _SPARE_FILES + num_workers * files_each
    if soft in (resource.RLIM_INFINITY, -1) or needed <= soft:
        return num_workers
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if allowed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    fitting = max(0, (allowed - used - _SPARE_FILES) // files_each)
    if fitting < num_workers:
        _warn(
            f"the limit of {allowed} open files allows {fitting} of {num_workers} data loading processes; raise it "
            "with ulimit -n"
        )
    return min(fitting, num_workers)


@functools.cache
def warn_of_many(num_workers: int, cores: int) -> None:
    """Warn, once, of more worker processes than CPU cores."""
    _warn(
        f"{num_workers} data loading processes share {cores} CPU core(s): unless they wait for a slow disk or network, "
        f"more than {cores} are no faster (--num-workers)"
    )


@contextlib.contextmanager
def without_advice() -> Iterator[None]:
    """Without torch's own warning about more workers than cores."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        yield


def _warn(text: str) -> None:
    warnings.warn(text, DMJDWarning, stacklevel=4)
