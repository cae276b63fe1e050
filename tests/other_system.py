"""A run as on a system without ``fcntl``, ``resource`` and most signals, whose workers start as new programs.

    python other_system.py DATA OUT

Imports every module of the package, then trains three steps with one worker, which gets a signal while it starts. Used
by ``test_system.py``.
"""

import importlib
import multiprocessing
import os
import pkgutil
import signal
import sys
from importlib.machinery import PathFinder

if __name__ == "__mp_main__":  # the worker, before it has handlers; the group of a job gets such a signal
    os.kill(os.getpid(), signal.SIGTERM)

import torch  # noqa: F401 (which may use what is taken away below)

if __name__ == "__main__":
    import lightning.fabric  # noqa: F401 (so may this)

MISSING = ("fcntl", "resource", "termios", "pwd", "grp")


class Nothing(PathFinder):
    """Finds no module of a Unix."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name in MISSING:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


for module in MISSING:
    sys.modules.pop(module, None)
sys.meta_path.insert(0, Nothing)
for name in ("SIGHUP", "SIGUSR1", "SIGBUS", "pthread_kill"):  # the others are used by torch and multiprocessing
    if hasattr(signal, name):
        delattr(signal, name)


def main(data: str, out: str) -> int:
    multiprocessing.set_start_method("spawn")
    import dmjd

    for module in pkgutil.walk_packages(dmjd.__path__, "dmjd."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    assert not {"fcntl", "resource"} & set(sys.modules)
    from dmjd.cli.main import main as command

    flags = ["--encoder", "vit_tiny_patch8", "--embed-dim", "32", "--depth", "1", "--num-heads", "2"]
    flags += ["--decoder-dim", "16", "--decoder-depth", "1", "--decoder-heads", "2", "--img-size", "32"]
    flags += ["--steps", "3", "--batch-size", "4", "--num-workers", "1", "--device", "cpu", "--no-final-eval"]
    return command(["pretrain", "folder", "--data", data, "--out", out, "--eval-every", "0", "--no-report", *flags])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
