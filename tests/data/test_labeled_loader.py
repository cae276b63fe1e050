"""Mixup and CutMix: the same mixed images in any number of micro-batches and processes."""

from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from dmjd.config.finetune import FinetuneConfig
from dmjd.data.labeled_loader import LabeledBatches, mirrored_pairs
from dmjd.data.sources.registry import open_source
from dmjd.data.sources.subset import SubsetSource
from dmjd.images.preprocess import Preprocess

SIZE = (16, 16)
STEPS = 4


@pytest.fixture(scope="module")
def digits():
    return SubsetSource(open_source("digits"), range(256))  # the loader of all would take most of the time


def mixed(source, accumulate: int, processes: int, batch_size: int = 8, **options) -> dict[int, tuple]:
    """Key of an image -> the mixed image and its target, over all steps, micro-batches and processes."""
    config = FinetuneConfig(batch_size=batch_size, accumulate=accumulate, **options).resolve(len(source), SIZE, 32)
    found = {}
    for rank in range(processes):
        process = SimpleNamespace(global_rank=rank, world_size=processes, device=torch.device("cpu"))
        stream = LabeledBatches(source, config, Preprocess(SIZE), 10, 3, 0)(0, process)
        for images, targets, keys in islice(stream, STEPS * accumulate):
            found |= {int(key): (x, y) for key, x, y in zip(keys, images, targets, strict=True)}
        stream.close()
    return found


@pytest.mark.parametrize("options", [{"mixup": 0.8, "cutmix": 1.0}, {"mixup": 0.8, "cutmix": 0}, {"cutmix": 1.0}])
def test_mixed_images_depend_neither_on_micro_batches_nor_on_processes(digits, options):
    whole = mixed(digits, 1, 1, **options)
    assert len(whole) == 8 * STEPS
    assert any(0.2 < y.max() < 0.8 for _, y in whole.values())  # they are mixed
    for accumulate, processes in [(2, 1), (1, 2), (2, 2), (4, 1)]:
        parts = mixed(digits, accumulate, processes, **options)
        assert parts.keys() == whole.keys()
        for key, (image, target) in whole.items():
            assert torch.equal(parts[key][0], image)
            assert torch.equal(parts[key][1], target)


def test_pairs_are_mirrored():
    order = mirrored_pairs(8)
    assert order.tolist() == [0, 2, 4, 6, 7, 5, 3, 1]
    assert [(a // 2, b // 2) for a, b in zip(order, order.flip(0), strict=True)] == [(a // 2,) * 2 for a in order]


@pytest.mark.parametrize(("accumulate", "processes", "multiple"), [(2, 1, 4), (1, 2, 4)])
def test_pairs_need_even_micro_batches(digits, accumulate, processes, multiple):
    with pytest.raises(ValueError, match=f"multiple of {multiple}, or switch both off"):
        mixed(digits, accumulate, processes, batch_size=6, mixup=0.8)
