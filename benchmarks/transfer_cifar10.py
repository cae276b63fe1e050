"""What pre-training is worth on CIFAR-10: fine-tuning from a pre-trained ViT-tiny against from scratch, same schedule.

    python benchmarks/transfer_cifar10.py --data cifar10 --out runs/transfer_cifar10

Three comparisons, each over several seeds (of subset, head, order and random weights):

- 1 % and 10 % of the labels, the encoder pre-trained on all 50,000 pictures without labels;
- all labels of a tenth of the pictures, the encoder pre-trained on that tenth only.

Everything is resumable: started again, finished parts are read and the interrupted one goes on. All 10,000 test
pictures are looked at once, at the end of each training.
"""

import argparse
import io
import json
import os
import platform
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

import dmjd
from dmjd.checkpoint import atomic, write_text
from dmjd.data import Source, open_source
from dmjd.data.subset import SubsetSource
from dmjd.evaluation.few_labels import FewLabels

PRETRAIN: dict[str, Any] = {
    "encoder": "vit_tiny_patch4",
    "img_size": 32,
    "batch_size": 64,
    "blr": 3e-3,
    "theta": 4.0,
    "clip_grad": 3.0,
    "eval_every": 0,
    "final_eval": False,
}
# name: (whether the set is cut to a tenth, evaluation settings)
COMPARISONS: dict[str, tuple[bool, dict[str, Any]]] = {
    "1 % of the labels": (False, {"label_fraction": 0.01}),
    "10 % of the labels": (False, {"label_fraction": 0.1}),
    "a tenth of the pictures": (True, {}),
}


def labels_of(data: str) -> str:
    """Where a set's labels are: in a column of tables, in a folder's names, or in the set itself."""
    path = Path(data).expanduser()
    if not path.exists():
        return "none" if data == "cifar10" else "column"
    return "column" if path.is_file() or list(path.glob("*.parquet")) else "folder"


def write_tenth(data: str, folder: Path) -> None:
    """A tenth of each class as train.parquet, and the whole test set as test.parquet."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        file = folder / f"{split}.parquet"
        if file.exists():
            continue
        source: Source = open_source(data, split=split, labels=labels_of(data))
        if split == "train":
            source = SubsetSource(source, FewLabels(fraction=0.1).rows(source.labels, seed=0))
        rows = []
        for i in range(len(source)):
            buffer = io.BytesIO()
            Image.fromarray(source.read(i)).save(buffer, format="png")
            rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "label": int(source.labels[i])})
        with atomic(file) as temporary:
            pq.write_table(pa.Table.from_pylist(rows), temporary)


def compare(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Pre-train where that is not done, and fine-tune from both starts on every seed."""
    tenth, options = COMPARISONS[name]
    data, labels = arguments.data, labels_of(arguments.data)
    if tenth:
        data, labels = str(arguments.out / "tenth"), "column"
        write_tenth(arguments.data, Path(data))
    run = arguments.out / ("pretrained-tenth" if tenth else "pretrained-all")
    config = dmjd.recipes.dmjd(
        data=data,
        out=str(run),
        labels=labels,
        minutes=arguments.minutes,
        precision=arguments.precision,
        device=arguments.device,
        **PRETRAIN,
    )
    if not dmjd.pretrain(config).finished:
        raise SystemExit(0)
    result = dmjd.evaluate(
        "finetune",
        run,
        seeds=arguments.seeds,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        eval_every=0.0,
        precision=arguments.precision,
        device=arguments.device,
        **options,
    )
    return {key: result[key] for key in ("result", "random_init", "configuration", "data")}


def show(rows: dict[str, dict[str, Any]]) -> None:
    """Mean and spread over the seeds, in percent."""
    print(f"{'top-1, %':26s} {'pre-trained':>14s} {'from scratch':>14s} {'gain':>7s}")
    for name, row in rows.items():
        ours, scratch = row["result"], row["random_init"]
        cells = [f"{100 * s['top1']:.1f} ± {100 * s.get('top1_std', 0):.1f}" for s in (ours, scratch)]
        print(f"{name:26s} {cells[0]:>14s} {cells[1]:>14s} {100 * (ours['top1'] - scratch['top1']):+7.1f}")


def main() -> None:
    """Run the comparisons, write one JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--out", type=Path, default=Path("runs/transfer_cifar10"))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/transfer_cifar10.json"))
    parser.add_argument("--minutes", type=float, default=10.0, help="of each pre-training")
    parser.add_argument("--steps", type=int, default=150, help="of each fine-tuning")
    parser.add_argument("--batch-size", type=int, default=64, help="of each fine-tuning")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--comparisons", nargs="*", default=list(COMPARISONS), choices=list(COMPARISONS))
    arguments = parser.parse_args()
    rows = {}
    for name in arguments.comparisons:
        try:
            rows[name] = compare(name, arguments)
        except dmjd.evaluation.Stopped:
            raise SystemExit(0) from None
    settings = {name: getattr(arguments, name) for name in ("minutes", "steps", "batch_size", "seeds", "precision")}
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    if torch.cuda.is_available() and arguments.device != "cpu":
        machine["gpu"] = torch.cuda.get_device_name()
    versions = {"dmjd": dmjd.__version__, "torch": torch.__version__, "python": platform.python_version()}
    content = {"settings": settings, "pretrain": PRETRAIN, "machine": machine, "versions": versions, "rows": rows}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    write_text(arguments.json, json.dumps(content, indent=2) + "\n")
    show(rows)


if __name__ == "__main__":
    main()
