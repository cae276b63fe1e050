"""Loggers that fail are given up; the training goes on, and the cause of another error is not masked."""

import forked

from dmjd.engine.loggers import GuardedLogger, open_loggers

FULL = """
import resource, signal, sys
from pathlib import Path
from dmjd.engine.loggers import open_loggers
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
warnings = []
(logger,) = open_loggers(Path(sys.argv[1]), 0, None, warnings.append)
logger.log({"loss": 1.0}, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
for step in range(2, 400):
    logger.log({"loss": 1.0, "lr": 0.5}, step)
logger.close()
logger.close()
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print("\\n".join(warnings), file=sys.stderr)
"""


def test_tensorboard_on_a_full_disk_is_one_warning(tmp_path):
    assert forked.run(forked.execute, FULL, tmp_path / "run", log=tmp_path / "log", seconds=120) == 0
    said = (tmp_path / "log").read_text()
    assert said.startswith("TensorBoard failed and is closed; metrics.jsonl holds all scalars: ")
    assert len(said.splitlines()) == 1


def test_tensorboard_that_cannot_open_its_file_is_one_warning(tmp_path):
    (tmp_path / "file").write_text("")
    warnings: list[str] = []
    (logger,) = open_loggers(tmp_path / "file" / "run", 0, None, warnings.append)
    logger.log({"loss": 1.0}, 1)
    logger.close()
    assert len(warnings) == 1
    assert "Not a directory" in warnings[0]


def test_a_logger_that_works_logs_and_closes(tmp_path):
    class Recorder:
        def __init__(self) -> None:
            self.calls: list[object] = []

        def log(self, values, step) -> None:
            self.calls.append((values, step))
            if step == 2:
                raise OSError("no space")

        def close(self) -> None:
            self.calls.append("close")

    recorder, warnings = Recorder(), []
    logger = GuardedLogger("X", lambda: recorder, warnings.append)
    for step in (1, 2, 3):
        logger.log({"a": 1.0}, step)
    logger.close()
    assert recorder.calls == [({"a": 1.0}, 1), ({"a": 1.0}, 2), "close"]
    assert warnings == ["X failed and is closed; metrics.jsonl holds all scalars: no space"]
