"""Segmentation: maps, decoders, inference, scores, and whole evaluations of tiny sets."""

import itertools
import shutil

import numpy as np
import pytest
import torch
from dense_sets import make_run, make_segmentation_set
from PIL import Image
from support import mistake

from dmjd.cli.main import main
from dmjd.config.dense import SegmentationConfig
from dmjd.data.dense_loader import ExampleBatch, ExampleLoader
from dmjd.data.dense_transforms import IGNORE
from dmjd.encoders.registry import create_encoder
from dmjd.encoders.sources import read_weights
from dmjd.encoders.weights import load_encoder
from dmjd.engine.layer_decay import layer_groups
from dmjd.evaluation.metrics import iou_scores
from dmjd.evaluation.results import read_evaluation
from dmjd.evaluation.run import evaluate
from dmjd.evaluation.supervised.dense_task import rounded_up
from dmjd.evaluation.supervised.pyramid import LastMap, Pyramid, UPerNet
from dmjd.evaluation.supervised.segmentation import SegmentationTask, predict, starts
from dmjd.evaluation.tables import results_table
from dmjd.images.preprocess import Preprocess
from dmjd.runs.checkpoint import FINAL, load_checkpoint

QUICK = {"decoder_dim": 32, "batch_size": 4, "num_workers": 0, "device": "cpu", "num_evals": 0, "num_images": 2}
FLAGS = ("--decoder-dim", 32, "--batch-size", 4, "--num-workers", 0, "--device", "cpu", "--num-evals", 1)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_segmentation_set(tmp_path_factory.mktemp("shapes") / "set", {"train": 16, "test": 6})


def tiny(name: str = "vit_tiny_patch8", img_size=(32, 48), **options):
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    if name.startswith("conv_vit"):
        sizes = {"embed_dims": (8, 16, 32), "depths": (1, 1, 1), "num_heads": 2}
    torch.manual_seed(0)
    encoder = create_encoder(name, img_size=img_size, **sizes | options)
    encoder.preprocess = Preprocess(img_size)
    return encoder


def task_of(encoder, **options) -> SegmentationTask:
    config = SegmentationConfig(decoder_dim=32, img_size=encoder.img_size, **options).resolve(encoder.img_size, 8)
    return SegmentationTask(encoder, config, 3)


def test_dropout_does_not_depend_on_accumulation():
    task = task_of(tiny(drop_path=0.5)).train()
    images, target = torch.rand(4, 3, 32, 48) * 255, torch.randint(0, 3, (4, 32, 48), dtype=torch.int16)
    keys = torch.arange(4)
    whole = task(ExampleBatch(images, target, keys))["loss"]
    parts = [task(ExampleBatch(images[i : i + 2], target[i : i + 2], keys[i : i + 2]))["loss"] for i in (0, 2)]
    torch.testing.assert_close(sum(parts) / 2, whole)
    assert not torch.equal(task(ExampleBatch(images, target, keys + 4))["loss"], whole)


# --- maps and decoders


@pytest.mark.parametrize(
    ("name", "strides", "widths"),
    [
        ("vit_tiny_patch16", [4, 8, 16, 32], [8, 16, 32, 32]),
        ("vit_tiny_patch8", [4, 8, 16, 32], [16, 32, 32, 32]),
        ("vit_tiny_patch4", [4, 8, 16, 32], [32, 32, 32, 32]),
        ("vit_tiny_patch32", [8, 16, 32, 64], [8, 16, 32, 32]),
        ("conv_vit_tiny_patch16", [4, 8, 16, 32], [8, 16, 32, 32]),
        ("conv_vit_tiny_patch8", [2, 4, 8, 16], [8, 16, 32, 32]),
    ],
)
def test_a_pyramid_has_four_maps_of_any_encoder(name, strides, widths):
    pyramid = Pyramid(tiny(name, img_size=(64, 128)))
    maps = pyramid(torch.randn(2, 3, 64, 128))
    assert pyramid.strides == strides
    assert [tuple(x.shape) for x in maps] == [(2, w, 64 // s, 128 // s) for w, s in zip(widths, strides, strict=True)]


def test_conv_vit_uses_its_own_three_scales():
    encoder = tiny("conv_vit_tiny_patch16", img_size=(32, 48))
    images = torch.randn(1, 3, 32, 48)
    pyramid = Pyramid(encoder)
    own = encoder.forward_intermediates(images, intermediates_only=True)
    for norm, x, found in zip(pyramid.norms, own, pyramid(images), strict=False):
        torch.testing.assert_close(found, norm(x))


def test_decoders_take_odd_grids_and_a_batch_of_one():
    for name in ("vit_tiny_patch8", "conv_vit_tiny_patch8"):
        task = task_of(tiny(name, img_size=(40, 56))).train()
        assert task.logits(torch.rand(1, 3, 40, 56) * 255).shape == (1, 3, 40, 56)


@pytest.mark.parametrize(
    "options", [{}, {"decoder": "linear"}, {"freeze": True}, {"decoder": "linear", "freeze": True}]
)
@pytest.mark.parametrize("name", ["vit_tiny_patch8", "conv_vit_tiny_patch8"])
def test_every_trained_parameter_gets_a_gradient(name, options):
    """Data-parallel training would wait for parameters without a gradient."""
    task = task_of(tiny(name), **options).train()
    groups = layer_groups(task, 0.05, 0.5)
    batch = ExampleBatch(torch.rand(2, 3, 32, 48) * 255, torch.randint(-1, 3, (2, 32, 48), dtype=torch.int16))
    task(batch)["loss"].backward()
    trained = [p for group in groups for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in task.parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained)
    of_encoder = any(p.requires_grad for p in task.encoder.parameters())
    assert of_encoder != options.get("freeze", False)


def test_a_frozen_encoder_stays_in_evaluation_mode():
    task = task_of(tiny(drop_path=0.5), freeze=True).train()
    assert not any(module.training for module in task.encoder.modules())
    assert isinstance(task.decoder, UPerNet)
    assert task.decoder.training
    assert task_of(tiny(drop_path=0.5)).train().encoder.training
    assert isinstance(task_of(tiny(), decoder="linear").maps, LastMap)


def test_unlabeled_pixels_count_in_no_loss():
    task = task_of(tiny()).eval()
    images = torch.rand(2, 3, 32, 48) * 255
    target = torch.randint(0, 3, (2, 32, 48), dtype=torch.int16)
    half = target.clone()
    half[1] = IGNORE
    alone = task(ExampleBatch(images[:1], target[:1]))["loss"]
    torch.testing.assert_close(task(ExampleBatch(images, half))["loss"], alone)
    nothing = task(ExampleBatch(images, torch.full_like(target, IGNORE)))["loss"]
    assert nothing.item() == 0  # not 0 / 0


# --- another size


# --- inference


def test_windows_cover_everything_and_overlap():
    for length in range(24, 90):
        places = starts(length, 24)
        assert places[0] == 0
        assert places[-1] == length - 24
        assert all(b - a <= 16 for a, b in itertools.pairwise(places))


def images_of(*sizes):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3)).astype(np.uint8) for size in sizes]


def test_every_pixel_gets_a_class_for_any_size_and_batch():
    task = task_of(tiny()).eval()
    images = images_of((32, 48), (31, 50), (100, 30), (32, 48), (5, 7))
    with torch.no_grad():
        together, alone = predict(task, images), [predict(task, [image])[0] for image in images]
    for image, one, other in zip(images, together, alone, strict=True):
        assert tuple(one.shape) == image.shape[:2]
        assert (one == other).float().mean() > 0.99  # sums in batches round differently


def test_one_sliding_window_is_the_whole_image():
    torch.manual_seed(1)
    whole, slide = task_of(tiny()).eval(), task_of(tiny(), inference="slide").eval()
    slide.load_state_dict(whole.state_dict())
    image = images_of((64, 96))
    with torch.no_grad():
        assert torch.equal(predict(whole, image)[0], predict(slide, image)[0])
        long = images_of((32, 200))  # covers 32 x 48 at its own size: five windows
        assert not torch.equal(predict(whole, long)[0], predict(slide, long)[0])


def test_padding_affects_no_result():
    """31 rows are padded to 32. Without attention between tokens, predictions for the other rows must not change."""
    task = task_of(tiny(), decoder="linear", resize=(31, 48)).eval()
    for block in task.encoder.blocks:
        block.attn.proj.weight.data.zero_()  # no attention between tokens
        block.attn.proj.bias.data.zero_()
    image = images_of((31, 48))[0]
    with torch.no_grad():
        found = predict(task, [image])[0]
        fill = np.array([m * 255 for m in task.preprocess.mean]).round().astype(np.uint8)
        full = np.concatenate([image, np.broadcast_to(fill, (1, 48, 3))])
        expected = task.logits(torch.from_numpy(full).permute(2, 0, 1)[None].float())[0, :, :31].argmax(0)
    assert torch.equal(found, expected)


# --- scores


def test_intersection_over_union_equals_counting():
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 3, 500), rng.integers(0, 3, 500)
    truth[truth == 2] = 1  # class 2 is only predicted; class 3 is neither predicted nor in the ground truth
    confusion = np.zeros((4, 4))
    np.add.at(confusion, (truth, predicted), 1)
    scores = iou_scores(torch.from_numpy(confusion), ["a", "b", "c", "d"])
    for name, k in (("a", 0), ("b", 1), ("c", 2)):
        expected = np.sum((truth == k) & (predicted == k)) / np.sum((truth == k) | (predicted == k))
        assert scores["iou"][name] == pytest.approx(expected)
    assert scores["iou"]["c"] == 0
    assert scores["iou"]["d"] is None
    assert scores["miou"] == pytest.approx((scores["iou"]["a"] + scores["iou"]["b"] + 0) / 3)
    assert scores["pixel_accuracy"] == pytest.approx(np.mean(truth == predicted))
    assert scores["mean_accuracy"] == pytest.approx(np.mean([np.mean(predicted[truth == k] == k) for k in (0, 1)]))


# --- whole evaluations


@pytest.mark.parametrize("name", ["vit_tiny_patch8", pytest.param("conv_vit_tiny_patch8", marks=pytest.mark.slow)])
def test_a_few_steps_learn_the_shapes(name, shapes, tmp_path):
    run = make_run(tmp_path / "run", name)
    options = {"steps": 50, "img_size": (32, 48), "blr": 0.1, "scale": (0.8, 1.2), "color_jitter": False}
    result = evaluate("segmentation", run, data=shapes, **options, **QUICK)
    assert read_evaluation(run / "evaluation" / "segmentation.json") == result
    for start in ("result", "random_init"):  # background everywhere gives 0.27
        assert 0.45 < result[start]["miou"] < 1
        assert set(result[start]["iou"]) == {"0", "1", "2"}
        assert (run / result[start]["folder"] / "predictions.png").read_bytes().startswith(b"\x89PNG")
    assert result["data"]["classes"] == ["0", "1", "2"]
    assert result["data"]["num_test"] == 6
    assert result["configuration"]["img_size"] == [32, 48]
    assert results_table({"segmentation": result}).row_count == 6


def test_the_same_weights_give_the_same_result_as_random_ones(shapes, tmp_path):
    """Without layer-wise decay, a "pre-trained" encoder with the random weights of the seed gives equal scores."""
    run = make_run(tmp_path / "run", seed=3)
    options = {"data": shapes, "steps": 3, "layer_decay": 1.0, "img_size": 32, "seed": 3, **QUICK}
    result = evaluate("segmentation", run, **options)
    assert result["result"]["iou"] == result["random_init"]["iou"]


def test_a_crash_changes_nothing(shapes, tmp_path, monkeypatch):
    runs = [make_run(tmp_path / name) for name in ("whole", "cut")]
    options = {"data": shapes, "steps": 5, "checkpoint_every": 2, "decoder": "linear", "drop_path": 0.3, **QUICK}
    expected = evaluate("segmentation", runs[0], **options)
    batches = ExampleLoader.batches

    def until_step_three(self, start_step=0):
        for count, batch in enumerate(batches(self, start_step)):
            if start_step + count == 3:
                raise RuntimeError("crash")
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(ExampleLoader, "batches", until_step_three)
        with pytest.raises(RuntimeError):
            evaluate("segmentation", runs[1], **options)
    again = evaluate("segmentation", runs[1], **options)
    assert again == expected
    trained = runs[1] / again["result"]["folder"] / "result.json"
    changed = trained.stat().st_mtime_ns
    assert evaluate("segmentation", runs[1], **options) == expected  # read, not trained again
    assert trained.stat().st_mtime_ns == changed
    other = evaluate("segmentation", runs[1], **options | {"seed": 1})
    assert other["result"]["folder"] != again["result"]["folder"]


def test_a_frozen_encoder_keeps_its_weights(shapes, tmp_path):
    run = make_run(tmp_path / "run")
    result = evaluate("segmentation", run, data=shapes, steps=3, freeze=True, decoder="linear", img_size=32, **QUICK)
    file = run / result["result"]["folder"] / "checkpoints" / FINAL
    final = load_checkpoint(file).part("model")
    for name, value in load_encoder(run).state_dict().items():
        assert torch.equal(final[f"maps.encoder.{name}"], value)
    with pytest.raises(ValueError, match="holds the training of an evaluation"):
        read_weights(file)


def test_gray_images_and_gray_encoders(shapes, tmp_path):
    gray = tmp_path / "gray"
    shutil.copytree(shapes, gray)
    for file in gray.rglob("images/*.png"):
        Image.open(file).convert("L").save(file)
    for channels in (1, 3):
        run = make_run(tmp_path / f"run{channels}", in_chans=channels)
        result = evaluate("segmentation", run, data=gray, steps=1, decoder="linear", **QUICK)
        assert 0 <= result["result"]["miou"] <= 1


def test_bf16_and_sizes_that_the_patch_does_not_divide(shapes, tmp_path):
    run = make_run(tmp_path / "run")
    options = {"img_size": (21, 30), "resize": (30, 41), "inference": "slide", "accumulate": 2}
    result = evaluate("segmentation", run, data=shapes, steps=2, precision="bf16", **options, **QUICK)
    assert 0 <= result["result"]["miou"] <= 1
    assert rounded_up((21, 30), 8) == (24, 32)


def test_the_command_prints_a_table(capsys, shapes, tmp_path):
    run = make_run(tmp_path / "run")
    command = ["evaluate", "segmentation", run, "--data", shapes, "--steps", 2, "--img-size", 24, 32, *FLAGS]
    assert main([str(argument) for argument in command]) == 0
    printed = capsys.readouterr()
    assert "miou" in printed.out
    assert "random initialization" in printed.out
    assert "3 classes: 0, 1, 2" in printed.err
    assert (run / "evaluation" / "segmentation.json").exists()


def test_errors_are_raised_before_training(capsys, shapes, tmp_path):
    run = make_run(tmp_path / "run")

    def message(*arguments) -> str:
        return mistake(capsys, "evaluate", "segmentation", *arguments, "--device", "cpu")

    assert "say which images and masks: --data" in message(run)
    assert "holds the number 2; the 2 classes" in message(run, "--data", shapes, "--num-classes", 2)
    assert "holds no images with masks" in message(run, "--data", "digits")
    assert "decoder must be one of upernet, linear" in message(run, "--data", shapes, "--decoder", "upernets")
    assert "scale must lie between" in message(run, "--data", shapes, "--scale", 0, 1)
    assert "give --epochs or --steps, not both" in message(run, "--data", shapes, "--epochs", 1, "--steps", 1)
    assert "did you mean --decoder-dim?" in message(run, "--data", shapes, "--decoder-dims", 3)
    (tmp_path / "empty").mkdir()
    assert "holds no encoder.safetensors" in message(tmp_path / "empty", "--data", shapes)
    assert "does not exist" in message(tmp_path / "nowhere", "--data", shapes)
    assert "say where results go with --out" in message(run / "encoder.safetensors", "--data", shapes)
    assert not (run / "evaluation").exists()
    with pytest.raises(ValueError, match="'segmentation' does not take epoch"):
        evaluate("segmentation", run, data=shapes, epoch=3)


def test_a_test_set_of_its_own(shapes, tmp_path):
    run = make_run(tmp_path / "run")
    alone = tmp_path / "alone"
    for kind in ("images", "masks"):
        shutil.copytree(shapes / "test" / kind, alone / kind)
    options = {"data": shapes, "steps": 2, "decoder": "linear", **QUICK}
    first = evaluate("segmentation", run / "encoder.safetensors", out=tmp_path / "one", **options)
    second = evaluate("segmentation", run, test_data=alone, out=tmp_path / "two", **options)
    assert second["result"]["iou"] == first["result"]["iou"]
    assert not (run / "evaluation").exists()
