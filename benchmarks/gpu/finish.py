"""Test what the study brought back: kNN, linear probe and fine-tuned classifiers on the test images. Needs no GPU.

    python benchmarks/gpu/finish.py --data shared/cifar10

Reads ``benchmarks/results/gpu/``, writes ``study_test.json`` there and prints the tables of all parts. What is measured
already is not repeated.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, Record, versions
from report import print_tables
from study_plan import SCRATCH, VARIANTS, classifier_file, encoder_file, state_file

import dmjd
from dmjd.data.eval_loader import EvalLoader
from dmjd.data.sources.base import Source
from dmjd.data.sources.registry import align_labels, open_source
from dmjd.encoders.stored import weights_hash
from dmjd.encoders.weights import load_encoder
from dmjd.evaluation.metrics import accuracies, label_ranks
from dmjd.pretraining.bench import machine

PARTS = ("result", "random_init", "raw_pixels")


def frozen(file: Path, data: Path, work: Path, precision: str) -> dict[str, Any]:
    """kNN and linear probe of an encoder, random weights and raw pixels: task -> part -> top-1."""
    results = dmjd.evaluation.evaluate_all(
        {"knn": {}, "linear": {}}, file, data=str(data), labels="column", out=str(work), precision=precision
    )
    return {task: {part: result[part]["top1"] for part in PARTS} for task, result in results.items()}


@torch.inference_mode()
def tested(file: Path, train: Source, test: Source) -> dict[str, float]:
    """Accuracies of a classifier on all test images."""
    model = dmjd.load_classifier(file)
    assert model.classes == train.classes
    labels, ranks = torch.from_numpy(align_labels(train, test)), []
    for batch in EvalLoader(test, model.test_preprocess):
        scores = model(model.crop(model.test_preprocess.normalize(batch.raw)))
        ranks.append(label_ranks(scores.float(), labels[batch.index]))
    return accuracies(torch.cat(ranks)) | {"num_test": int(sum(map(len, ranks)))}


def main() -> None:
    """Test, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu_study"), help="baselines are kept here")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    given = parser.parse_args()
    record = Record("study_test", given.results, given.results)
    record.describe(machine=machine(torch.device("cpu")), versions=versions(), precision=given.precision)
    train, test = (open_source(str(given.data), split=split, labels="column") for split in ("train", "test"))
    for variant in [*VARIANTS, SCRATCH]:
        entry = dict(record.entries.get(variant, {}))
        file = encoder_file(given.results, variant)
        if file.exists():
            state_file(given.results, variant).unlink(missing_ok=True)  # of an earlier visit
        if file.exists() and entry.get("encoder") != (key := weights_hash(load_encoder(file))):
            entry |= frozen(file, given.data, given.work / variant, given.precision) | {"encoder": key}
            record.put(variant, entry)
        file = classifier_file(given.results, variant)
        if file.exists() and "finetune" not in entry:
            entry["finetune"] = tested(file, train, test)
            record.put(variant, entry)
    print_tables(given.results)


if __name__ == "__main__":
    main()
