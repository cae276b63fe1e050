"""Gain of pre-training on CIFAR-10: fine-tune a ViT from pre-trained and from random weights by the same schedule.

    OMP_NUM_THREADS=1 python benchmarks/transfer/transfer_cifar10.py --data cifar10 --out runs/transfer_cifar10

Three comparisons, each over several seeds (of subset, head, order and random weights):

- 1 % and 10 % of the labels, the encoder pre-trained on all 50,000 images without labels;
- all labels of a tenth of the images, the encoder pre-trained on that tenth only.

Lengths are in steps, so a busy machine changes no result. The script can be resumed: finished parts are read from their
files. The 10,000 test images are evaluated once, at the end of each training.
"""

import argparse
import io
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from transfer_record import portable, training_seconds, write_record

import dmjd
from dmjd.data.sources.base import Source
from dmjd.data.sources.registry import open_source
from dmjd.data.sources.subset import SubsetSource
from dmjd.engine.device import pick_device
from dmjd.evaluation.low_shot import LowShot
from dmjd.evaluation.results import versions
from dmjd.files import atomic
from dmjd.pretraining.bench import machine

sys.path.insert(0, str(Path(__file__).parents[1]))
from labels import labels_of

PRETRAIN: dict[str, Any] = {
    "encoder": "vit_tiny_patch8",
    "depth": (6,),
    "decoder_dim": 64,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "img_size": 32,
    "batch_size": 64,
    "blr": 3e-3,
    "theta": 4.0,
    "clip_grad": 3.0,
    "eval_every": 0,
    "final_eval": False,
}
# Too few epochs to overfit, so only crops and flips. The learning rate lies between the default, 2.8e-3, and four
# times the default. On held-out training images the higher one was better for pre-trained and worse for random weights.
FINETUNE: dict[str, Any] = {
    "batch_size": 32,
    "blr": 5e-3,
    "layer_decay": 0.75,
    "clip_grad": 3.0,
    "rand_augment": 0.0,
    "eval_every": 0.0,
}
# name: (whether the set is cut to a tenth, steps of each fine-tuning, evaluation settings)
COMPARISONS: dict[str, tuple[bool, int, dict[str, Any]]] = {
    "1 % of the labels": (False, 200, {"label_fraction": 0.01}),
    "10 % of the labels": (False, 400, {"label_fraction": 0.1}),
    "a tenth of the images": (True, 400, {}),
}
STARTS = ("result", "random_init")


def write_tenth(data: str, folder: Path) -> None:
    """A tenth of each class as train.parquet, and the whole test set as test.parquet."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        file = folder / f"{split}.parquet"
        if file.exists():
            continue
        source: Source = open_source(data, split=split, labels=labels_of(data))
        if split == "train":
            assert source.labels is not None
            source = SubsetSource(source, LowShot(fraction=0.1).rows(source.labels, seed=0))
        assert source.labels is not None
        rows = []
        for i in range(len(source)):
            buffer = io.BytesIO()
            Image.fromarray(source.read(i)).save(buffer, format="png")
            rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "label": int(source.labels[i])})
        with atomic(file) as temporary:
            pq.write_table(pa.Table.from_pylist(rows), temporary)


def compare(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Pre-train if needed, then fine-tune from both initializations with every seed."""
    tenth, steps, options = COMPARISONS[name]
    data, labels = given.data, labels_of(given.data)
    if tenth:
        data, labels = str(given.out / "tenth"), "column"
        write_tenth(given.data, Path(data))
    run = given.out / ("pretrained-tenth" if tenth else "pretrained-all")
    config = dmjd.recipes.dmjd(
        data=data,
        out=str(run),
        labels=labels,
        steps=given.tenth_steps if tenth else given.pretrain_steps,
        precision=given.precision,
        device=given.device,
        **PRETRAIN,
    )
    pretrained = dmjd.pretrain(config)
    if not pretrained.finished:
        raise SystemExit(0)
    result = dmjd.evaluate(
        "finetune",
        run,
        seeds=given.seeds,
        steps=given.steps or steps,
        precision=given.precision,
        device=given.device,
        **FINETUNE,
        **options,
    )
    folders = [run / one["folder"] for start in STARTS for one in result[start].get("per_seed", [result[start]])]
    return {
        "pretraining": {"steps": pretrained.step, "seconds": training_seconds(run)},
        "finetuning": {"steps": given.steps or steps, "seconds": sum(map(training_seconds, folders))},
        **{start: result[start] for start in STARTS},
        "configuration": result["configuration"],
        "data": portable(result["data"]),
    }


def show(rows: dict[str, dict[str, Any]]) -> None:
    """Mean and standard deviation over the seeds, in percent."""
    print(f"{'top-1, %':26s} {'pre-trained':>14s} {'from scratch':>14s} {'gain':>7s}")
    for name, row in rows.items():
        ours, scratch = row["result"], row["random_init"]
        cells = [f"{100 * s['top1']:.1f} ± {100 * s.get('top1_std', 0):.1f}" for s in (ours, scratch)]
        print(f"{name:26s} {cells[0]:>14s} {cells[1]:>14s} {100 * (ours['top1'] - scratch['top1']):+7.1f}")


def main() -> None:
    """Run the comparisons, write the JSON file, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--out", type=Path, default=Path("runs/transfer_cifar10"))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/transfer_cifar10.json"))
    parser.add_argument("--pretrain-steps", type=int, default=1500, help="on all images")
    parser.add_argument("--tenth-steps", type=int, default=800, help="of pre-training on a tenth of the images")
    parser.add_argument("--steps", type=int, help="of each fine-tuning; default each comparison's own")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--comparisons", nargs="*", default=list(COMPARISONS), choices=list(COMPARISONS))
    given = parser.parse_args()
    rows = {}
    for name in given.comparisons:
        try:
            rows[name] = compare(name, given)
        except dmjd.evaluation.Stopped:
            raise SystemExit(0) from None
    settings = {name: getattr(given, name) for name in ("pretrain_steps", "tenth_steps", "seeds", "precision")}
    content = {
        "settings": settings,
        "pretrain": PRETRAIN,
        "machine": machine(pick_device(given.device)),
        "versions": versions(),
        "rows": rows,
    }
    write_record(given.json, content)
    show(rows)


if __name__ == "__main__":
    main()
