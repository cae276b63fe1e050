"""Evaluations on frozen features: metrics, kNN, features, the protocol, online kNN."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sets import save
from sklearn.neighbors import KNeighborsClassifier
from support import FEATURE_SIZE, GOLDEN, blobs, features, tiny_encoder

from dmjd.config.pretrain import PretrainConfig
from dmjd.data.sources.registry import open_source
from dmjd.data.sources.subset import SubsetSource
from dmjd.encoders.registry import create_encoder
from dmjd.encoders.stored import encoder_bytes
from dmjd.encoders.weights import ENCODER_FILE, load_encoder
from dmjd.evaluation.frozen.features import Features, extract, pooled, raw_pixels
from dmjd.evaluation.frozen.knn import knn
from dmjd.evaluation.frozen.linear import linear_probe
from dmjd.evaluation.frozen.online_knn import OnlineKnn
from dmjd.evaluation.frozen.protocol import evaluate_frozen
from dmjd.evaluation.metrics import accuracies, label_ranks
from dmjd.evaluation.results import read_evaluation
from dmjd.evaluation.run import evaluate
from dmjd.evaluation.setup import open_sets
from dmjd.evaluation.tables import results_table
from dmjd.images.preprocess import Preprocess
from dmjd.warning import DMJDWarning

# --- metrics


def test_a_tie_or_a_nan_counts_against_the_classifier():
    labels = torch.tensor([0, 1, 2])
    assert label_ranks(torch.zeros(3, 3), labels).tolist() == [2, 2, 2]
    assert label_ranks(torch.full((3, 3), torch.nan), labels).tolist() == [2, 2, 2]
    assert label_ranks(torch.eye(3), labels).tolist() == [0, 0, 0]
    assert accuracies(torch.tensor([0, 1, 4, 5])) == {"top1": 0.25, "top5": 0.75}


# --- kNN


def brute_force_knn(train: Features, test: Features, k: int, temperature: float) -> dict[str, float]:
    def unit(x):
        x = x.double().numpy()
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    bank, ranks = unit(train.x), []
    for x, label in zip(unit(test.x), test.labels, strict=True):
        similarity = bank @ x
        votes = np.zeros(int(max(train.labels.max(), test.labels.max())) + 1)
        for i in np.argsort(-similarity)[:k]:
            votes[train.labels[i]] += np.exp(similarity[i] / temperature)
        ranks.append(np.sum(votes >= votes[label]) - 1)
    return {f"top{n}": float(np.mean(np.array(ranks) < n)) for n in (1, 5)}


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(2, 60),
    classes=st.integers(2, 9),
    dim=st.integers(2, 12),
    k=st.integers(1, 100),
    temperature=st.sampled_from([0.07, 0.5]),
    seed=st.integers(0, 10**6),
)
def test_knn_equals_brute_force_also_with_more_neighbors_than_images(n, classes, dim, k, temperature, seed):
    train, test = blobs(max(n, classes), classes, dim, 1.0, seed), blobs(20, classes, dim, 1.0, seed + 1)
    result = knn(train, test, k=k, temperature=temperature)
    by_k = result.pop("top1_by_k")
    assert result == brute_force_knn(train, test, k, temperature)
    assert by_k == {str(n): brute_force_knn(train, test, n, temperature)["top1"] for n in {1, 5, 10, 20, k}}


def test_knn_equals_sklearn():
    train, test = blobs(500, 7, 16, 2.0, 1), blobs(200, 7, 16, 2.0, 2)
    reference = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07))
    reference.fit(train.x.double(), train.labels)
    assert knn(train, test)["top1"] == pytest.approx(reference.score(test.x.double(), test.labels), abs=1e-9)


def test_knn_does_not_depend_on_chunks():
    train, test = blobs(300, 5, 8, 1.5, 1), blobs(2500, 5, 8, 1.5, 2)  # more than one chunk
    halves = [features(test.x[part], test.labels[part]) for part in (slice(0, 700), slice(700, None))]
    first, second = (knn(train, half)["top1"] for half in halves)
    assert knn(train, test)["top1"] == pytest.approx((700 * first + 1800 * second) / 2500)


def test_a_small_temperature_does_not_overflow():
    train = blobs(200, 4, 8, 0.1, 1)
    result = knn(train, train, temperature=1e-4)
    assert (result["top1"], result["top5"]) == (1.0, 1.0)


@pytest.mark.parametrize("evaluator", [knn, linear_probe])
@pytest.mark.parametrize(
    ("train", "message"),
    [
        (features(np.ones((4, 3)), [1, 1, 1, 1]), "same label"),
        (features(np.ones((4, 3)), [-1, -1, -1, -1]), "--labels folder or --labels column"),
        (features(np.full((4, 3), np.nan), [0, 1, 0, 1]), "not finite"),
        (features(np.ones((4, 5)), [0, 1, 0, 1]), "5 values"),
        (features(np.ones((0, 3)), []), "empty"),
        (Features(torch.ones(4, 3), torch.arange(3), torch.arange(4)), "4 features and 3 labels"),
    ],
)
def test_unusable_features_are_an_error(evaluator, train, message):
    with pytest.raises(ValueError, match=message):
        evaluator(train, features(np.ones((2, 3)), [0, 1]))


@pytest.mark.parametrize(("labels", "k"), [(1, 1), (4, 1), (5, 5), (10, 10), (19, 10), (20, 20), (300, 20)])
def test_neighbors_follow_the_labels_unless_they_are_given(labels, k):
    """A class of the training set is smaller, and one is missing: the median class counts."""
    train = blobs(6000, 6, 8, 1.0, seed=0)
    rows = [torch.where(train.labels == one)[0][: 1 if one == 0 else labels] for one in range(5)]
    train, test = features(train.x[torch.cat(rows)], train.labels[torch.cat(rows)]), blobs(200, 6, 8, 1.0, seed=1)
    found = knn(train, test)
    assert found == knn(train, test, k=k)
    assert found["top1"] == found["top1_by_k"][str(k)]
    assert list(found["top1_by_k"]) == ["1", "5", "10", "20"]
    assert knn(train, test, k=20)["top1"] == found["top1_by_k"]["20"]


@pytest.mark.parametrize("bad", [{"k": 0}, {"temperature": 0.0}, {"temperature": float("nan")}])
def test_knn_checks_its_settings(bad):
    train = blobs(10, 2, 3, 1.0, 0)
    with pytest.raises(ValueError, match="must be"):
        knn(train, train, **bad)


# --- features


def test_extract_gives_pooled_features_in_order_and_reports_unreadable_images(image_folder, tmp_path):
    folder = tmp_path / "some"
    shutil.copytree(image_folder, folder)
    (folder / "cats" / "00.jpg").write_text("no image")
    source = open_source(folder, labels="folder")
    encoder = tiny_encoder().train()
    got = extract(encoder, source, batch_size=7)
    assert encoder.training
    assert [name for name, _ in got.unreadable] == [source.describe(0)]
    assert got.rows.tolist() == list(range(1, 25))
    assert got.labels.tolist() == source.labels[1:].tolist()
    encoder.eval()
    with torch.no_grad():
        images = encoder.preprocess([source.describe(i) for i in range(1, 25)])
        expected = encoder(images).mean(1)
        expected = torch.nn.functional.layer_norm(expected, (32,), eps=1e-6)
    assert torch.allclose(got.x, expected, atol=1e-5)


def test_features_do_not_depend_on_workers(image_folder):
    source = open_source(image_folder)
    one, two = (extract(tiny_encoder(), source, batch_size=5, num_workers=n) for n in (0, 2))
    assert torch.equal(one.x, two.x)
    assert one.labels.tolist() == [-1] * 24


def test_raw_pixels_are_the_image_and_never_more_than_3072_values():
    small = torch.rand(2, 3, 32, 32)
    assert torch.equal(raw_pixels(small), small.flatten(1))
    for shape in ((2, 3, 224, 224), (2, 1, 64, 300), (2, 5, 48, 80), (1, 3, 33, 33)):
        assert raw_pixels(torch.rand(shape)).shape[1] <= 3072
    blocks = torch.rand(1, 3, 32, 32)
    assert torch.allclose(
        raw_pixels(blocks.repeat_interleave(4, 2).repeat_interleave(4, 3)), blocks.flatten(1), atol=1e-6
    )


def test_nothing_readable_is_an_error(tmp_path):
    (tmp_path / "a.jpg").write_text("no image")
    with pytest.raises(ValueError, match="none of the 1 images"):
        extract(tiny_encoder(), open_source(tmp_path))


def test_an_encoder_without_preprocessing_is_an_error(image_folder):
    encoder = tiny_encoder()
    encoder.preprocess = None
    with pytest.raises(ValueError, match="preprocess"):
        extract(encoder, open_source(image_folder))


def test_bf16_features_are_close_to_fp32_and_other_precisions_are_an_error():
    encoder = tiny_encoder()
    images = torch.randn(4, 3, *encoder.img_size)
    with torch.inference_mode():
        full, half = (pooled(encoder, precision)(images) for precision in ("fp32", "bf16"))
    assert half.dtype == torch.float32
    assert not torch.equal(full, half)
    torch.testing.assert_close(half, full, rtol=0, atol=0.1)
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16"):
        pooled(encoder, "fp17")


# --- evaluate


def test_evaluate_measures_the_encoder_and_both_baselines(run):
    result = evaluate("knn", run, k=3, device="cpu")
    assert read_evaluation(run / "evaluation" / "knn.json") == result
    for name in ("result", "random_init", "raw_pixels"):
        assert 0 <= result[name]["top1"] <= result[name]["top5"] == 1
    assert result["configuration"] == {"k": 3, "temperature": 0.07, "precision": "fp32"}
    assert result["overrides"] == {"k": 3}
    assert result["data"] | {"fingerprint": "", "train": "", "test": ""} == {
        "split": "test",
        "train": "",
        "test": "",
        "fingerprint": "",
        "num_train": 24,
        "num_test": 12,
        "num_unreadable": 0,
        "classes": 2,
        "labels_per_class": [12, 12],
        "chance": 1.0,  # the test set holds one class
    }
    assert set(result["versions"]) == {"dmjd", "torch", "python"}


def test_test_labels_follow_the_names_of_the_training_classes(run):
    """The test part has dogs only, its class 0. Every test image is in the training set, so kNN is right."""
    shutil.rmtree(run.parent / "my data" / "test")
    shutil.copytree(run.parent / "my data" / "train" / "dogs", run.parent / "my data" / "test" / "dogs")
    assert evaluate("knn", run, k=1)["result"]["top1"] == 1.0


def test_random_baseline_depends_on_the_seed_and_not_on_the_random_state(run):
    torch.manual_seed(1)
    first = evaluate("knn", run)
    torch.manual_seed(2)
    assert evaluate("knn", run) == first
    fresh = tiny_encoder(seed=5)
    (run / ENCODER_FILE).write_bytes(encoder_bytes(fresh))
    result = evaluate("linear", run, seed=5)
    assert result["result"] == result["random_init"]  # the "trained" one has the weights of that seed


def test_other_data_and_another_folder(run, image_folder, tmp_path):
    evaluate("knn", run, data=image_folder, test_data=image_folder, labels="folder", out=tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "evaluation" / "knn.json").exists()
    assert not (run / "evaluation").exists()


def test_dark_images_are_warned_about(run, tmp_path, recwarn):
    for i in range(8):
        save(tmp_path / ("train" if i < 4 else "test") / str(i % 2) / f"{i}.png", i)
    open_sets(PretrainConfig(data=str(tmp_path), labels="folder"), run, load_encoder(run), {})
    assert not recwarn.list  # its own images were looked at when the run began
    with pytest.warns(DMJDWarning, match=r"between 0 and 3, 1\.2% of the range"):
        open_sets(PretrainConfig(), run, load_encoder(run), {"data": str(tmp_path), "labels": "folder"})


def test_an_encoder_file_needs_data(run, image_folder):
    with pytest.raises(ValueError, match="pass --data"):
        evaluate("knn", run / ENCODER_FILE)
    result = evaluate("knn", run / ENCODER_FILE, data=image_folder, test_data=image_folder, labels="folder", k=1)
    assert result["result"]["top1"] == 1.0


def test_gray_images_for_a_one_channel_encoder(run, tmp_path):
    encoder = create_encoder("vit_tiny_patch8", img_size=FEATURE_SIZE, in_chans=1, embed_dim=32, depth=1, num_heads=2)
    encoder.preprocess = Preprocess(FEATURE_SIZE, 1, (0.5,), (0.2,))
    (tmp_path / "gray.safetensors").write_bytes(encoder_bytes(encoder))
    result = evaluate("knn", tmp_path / "gray.safetensors", data=run.parent / "my data", labels="folder")
    assert result["data"]["num_train"] == 24


def test_errors_say_what_to_do(run, image_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    one_class = tmp_path / "one"
    shutil.copytree(image_folder / "cats", one_class / "train" / "cats")
    shutil.copytree(image_folder / "cats", one_class / "test" / "cats")
    for call, message in [
        (lambda: evaluate("kn", run), "did you mean 'knn'"),
        (lambda: evaluate("knn", run, epochs=3), "does not take epochs"),
        (lambda: evaluate("linear", run, device_="cpu"), "does not take device_"),
        (lambda: evaluate("knn", tmp_path / "empty"), "is not a run folder"),
        (lambda: evaluate("knn", tmp_path / "nowhere"), "is not a run folder"),
        (lambda: evaluate("knn", run, labels="none"), "pass --labels folder or --labels column"),
        (lambda: evaluate("knn", run, data=one_class), "at least two classes"),
        (lambda: evaluate("knn", run, data=image_folder), "pass --test-data"),
        (lambda: evaluate("knn", run, batch_size=0), "batch_size must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    (run / ENCODER_FILE).unlink()
    with pytest.raises(ValueError, match=ENCODER_FILE):
        evaluate("knn", run)


def test_the_table_has_a_row_for_each_encoder_and_a_column_for_each_task(run):
    table = results_table({"knn": evaluate("knn", run), "linear": evaluate("linear", run, epochs=2)})
    assert [column.header for column in table.columns] == ["top-1 accuracy, %", "knn", "linear"]
    assert table.row_count == 3


# --- online kNN


def test_online_knn_equals_knn_and_does_not_change_the_encoder(image_folder):
    source = open_source(image_folder, labels="folder")
    encoder = tiny_encoder().train()
    online = OnlineKnn(source, source, encoder.preprocess)
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    expected = extract(encoder, source)
    assert online(encoder) == knn(expected, expected)["top1"]
    assert encoder.training
    assert all(torch.equal(state[name], value) for name, value in encoder.state_dict().items())


def test_online_knn_uses_evenly_spaced_images_of_large_sets(monkeypatch, image_folder):
    monkeypatch.setattr("dmjd.evaluation.frozen.online_knn.NUM_TRAIN", 8)
    monkeypatch.setattr("dmjd.evaluation.frozen.online_knn.NUM_TEST", 5)
    source, encoder = open_source(image_folder, labels="folder"), tiny_encoder()
    train, test = (
        extract(encoder, SubsetSource(source, rows)) for rows in ([0, 3, 6, 9, 12, 15, 18, 21], [0, 4, 9, 14, 19])
    )
    assert OnlineKnn(source, source, encoder.preprocess)(encoder) == knn(train, test)["top1"]


def test_online_knn_needs_labels(image_folder):
    source = open_source(image_folder / "cats", labels="none")
    with pytest.raises(ValueError, match="has no labels"):
        OnlineKnn(source, source, Preprocess(FEATURE_SIZE))


def test_an_encoder_in_memory_gives_the_files_of_one_that_is_opened(run):
    """It may be in training mode, in which stochastic depth would make its features random."""
    opened = evaluate("knn", run, device="cpu")
    file = run / "evaluation" / "knn.json"
    file.unlink()
    encoder = tiny_encoder().train()
    train = open_source(run.parent / "my data", labels="folder")
    test = open_source(run.parent / "my data", split="test", labels="folder")
    assert evaluate_frozen({"knn": {}}, encoder, train, test, folder=run) == {"knn": opened}
    assert read_evaluation(file) == opened
    assert encoder.training


def test_a_run_of_version_0_1_gives_the_same_scores(tmp_path):
    """Its stored baselines are used; the scores of the encoder are recomputed."""
    run = shutil.copytree(GOLDEN / "run_v0.1", tmp_path / "run")
    old = json.loads((run / "evaluation" / "knn.json").read_text())
    new = evaluate("knn", run, device="cpu", k=20, **old["overrides"])  # 20 was the default for any number of labels
    for name in ("result", "random_init", "raw_pixels", "configuration", "encoder", "seed"):
        assert new[name] == old[name], name
