"""Fine-tuning: it learns, resumes bit for bit and saves a classifier; parts of the recipe; errors."""

import json
import os
import shutil
import signal
from itertools import islice

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from PIL import Image
from safetensors.torch import load_file
from support import mistake

import dmjd
from dmjd.cli.main import main
from dmjd.config.finetune import FinetuneConfig
from dmjd.config.pretrain import PretrainConfig
from dmjd.data.labeled_loader import Augmentation, LabeledBatches
from dmjd.data.sources.registry import open_source
from dmjd.encoders.classifier import ImageClassifier
from dmjd.encoders.registry import create_encoder
from dmjd.encoders.stored import encoder_bytes
from dmjd.encoders.weights import ENCODER_FILE
from dmjd.engine.layer_decay import layer_groups
from dmjd.evaluation.results import read_evaluation
from dmjd.evaluation.supervised.finetune import finetune
from dmjd.evaluation.supervised.trainer import Stopped
from dmjd.evaluation.tables import context_lines
from dmjd.images.preprocess import Preprocess

SIZE = (16, 16)
EVERYTHING = {"rand_augment": 9, "erase": 0.5, "mixup": 0.8, "cutmix": 1.0, "drop_path": 0.2, "ema": 0.9}


def encoder_of(seed: int = 0):
    torch.manual_seed(seed)
    encoder = create_encoder("vit_tiny_patch8", img_size=SIZE, embed_dim=32, depth=2, num_heads=2)
    encoder.preprocess = Preprocess(SIZE)
    return encoder


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    """Noisy stripes, horizontal or vertical: 40 training images, 30 test images."""
    root = tmp_path_factory.mktemp("stripes")
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 30)):
        for i in range(count):
            name = ("horizontal", "vertical")[i % 2]
            (root / split / name).mkdir(parents=True, exist_ok=True)
            wave = 128 + 100 * np.sin(np.arange(20) * 0.8 + rng.uniform(0, 6))
            image = np.broadcast_to(wave[:, None, None], (20, 20, 3)) + rng.normal(0, 20, (20, 20, 3))
            image = image if name == "horizontal" else image.transpose(1, 0, 2)
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / split / name / f"{i:02d}.png")
    return root


@pytest.fixture
def run(tmp_path, stripes):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ENCODER_FILE).write_bytes(encoder_bytes(encoder_of()))
    config = PretrainConfig(data=str(stripes), labels="folder", img_size=SIZE, encoder="vit_tiny_patch8")
    (folder / "config.json").write_text(config.to_json())
    return folder


def test_fine_tuning_learns_and_leaves_a_classifier(run, stripes):
    result = finetune(run, steps=50, blr=0.05, device="cpu")
    assert result["result"]["top1"] > 0.85
    assert read_evaluation(run / "evaluation" / "finetune.json") == result
    folder = run / result["result"]["folder"]
    assert (folder / "confusion.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scores = [line["top1"] for line in lines if "top1" in line]
    assert len(scores) == 10
    assert scores[0] < result["result"]["top1"]
    assert result["result"]["best"]["top1"] == max(scores)  # all 30 test images are used to validate
    classifier = dmjd.load_classifier(run)
    assert classifier.classes == ["horizontal", "vertical"]
    test = open_source(stripes, split="test", labels="folder")
    right = [classifier.predict(test.read(i))[0][0] == test.classes[test.labels[i]] for i in range(len(test))]
    assert np.mean(right) == result["result"]["top1"]
    best = dmjd.load_classifier(folder / "best.safetensors")
    assert best.predict(test.read(0))[0][1] > 0.5


def test_finished_trainings_are_not_repeated(run):
    first = finetune(run, steps=2, device="cpu")
    times = {file: file.stat().st_mtime_ns for file in run.rglob("metrics.jsonl")}
    assert len(times) == 2
    assert finetune(run, steps=2, device="cpu") == first
    (run / ENCODER_FILE).write_bytes(encoder_bytes(encoder_of(seed=1)))
    second = finetune(run, steps=2, device="cpu")
    assert second["random_init"] == first["random_init"]
    assert second["result"]["folder"] != first["result"]["folder"]
    assert len(list(run.rglob("metrics.jsonl"))) == 3
    assert all(file.stat().st_mtime_ns == when for file, when in times.items())
    third = finetune(run, steps=3, device="cpu")
    assert third["random_init"]["folder"] != first["random_init"]["folder"]


def test_low_shot_and_seeds(run):
    result = finetune(run, steps=2, labels_per_class=3, seeds=2, device="cpu")
    assert result["data"]["num_train"] == 6
    assert result["data"]["labels_per_class"] == [3, 3]
    assert result["too_short"].startswith("2 steps (5.3 epochs) are too few to judge the encoder by")
    assert any(result["too_short"] in line for line in context_lines({"finetune": result}, run))
    for name in ("result", "random_init"):
        tops = [each["top1"] for each in result[name]["per_seed"]]
        assert result[name]["top1"] == pytest.approx(np.mean(tops))
        assert result[name]["top1_std"] == pytest.approx(np.std(tops, ddof=1))


def test_micro_batches_do_not_change_the_result(run, tmp_path):
    """With everything random enabled; the classifiers differ by rounding only."""
    options = EVERYTHING | {"steps": 6, "batch_size": 8, "blr": 0.01, "eval_every": 0}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finetune(run, out=whole, device="cpu", **options)
    finetune(run, out=parts, device="cpu", accumulate=4, **options)
    one, other = (load_file(out / "evaluation" / "finetune" / "classifier.safetensors") for out in (whole, parts))
    for key in one:
        if not key.endswith("qkv.bias"):  # attention does not depend on the bias of its keys, whose gradient is noise
            torch.testing.assert_close(other[key], one[key], rtol=1e-3, atol=1e-5, msg=key)


def test_interrupted_and_resumed_it_ends_with_the_same_bits(run, tmp_path, monkeypatch):
    """With everything random enabled (augmentation, mixing, drop path), and a moving average of the weights."""
    options = EVERYTHING | {"steps": 12, "batch_size": 8, "checkpoint_every": 3, "log_every": 1, "eval_every": 0.5}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = finetune(run, out=whole, device="cpu", **options)
    batches = LabeledBatches.__call__

    def until(step, event):
        def stream(self, start_step, fabric):
            for number, batch in enumerate(batches(self, start_step, fabric), start_step):
                if number == step:
                    event()
                yield batch

        return stream

    def crash():
        raise RuntimeError("crash")

    monkeypatch.setattr(LabeledBatches, "__call__", until(4, crash))
    with pytest.raises(RuntimeError, match="crash"):
        finetune(run, out=broken, device="cpu", **options)
    monkeypatch.setattr(LabeledBatches, "__call__", until(7, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(Stopped):
        finetune(run, out=broken, device="cpu", **options)
    assert sorted(f.name for f in broken.rglob("step-*")) == [
        "step-000000006.safetensors",
        "step-000000008.safetensors",
    ]
    assert not list(broken.rglob("result.json"))
    monkeypatch.setattr(LabeledBatches, "__call__", batches)
    assert finetune(run, out=broken, device="cpu", **options) == expected
    files = [out / "evaluation" / "finetune" / "classifier.safetensors" for out in (whole, broken)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_training_that_is_not_continued_is_named(run, stripes, tmp_path, capsys):
    """Stopped, then repeated with another setting, and with a changed image; with the same ones it resumes."""
    data = tmp_path / "data"
    shutil.copytree(stripes, data)
    batches = LabeledBatches.__call__

    def stopping(self, start_step, fabric):
        for batch in batches(self, start_step, fabric):
            os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    options = {"data": data, "labels": "folder", "device": "cpu", "num_workers": 0}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LabeledBatches, "__call__", stopping)
        with pytest.raises(Stopped):
            finetune(run, steps=3, **options)
    capsys.readouterr()
    named = "a new training, because it differs from the unfinished one in"
    finetune(run, steps=2, **options)
    assert f"finetune, pre-trained, seed 0: {named} {run}" in (printed := capsys.readouterr().err)
    assert "which is kept: steps: 3 -> 2" in printed
    finetune(run, steps=3, **options)
    printed = capsys.readouterr().err
    assert "pre-trained, seed 0: resumed at step 1" in printed
    assert "a new training" not in printed
    image = next((data / "train" / "vertical").iterdir())
    image.write_bytes((data / "train" / "vertical" / "03.png").read_bytes() + b" ")
    finetune(run, steps=3, **options)
    assert "which is kept: other images or labels" in capsys.readouterr().err


# --- the recipe


def test_layer_ids_and_decay():
    encoder = encoder_of()
    groups = layer_groups(ImageClassifier(encoder, ["a", "b"]), 0.05, 0.5)
    found = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert found[id(encoder.pos_embed)] == (0.125, 0.0)
    assert found[id(encoder.patch_embed.proj.weight)] == (0.125, 0.05)
    assert found[id(encoder.blocks[0].mlp.fc1.weight)] == (0.25, 0.05)
    assert found[id(encoder.blocks[1].mlp.fc1.bias)] == (0.5, 0.0)
    assert id(encoder.norm.weight) not in found
    assert max(found.values()) == (1.0, 0.05)
    conv = create_encoder("conv_vit_tiny_patch4", img_size=16)
    scales = {g["lr_scale"] for g in layer_groups(ImageClassifier(conv, ["a", "b"]), 0.05, 0.5)}
    assert scales == {0.5**i for i in range(13)}  # stages 1 and 2, eleven blocks, head


def test_the_published_recipe_and_the_one_for_small_sets():
    imagenet = FinetuneConfig().resolve(1_281_167, (224, 224), 768)
    assert (imagenet.batch_size, imagenet.blr, imagenet.epochs, imagenet.layer_decay) == (1024, 5e-4, 100, 0.65)
    assert (imagenet.mixup, imagenet.cutmix, imagenet.erase, imagenet.rand_augment) == (0.8, 1.0, 0.25, 9)
    assert (imagenet.crop_scale, imagenet.test_crop, imagenet.drop_path) == ((0.08, 1.0), 0.875, 0.1)
    assert FinetuneConfig().resolve(1_281_167, (224, 224), 1024).layer_decay == 0.75
    few = FinetuneConfig(mixup=0.2).resolve(500, (32, 32), 192)
    assert (few.batch_size, few.test_crop, few.mixup, few.cutmix, few.layer_decay) == (16, 1.0, 0.2, 0.0, 0.65)


@pytest.mark.parametrize(
    ("length", "decay", "short"),
    [
        ({"steps": 20}, 1.0, True),
        ({"steps": 100}, 1.0, True),
        ({"steps": 101}, 0.65, True),
        ({"steps": 200}, 0.65, False),
        ({"epochs": 3}, 1.0, True),
        ({"epochs": 100}, 0.65, False),
        ({"steps": 20, "layer_decay": 0.5}, 0.5, True),
    ],
)
def test_a_short_training_has_no_layer_decay_and_is_called_too_short(length, decay, short):
    """Of 2,000 images in batches of 62, 200 steps are six epochs."""
    config = FinetuneConfig(**length).resolve(2000, (32, 32), 96)
    assert config.layer_decay == decay
    assert (config.too_short(2000) is not None) == short


def test_epochs_of_exactly_a_hundred_steps_are_short():
    config = FinetuneConfig(epochs=4.4, batch_size=66).resolve(1500, (32, 32), 96)  # in floats a little more
    assert config.layer_decay == 1.0
    assert config.too_short(1500).startswith("100 steps (4.4 epochs)")


def test_all_epochs_of_a_few_images_are_not_too_short():
    config = FinetuneConfig().resolve(10, (32, 32), 96)  # 63 steps, but every image was seen a hundred times
    assert config.too_short(10) is None
    assert FinetuneConfig(epochs=1).resolve(1_281_167, (224, 224), 768).too_short(1_281_167) is None


def test_the_test_crop_is_the_center_of_a_larger_image():
    model = ImageClassifier(encoder_of(), ["a", "b"], test_crop=0.8)
    image = np.zeros((20, 20, 3), np.uint8)
    image[2:18, 2:18] = 255
    seen = model.crop(model.test_preprocess.raw(image))
    assert seen.shape == (1, 3, 16, 16)
    assert (seen == 255).all()


def batches(source, start, count, seed=0, workers=0, **options):
    config = FinetuneConfig(batch_size=4, **options).resolve(len(source), SIZE, 32)
    stream = LabeledBatches(source, config, Preprocess(SIZE), 2, seed, workers)(start, Fabric(accelerator="cpu"))
    taken = list(islice(stream, count))
    stream.close()
    return taken


def test_batches_depend_on_the_step_only(stripes):
    source = open_source(stripes, labels="folder")
    options = {k: v for k, v in EVERYTHING.items() if k not in ("drop_path", "ema")}
    whole = batches(source, 0, 4, **options)
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    later = batches(source, 2, 2, **options)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    by_workers = batches(source, 2, 2, workers=1, **options)
    for one, two, three in zip(whole[2:], later, by_workers, strict=True):
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(one, two, three, strict=True))
    assert not torch.equal(whole[0][0], whole[1][0])
    assert not torch.equal(whole[2][0], batches(source, 2, 1, seed=1, **options)[0][0])
    targets = torch.cat([target for _, target, _ in whole])
    torch.testing.assert_close(targets.sum(1), torch.ones(len(targets)))


@pytest.mark.parametrize("option", [{"rand_augment": 9}, {"erase": 1.0}, {"mixup": 0.8}, {"cutmix": 1.0}])
def test_every_augmentation_changes_images(stripes, option):
    source = open_source(stripes, labels="folder")
    off = {"rand_augment": 0, "erase": 0, "mixup": 0, "cutmix": 0}
    plain, changed = (torch.cat([x for x, _, _ in batches(source, 0, 5, **o)]) for o in (off, off | option))
    assert not torch.equal(plain, changed)


def test_the_replacement_of_an_unreadable_image_has_its_own_label(tmp_path):
    for i in range(6):
        name, level = ("dark", 20) if i % 2 else ("light", 235)
        (tmp_path / name).mkdir(exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), level, np.uint8)).save(tmp_path / name / f"{i}.png")
    (tmp_path / "dark" / "1.png").write_bytes(b"")
    source = open_source(tmp_path, labels="folder")
    plain = {"rand_augment": 0, "erase": 0, "mixup": 0, "cutmix": 0, "label_smoothing": 0}
    with pytest.warns(UserWarning, match="1.png: the file is empty"):
        taken = batches(source, 0, 6, **plain)
    for images, targets, _ in taken:
        light = images.mean(dim=(1, 2, 3)) > 0
        assert torch.equal(targets[:, source.classes.index("light")] == 1, light)


@pytest.mark.parametrize(("channels", "dtype"), [(1, np.uint8), (3, np.float32), (5, np.uint8)])
def test_any_channels_are_augmented(channels, dtype):
    preprocess = Preprocess(SIZE, channels, (0.5,) * channels, (0.2,) * channels)
    config = FinetuneConfig(rand_augment=9, erase=0.5).resolve(40, SIZE, 32)
    image = np.random.default_rng(0).integers(0, 256, (20, 20, channels)).astype(dtype)
    augment = Augmentation(config, preprocess)
    crops = [augment(image, [0, 0, 16, 16], False, key) for key in range(30)]
    assert {crop.shape for crop in crops} == {(channels, 16, 16)}
    assert all(crop.isfinite().all() for crop in crops)
    assert len({crop.sum().item() for crop in crops}) > 5  # they differ by key


# --- errors


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs", 1, "--steps", 2], "--epochs or --steps, not both"),
        (["--epochs", 0], "epochs must be greater than 0"),
        (["--mixup", -1], "--mixup must be at least 0"),
        (["--rand-augment", 11], "--rand-augment must lie between 0 and 10"),
        (["--labels-per-class", 0], "--labels-per-class must be at least 1"),
        (["--label-fraction", 0.1, "--labels-per-class", 3], "not both"),
        (["--mixupp", 1], "did you mean --mixup?"),
        (["--precision", "fp17"], "precision must be one of auto"),
        (["--batch-size", 5, "--mixup", 0.5], "must be even"),
    ],
)
def test_invalid_settings(capsys, run, flags, message):
    assert message in mistake(capsys, "evaluate", "finetune", run, "--device", "cpu", *flags)
    assert not list(run.rglob("metrics.jsonl"))


def test_a_misspelled_setting_is_named(run):
    with pytest.raises(ValueError, match="does not take mixupp; did you mean 'mixup'"):
        finetune(run, mixupp=0.8)


def test_invalid_sets_and_folders(capsys, run, stripes, tmp_path):
    one = stripes / "train" / "horizontal"
    options = ["--data", one, "--test-data", one, "--labels", "folder", "--steps", 1]
    (one / "in").mkdir()
    (one / "in" / "x.png").write_bytes((one / "00.png").read_bytes())
    assert len(mistake(capsys, "evaluate", "finetune", run, *options).splitlines()) == 1
    (one / "in" / "x.png").unlink()
    (one / "in").rmdir()
    (run / ENCODER_FILE).unlink()
    assert "holds no encoder.safetensors" in mistake(capsys, "evaluate", "finetune", run)
    assert "is not a run folder" in mistake(capsys, "evaluate", "finetune", tmp_path / "nothing")
    with pytest.raises(ValueError, match="fine-tune first"):
        dmjd.load_classifier(run)


def test_the_command_prints_a_table(capsys, run):
    assert main(["evaluate", "finetune", str(run), "--steps", "2", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "this encoder" in printed
    assert "random initialization" in printed
    assert "raw pixels" not in printed
