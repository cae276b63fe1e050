"""The linear probe: accuracy, schedule, settings."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from support import REAL_DATA, blobs, features

from dmjd.data.sources.registry import open_source
from dmjd.evaluation.frozen.linear import linear_probe, probe_schedule


@pytest.mark.parametrize("n", [40, 400, 3000])
def test_the_probe_solves_separable_data(n):
    result = linear_probe(blobs(n, 4, 32, 0.02, 1), blobs(400, 4, 32, 0.02, 2))
    assert result == {"top1": 1.0, "top5": 1.0}


@pytest.mark.parametrize("noise", [2.0, 4.0])
def test_the_probe_reaches_logistic_regression(noise):
    """With the published schedule it stays far below on sets of this size."""
    train, test = blobs(2000, 10, 32, noise, 1), blobs(4000, 10, 32, noise, 2)
    scaler = StandardScaler().fit(train.x)
    reference = LogisticRegression(max_iter=500).fit(scaler.transform(train.x), train.labels)
    expected = reference.score(scaler.transform(test.x), test.labels)
    assert linear_probe(train, test)["top1"] == pytest.approx(expected, abs=0.015)


def test_the_probe_reaches_logistic_regression_on_plain_digits():
    from sklearn.datasets import load_digits

    digits = load_digits()
    train, test = (features(digits.data[part], digits.target[part]) for part in (slice(0, 1400), slice(1400, None)))
    scaler = StandardScaler().fit(train.x)
    reference = LogisticRegression(max_iter=500).fit(scaler.transform(train.x), train.labels)
    expected = reference.score(scaler.transform(test.x), test.labels)
    assert linear_probe(train, test)["top1"] > expected - 0.025  # 397 test digits: a standard error is 0.015


def test_the_probe_does_not_depend_on_the_scale_of_features():
    train, test = blobs(400, 5, 16, 2.0, 1), blobs(1000, 5, 16, 2.0, 2)
    larger = [features(1000 * f.x.numpy() + 50, f.labels) for f in (train, test)]
    first, second = (linear_probe(*sets, epochs=20)["top1"] for sets in (larger, (train, test)))
    assert first == pytest.approx(second, abs=0.01)


def test_the_probe_is_a_function_of_its_seed_and_does_not_change_the_random_state():
    train, test = blobs(600, 5, 16, 3.0, 1), blobs(600, 5, 16, 3.0, 2)
    before = torch.random.get_rng_state()
    results = [linear_probe(train, test, epochs=3, seed=seed) for seed in (0, 0, 1)]
    assert results[0] == results[1] != results[2]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_every_setting_of_the_probe_has_an_effect():
    train, test = blobs(600, 8, 16, 3.0, 1), blobs(2000, 8, 16, 3.0, 2)
    settings = ({"epochs": 10}, {"epochs": 5}, {"blr": 0.001}, {"batch_size": 300}, {"weight_decay": 0.5})
    results = {tuple(linear_probe(train, test, **{"epochs": 10} | s).values()) for s in settings}
    assert len(results) == len(settings)


def test_the_schedule_is_the_published_one_on_large_sets_and_follows_small_ones():
    assert probe_schedule(1_281_167) == (4096, 0.1 * 4096 / 256)
    assert probe_schedule(500_000) == (4096, 0.1 * 4096 / 256)
    batch, lr = probe_schedule(12_000)
    assert batch == 500
    assert lr == pytest.approx(0.1 * 500 / 256 * 500_000 / 12_000)
    assert probe_schedule(10) == (10, pytest.approx(0.1 * 10 / 256 * 500_000 / 384))
    assert probe_schedule(12_000, batch_size=100_000)[0] == 12_000


@pytest.mark.parametrize("bad", [{"epochs": 0}, {"blr": 0.0}, {"batch_size": 0}, {"weight_decay": -1.0}])
def test_the_probe_checks_its_settings(bad):
    train = blobs(10, 2, 3, 1.0, 0)
    with pytest.raises(ValueError, match=next(iter(bad))):
        linear_probe(train, train, **bad)


@pytest.mark.skipif(not (REAL_DATA / "cifar10").exists(), reason="needs ../shared/data/cifar10")
def test_probe_on_cifar10_pixels_reaches_logistic_regression():
    folder = REAL_DATA / "cifar10"
    parts = {}
    for split, count in (("train", 2000), ("test", 2000)):  # the files are shuffled
        source = open_source(folder, split=split, labels="column")
        images = torch.stack([torch.tensor(source.read(i)) for i in range(count)]).permute(0, 3, 1, 2).float()
        small = torch.nn.functional.avg_pool2d(images, 8).flatten(1) / 255
        parts[split] = features(small, source.labels[:count])
    scaler = StandardScaler().fit(parts["train"].x)
    reference = LogisticRegression(max_iter=1000).fit(scaler.transform(parts["train"].x), parts["train"].labels)
    expected = reference.score(scaler.transform(parts["test"].x), parts["test"].labels)
    got = linear_probe(parts["train"], parts["test"])["top1"]
    assert expected - 0.02 < got < expected + 0.06  # early stopping reduces overfitting


def test_a_probe_that_diverges_is_an_error():
    """It would give every image the same class."""
    with pytest.raises(ValueError, match=r"diverged at the learning rate 8.*use a smaller --blr"):
        linear_probe(blobs(200, 4, 8, 0.5, 0), blobs(50, 4, 8, 0.5, 1), blr=1e4, steps=200)
    for blr in (float("nan"), float("inf"), 0, "1", True):
        with pytest.raises(ValueError, match="blr must"):
            linear_probe(blobs(200, 4, 8, 0.5, 0), blobs(50, 4, 8, 0.5, 1), blr=blr, steps=2)
