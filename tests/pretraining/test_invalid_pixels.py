"""Runs on images in which some pixels mean nothing: nothing that is learned or measured depends on these."""

import json
import os
import signal
import sys

import forked
import numpy as np
import pytest
import tifffile
import torch
from pretraining.test_distributed import TOLERANCE, without_key_bias
from safetensors.torch import load_file
from support import TINY, TINY_FIELDS, metrics, mistake
from tiny_models import KEYS, smooth_images, tiny_model

import dmjd
from dmjd.cli.main import main
from dmjd.config import recipes
from dmjd.data.sources.registry import open_source
from dmjd.data.statistics import measure_stats
from dmjd.evaluation.frozen.features import extract
from dmjd.images.preprocess import Preprocess

FIELDS = TINY_FIELDS | {"in_chans": 2, "batch_size": 8, "nodata": "auto", "held_out": 4, "steps": 6}


def write(folder, garbage: float):
    """20 images of two bands with garbage in about a third of their area, in two classes."""
    rng = np.random.default_rng(0)
    for i in range(20):
        image = rng.random((40 + i, 44, 2)).astype(np.float32)
        image[: int(rng.integers(0, 30))] = garbage
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        tags = [(42113, "s", 0, repr(garbage), True)]
        options = {"photometric": "minisblack", "planarconfig": "contig"}
        tifffile.imwrite(folder / "ab"[i % 2] / f"{i:02d}.tif", image, extratags=tags, **options)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    return [write(root / name, garbage) for name, garbage in (("low", -9999.0), ("high", 7e30), ("nan", float("nan")))]


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory):
    """A run with all measures."""
    out = tmp_path_factory.mktemp("runs") / "low"
    dmjd.pretrain(measured(folders[0], out))
    return out


def measured(folder, out, **changes):
    """The configuration of a run with online kNN and measures without labels."""
    given = {"labels": "folder", "test_data": str(folder), "eval_every": 3}
    return recipes.folder(str(folder), str(out), **FIELDS | given | changes)


def lines(run):
    """metrics.jsonl without what depends on the clock and the machine."""
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "images_per_s", "data_wait", "memory_gb")}
        for line in metrics(run)
    ]


def assert_same_encoder(first, second):
    assert (first / "encoder.safetensors").read_bytes() == (second / "encoder.safetensors").read_bytes()


@pytest.mark.parametrize("which", [1, 2])
def test_encoder_losses_and_measures_do_not_depend_on_the_garbage(folders, run, tmp_path, which):
    out = tmp_path / "run"
    dmjd.pretrain(measured(folders[which], out, num_workers=which - 1))
    assert_same_encoder(run, out)
    assert lines(run) == lines(out)
    assert {"held_out_loss", "effective_rank", "knn_top1"} <= {name for line in lines(run) for name in line}
    assert all(0.3 < line["valid_tokens"] < 1 for line in lines(run) if "valid_tokens" in line)


def test_a_run_resumes_with_the_same_bits(folders, run, tmp_path):
    out = tmp_path / "run"
    dmjd.pretrain(measured(folders[0], out), hooks=[_stop_at(2)])
    assert metrics(out)[-1]["step"] < 6
    dmjd.pretrain(measured(folders[0], out))
    assert_same_encoder(run, out)
    losses = [[line["loss"] for line in lines(one) if "loss" in line] for one in (run, out)]
    assert losses[0] == losses[1]


def _stop_at(step):
    def hook(report):
        if report.state.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return hook


def test_micro_batches_are_the_same_step(folders, tmp_path):
    ends = []
    for accumulate in (1, 4):
        out = tmp_path / str(accumulate)
        dmjd.pretrain(recipes.folder(str(folders[0]), str(out), **FIELDS | {"accumulate": accumulate, "steps": 3}))
        ends.append(lines(out)[0])
    for name in ("loss", "mim", "vis", "valid_tokens", "grad_norm"):
        assert ends[0][name] == pytest.approx(ends[1][name], rel=1e-5)


PROGRAM = """
import sys
import torch
import dmjd
from dmjd.config.pretrain import PretrainConfig
from dmjd.model import MaskedImageModel

def tell(module, _, out):
    if isinstance(module, MaskedImageModel):
        print("told", *(float(out[name]) for name in ("loss", "mim", "vis", "valid_tokens")), file=sys.stderr)

torch.nn.modules.module.register_module_forward_hook(tell)
dmjd.pretrain(PretrainConfig.from_json(sys.argv[1]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no forks")
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_are_the_same_step(folders, straight, strategy, tmp_path):
    """Although one of them has fewer valid tokens than the other."""
    config = divided(folders[0], tmp_path / "two", strategy=strategy)
    codes, said = forked.run_two(forked.execute, PROGRAM, config.to_json(), logs=tmp_path, seconds=240)
    assert codes == [0, 0], said
    first, second = (
        np.array(
            [line.split()[1:] for line in (tmp_path / f"log{rank}").read_text().splitlines() if "told" in line], float
        )
        for rank in range(2)
    )
    assert np.abs(first[:, 3] - second[:, 3]).max() > 0.05
    expected = [[line[name] for name in ("loss", "mim", "vis", "valid_tokens")] for line in lines(straight)]
    np.testing.assert_allclose((first + second) / 2, expected, rtol=1e-4)
    norms = [[line["grad_norm"] for line in lines(one)] for one in (straight, tmp_path / "two")]
    np.testing.assert_allclose(*norms, rtol=1e-4)
    ends = [load_file(path / "checkpoints" / "final.safetensors") for path in (straight, tmp_path / "two")]
    assert ends[0].keys() == ends[1].keys()
    for key in ends[0]:
        expected, found = (without_key_bias(key, end[key]) for end in ends)
        torch.testing.assert_close(found, expected, **TOLERANCE, msg=key)


@pytest.fixture(scope="module")
def straight(folders, tmp_path_factory):
    """The same run in one process."""
    out = tmp_path_factory.mktemp("one") / "run"
    dmjd.pretrain(divided(folders[0], out))
    return out


def divided(folder, out, **changes):
    """The configuration of a run for one or two processes. Muon would amplify the last bits of a sum."""
    given = {"optimizer": "adamw", "blr": 0.01, "log_every": 1, "held_out": 0, "steps": 4, "num_workers": 0}
    return recipes.folder(str(folder), str(out), **FIELDS | given | changes)


def test_the_loss_by_hand():
    """Each valid token counts as in a batch where all are valid; the others add nothing."""
    model = tiny_model(target="pixel", mim={"loss": "l2"})
    model.encoder.preprocess = Preprocess((32, 32), 3, (0.5,) * 3, (0.25,) * 3, nodata="auto")
    _, raw = smooth_images()
    raw[:, :, :12, :16] = torch.nan  # tokens 0 and 1, and half of tokens 4 and 5
    normalized = model.encoder.preprocess.normalize(raw)
    masks = model.draw_masks(KEYS)
    out = model(normalized, raw, masks=masks)
    valid = torch.ones(3, 16, dtype=torch.bool)
    valid[:, :2] = False
    assert out["valid_tokens"] == pytest.approx(14 / 16)
    with torch.no_grad():
        predictions, targets = model.predict(normalized, masks), model.targets(normalized, raw)
    total, count = 0.0, 0
    for view, ids in enumerate(masks.masked):
        for image in range(3):
            for place, token in enumerate(ids[image].tolist()):
                count += 1
                if valid[image, token]:
                    row = predictions["mim"][view * 3 + image, place]
                    total += float((row - targets["mim"][image, token]).square().mean())
    assert out["mim"].item() == pytest.approx(total / count, rel=1e-5)
    raw[:] = torch.nan
    nothing = model(model.encoder.preprocess.normalize(raw), raw, masks=masks)
    assert nothing["loss"].item() == 0
    nothing["loss"].backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("target", ["hog", "pixel", "ema"])
def test_where_all_is_valid_bits_are_those_without_the_setting(target):
    bits = []
    for nodata in (None, "auto"):
        model = tiny_model(target=target)
        model.encoder.preprocess = Preprocess((32, 32), 3, (0.5,) * 3, (0.25,) * 3, nodata=nodata)
        _, raw = smooth_images()
        out = model(model.encoder.preprocess.normalize(raw), raw, keys=KEYS)
        out["loss"].backward()
        bits.append([out["loss"], *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*bits, strict=True))


def test_evaluation_and_features_need_no_flags(folders, run, tmp_path):
    encoder = dmjd.load_encoder(run)
    assert encoder.preprocess.nodata == "auto"
    assert json.loads((run / "config.json").read_text())["nodata"] == "auto"
    features = [extract(encoder, open_source(folder, in_chans=2, nodata="auto"), num_workers=0).x for folder in folders]
    assert torch.equal(features[0], features[1])
    assert torch.equal(features[0], features[2])
    for folder, name in zip(folders[:2], ("low", "high"), strict=True):
        out = tmp_path / f"{name}.npy"
        assert main(["embed", str(run), "--data", str(folder), "--out", str(out), "--num-workers", "0"]) == 0
    low, high = (np.load(tmp_path / f"{name}.npy") for name in ("low", "high"))
    np.testing.assert_array_equal(low, high)
    np.testing.assert_allclose(low, features[0], atol=1e-6)
    probe = dmjd.evaluate("knn", run, data=str(folders[2]), test_data=str(folders[2]), labels="folder", num_workers=0)
    assert 0 <= probe["result"]["top1"] <= 1


def test_statistics_leave_invalid_pixels_out(tmp_path):
    image = np.full((64, 64, 1), 0.25, np.float32)
    image[:32] = -9999
    image[40:] = 0.75
    for i in range(2):
        np.save(tmp_path / f"{i}.npy", image)
    stats = measure_stats(open_source(tmp_path, in_chans=1, nodata=-9999))
    assert stats.mean == (pytest.approx((8 * 0.25 + 24 * 0.75) / 32),)
    assert stats.std == (pytest.approx(np.sqrt(3) / 16 * 4 * 0.5, abs=1e-4),)


def test_inspect_and_figures(folders, run, tmp_path, capsys):
    file = tmp_path / "inspected.json"
    command = ["inspect", str(folders[0]), "--in-chans", "2", "--img-size", "32", "--num-workers", "0"]
    assert main([*command, "--nodata", "auto", "--json", str(file), "--out", str(tmp_path / "a.png")]) == 0
    found = json.loads(file.read_text())["invalid"]
    assert found["images"] >= 18
    assert 0.2 < found["share"] < 0.5
    assert "of the values" in capsys.readouterr().out
    for kind in ("masks", "reconstructions", "targets", "neighbors"):
        assert main(["show", kind, str(run), "--out", str(tmp_path / f"{kind}.png")]) == 0


def test_mistakes(folders, tmp_path, capsys):
    command = ["pretrain", "folder", "--data", folders[2], "--out", tmp_path / "run", *TINY]
    assert "nodata must be auto or the value" in mistake(capsys, *command, "--nodata", "abc")
    assert "alpha must be one of white, invalid" in mistake(capsys, *command, "--alpha", "black")
    assert "--nodata auto takes them as invalid" in mistake(capsys, *command, "--in-chans", "2")
