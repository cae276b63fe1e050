"""The process that trains in a run folder, as the lock of the folder names it."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from dmjd.engine.processes import num_processes
from dmjd.system import exists

LOCK = ".lock"


@dataclass(frozen=True)
class Owner:
    """A process that holds the lock of a run folder.

    Attributes:
        pid: its id.
        machine: its machine.
        processes: how many processes the run has; None for one of a former version.
    """

    pid: int
    machine: str
    processes: int | None = None

    @classmethod
    def this_process(cls) -> "Owner":
        """This process."""
        return cls(os.getpid(), platform.node(), num_processes())

    @classmethod
    def read(cls, lock: Path) -> "Owner | None":
        """The process that a lock names; None if it names none."""
        first, *others = lock.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
        pid, _, machine = first.partition(" ")
        if not pid.isdecimal() or int(pid) == 0:  # a signal to process 0 would go to a whole group
            return None
        return cls(int(pid), machine, int(others[0]) if others and others[0].isdecimal() else None)

    def to_text(self) -> str:
        """What :meth:`read` reads."""
        return f"{self.pid} {self.machine}\n{self.processes}\n"

    def is_here(self) -> bool:
        """Whether it is a process of this machine."""
        return self.machine == platform.node()

    def is_dead(self) -> bool:
        """Whether it is a process of this machine that no longer exists."""
        return self.is_here() and not exists(self.pid)
