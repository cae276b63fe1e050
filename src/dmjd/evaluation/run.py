"""Evaluate an encoder by the name of a task: ``evaluate``."""

from pathlib import Path
from typing import Any

from dmjd.config.checks import check_bool, check_path, check_text
from dmjd.config.evaluation import FrozenConfig
from dmjd.evaluation.frozen.protocol import evaluate_all
from dmjd.evaluation.registry import FrozenTask, get_task
from dmjd.nn.modes import own_defaults


@own_defaults()
def evaluate(task: str, run: str | Path, **options: Any) -> dict[str, Any]:
    """Evaluate a trained encoder and, with the same protocol, a randomly initialized one.

    Args:
        task: "knn", "knn_whitened", "linear", "linear_sweep", "finetune", "segmentation" or "detection".
        run: a run folder; or an encoder file or checkpoint, together with ``data``.
        options: settings of the task, which are the fields of :class:`~dmjd.config.evaluation.KnnConfig`,
            :class:`~dmjd.config.evaluation.LinearConfig`, :class:`~dmjd.config.evaluation.LinearSweepConfig`,
            :class:`~dmjd.config.finetune.FinetuneConfig`, :class:`~dmjd.config.dense.SegmentationConfig` or
            :class:`~dmjd.config.dense.DetectionConfig`; and ``sweep=True``, which makes "linear" the task
            "linear_sweep", as on the command line.

    Returns:
        The content of ``evaluation/<task>.json``: "result", "random_init" and, for tasks on frozen features,
        "raw_pixels" with scores from 0 to 1, such as "top1" and "top5"; "configuration", "data", "seed", ...

    Raises:
        ValueError: if the task or a setting is unknown, the folder is not a run, or the data is unlabeled, has a single
            class or no test part.
    """
    run = check_path("run", run)
    if task == "linear" and check_bool("sweep", options.pop("sweep", False)):
        task = "linear_sweep"
    entry = get_task(check_text("task", task))
    entry.load_config().check_names(options)
    if not isinstance(entry, FrozenTask):
        return entry.load_run()(run, **options)
    own = FrozenConfig.own(options)
    shared = {name: value for name, value in options.items() if name not in own}
    return evaluate_all({task: own}, run, **shared)[task]
