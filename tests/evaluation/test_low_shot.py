"""Low-shot subsets, stored baselines, the sweep of linear probes."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import blobs, features, tiny_encoder

from dmjd.data.sources.registry import open_source
from dmjd.data.sources.subset import SubsetSource
from dmjd.encoders.registry import create_encoder
from dmjd.encoders.stored import encoder_bytes
from dmjd.encoders.weights import ENCODER_FILE
from dmjd.evaluation.frozen.features import pooled
from dmjd.evaluation.frozen.linear_sweep import RATES, SweepFeatures, linear_sweep
from dmjd.evaluation.frozen.protocol import evaluate_all
from dmjd.evaluation.low_shot import LowShot, hold_out, summarize
from dmjd.evaluation.results import read_evaluation
from dmjd.evaluation.run import evaluate

label_sets = st.lists(st.integers(0, 4), min_size=1, max_size=200).map(np.array)


@settings(deadline=None, max_examples=50)
@given(labels=label_sets, seed=st.integers(0, 10**6), n=st.integers(1, 20))
def test_subsets_by_number_are_stratified_and_nested(labels, seed, n):
    rows = LowShot(per_class=n).rows(labels, seed)
    assert len(set(rows.tolist())) == len(rows)
    for label in np.unique(labels):
        assert (labels[rows] == label).sum() == min(n, (labels == label).sum())
    assert set(rows) <= set(LowShot(per_class=n + 1).rows(labels, seed))


@settings(deadline=None, max_examples=50)
@given(labels=label_sets, seed=st.integers(0, 10**6), fraction=st.floats(0.01, 1), more=st.floats(0, 1))
def test_subsets_by_fraction_are_stratified_and_nested(labels, seed, fraction, more):
    rows = LowShot(fraction=fraction).rows(labels, seed)
    for label in np.unique(labels):
        expected = fraction * (labels == label).sum()
        assert max(1, expected - 0.5) <= (labels[rows] == label).sum() <= max(1, expected + 0.5)
    assert set(rows) <= set(LowShot(fraction=min(1.0, fraction + more)).rows(labels, seed))


def test_other_seeds_draw_other_images_and_the_same_seed_the_same():
    labels = np.arange(1000) % 10
    first, second = (LowShot(fraction=0.1).rows(labels, seed) for seed in (0, 1))
    assert 0 < len(set(first) & set(second)) < 40  # 10 expected by chance
    assert (first == LowShot(fraction=0.1).rows(labels, 0)).all()
    assert len(LowShot().rows(labels, 0)) == 1000


def test_images_of_each_class_are_held_out_but_never_its_last_one():
    labels = np.array([0] * 100 + [1] * 10 + [2] * 2 + [3])
    held = hold_out(labels, 0.1, seed=0)
    assert [int(held[labels == c].sum()) for c in range(4)] == [10, 1, 1, 0]
    with pytest.raises(ValueError, match="no part of the training set can be held out"):
        hold_out(np.arange(5), 0.1, seed=0)


def test_the_summary_is_mean_and_standard_deviation():
    results = [{"top1": 0.5, "by": {"1": 0.2}, "word": "a"}, {"top1": 0.7, "by": {"1": 0.4}, "word": "b"}]
    summary = summarize(results, [3, 4])
    assert summary["top1"] == pytest.approx(0.6)
    assert summary["top1_std"] == pytest.approx(0.1 * 2**0.5)
    assert summary["by"] == {"1": pytest.approx(0.3)}
    assert summary["per_seed"] == [{"seed": 3, **results[0]}, {"seed": 4, **results[1]}]
    assert summarize(results[:1], [3]) == results[0]


def test_a_subset_is_a_source_of_its_own(image_folder):
    whole = open_source(image_folder, labels="folder")
    part = SubsetSource(whole, [3, 20])
    assert (part.read(1) == whole.read(20)).all()
    assert part.labels.tolist() == whole.labels[[3, 20]].tolist()
    assert part.describe(0) == whole.describe(3)
    assert len({part.fingerprint(), whole.fingerprint(), SubsetSource(whole, [3, 21]).fingerprint()}) == 3


def test_only_images_of_the_subsets_are_read(run, monkeypatch):
    read = []
    plain = SubsetSource.read
    monkeypatch.setattr(SubsetSource, "read", lambda self, i: read.append(int(self.rows[i])) or plain(self, i))
    result = evaluate("knn", run, labels_per_class=2, seeds=3, device="cpu")
    assert len(result["result"]["per_seed"]) == 3
    assert result["data"]["num_train"] == 4
    labels = open_source(run.parent / "my data", labels="folder").labels
    drawn = {int(row) for seed in range(3) for row in LowShot(per_class=2).rows(labels, seed)}
    assert set(read) == drawn
    assert 4 < len(drawn) <= 12


def test_only_the_subset_votes(run):
    """Neighbors outside of the subset do not vote."""
    few = evaluate("knn", run, labels_per_class=1, seeds=1, device="cpu")["result"]
    assert few["top1"] == few["top1_by_k"]["1"]  # only two images vote, and the nearest weighs more


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"labels_per_class": 0}, "labels_per_class must be at least 1"),
        ({"label_fraction": 0.0}, "label_fraction must be greater than 0"),
        ({"label_fraction": 1.5}, "label_fraction"),
        ({"label_fraction": 0.5, "labels_per_class": 3}, "not both"),
        ({"seeds": 0}, "seeds must be at least 1"),
    ],
)
def test_invalid_low_shot_settings(run, flags, message):
    with pytest.raises(ValueError, match=message):
        evaluate("knn", run, **flags)


# --- baselines


def test_a_baseline_is_measured_once_for_a_configuration(run):
    first = evaluate("knn", run, device="cpu")
    kept = run / "evaluation" / "baselines.json"
    marked = {key: value | {"top1": 0.125} for key, value in json.loads(kept.read_text()).items()}
    for value in marked.values():
        del value["sha256"]  # as former versions wrote it
    kept.write_text(json.dumps(marked))
    (run / ENCODER_FILE).write_bytes(encoder_bytes(tiny_encoder(seed=3)))  # other weights, same baseline
    second = evaluate("knn", run, device="cpu")
    assert second["random_init"]["top1"] == second["raw_pixels"]["top1"] == 0.125
    assert second["encoder"] != first["encoder"]
    for other in ({"seed": 1}, {"k": 3}, {"precision": "bf16"}, {"labels_per_class": 3}):
        assert evaluate("knn", run, device="cpu", **other)["random_init"].get("top1") != 0.125


# --- sweep


def side_by_side(*parts, names):
    x = torch.cat([torch.as_tensor(part.x) for part in parts], dim=1)
    return dataclasses.replace(features(x, parts[0].labels), parts=names)


def test_the_sweep_chooses_on_held_out_images_and_never_on_the_test():
    """The first part separates the classes of the training set only, so it is chosen although it is worse at test."""
    fair_train, fair_test = blobs(600, 4, 16, 2.0, 1), blobs(500, 4, 16, 2.0, 2)
    clear = blobs(600, 4, 16, 0.02, 3)
    order = [torch.nonzero(clear.labels == label)[0, 0] for label in fair_train.labels]
    trap_train = features(clear.x[torch.stack(order)] + 0.01 * torch.randn(600, 16), fair_train.labels)
    trap_test = features(torch.randn(500, 16), fair_test.labels)
    train, test = (
        side_by_side(*parts, names=("trap", "fair")) for parts in ((trap_train, fair_train), (trap_test, fair_test))
    )
    result = linear_sweep(train, test, epochs=20)
    assert result["features"] == "trap"
    assert result["held_out_top1"] == 1.0
    assert result["top1"] < 0.5
    assert result["probes"] == 2 * len(RATES)


def test_the_sweep_finds_the_informative_part():
    train, noise = blobs(600, 4, 16, 1.0, 1), features(torch.randn(600, 16), torch.zeros(600))
    test, more_noise = blobs(500, 4, 16, 1.0, 2), features(torch.randn(500, 16), torch.zeros(500))
    train, test = (side_by_side(*parts, names=("blobs", "noise")) for parts in ((train, noise), (test, more_noise)))
    result = linear_sweep(train, test, epochs=10)
    assert result["features"] == "blobs"
    assert result["top1"] == pytest.approx(result["held_out_top1"], abs=0.1)
    short = [linear_sweep(train, test, steps=2) for _ in range(2)]
    assert short[0] == short[1]


def test_a_sweep_that_can_hold_out_nothing_is_an_error_before_images_are_read(run, monkeypatch):
    monkeypatch.setattr(SubsetSource, "read", lambda *_: pytest.fail("an image was read"))
    with pytest.raises(ValueError, match="no part of the training set can be held out: use more labels"):
        evaluate("linear_sweep", run, labels_per_class=1)


@pytest.mark.parametrize("name", ["vit_tiny_patch8", "conv_vit_tiny_patch8"])
def test_sweep_features_hold_the_pooled_feature(name):
    encoder = create_encoder(name, img_size=16).eval()
    images = torch.randn(3, 3, 16, 16)
    with torch.inference_mode():
        extractor = SweepFeatures(encoder)
        parts = extractor(images).chunk(len(extractor.parts), dim=1)
        assert len(parts) == 6
        place, count = extractor.pooled_part
        assert count == 6
        assert torch.equal(parts[place], pooled(encoder)(images))
    assert not torch.allclose(parts[0], parts[place])


def test_frozen_tasks_share_a_pass_and_a_sweep_has_its_file(run):
    alone = evaluate("knn", run, device="cpu")
    (run / "evaluation" / "baselines.json").unlink()
    results = evaluate_all({"knn": {}, "linear_sweep": {"steps": 3}}, run, device="cpu")
    assert results["knn"] == alone
    written = read_evaluation(run / "evaluation" / "linear_sweep.json")
    assert written == results["linear_sweep"]
    assert written["raw_pixels"]["features"] == "raw pixels"
    assert "block" in written["random_init"]["features"]
