"""Temporary modes."""

import contextlib

import numpy as np
import pytest
import torch
from support import TINY_FIELDS, assert_same_bits
from tiny_models import SIZES, tiny_model
from torch import nn

from dmjd import (
    MaskedImageModel,
    create_encoder,
    disjoint_masks,
    embed,
    evaluate,
    export,
    hog,
    load_classifier,
    load_encoder,
    pretrain,
    recipes,
    show,
)
from dmjd.images.preprocess import Preprocess
from dmjd.nn.modes import evaluating
from dmjd.runs.build import load_model


def test_modes_are_restored_one_by_one():
    module = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3)).train()
    module[1].eval()  # a frozen part

    def failing() -> None:
        with evaluating(module):
            assert not any(part.training for part in module.modules())
            assert torch.is_inference_mode_enabled()
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert [part.training for part in module.modules()] == [True, True, False]
    assert not torch.is_inference_mode_enabled()


TASKS = {"knn": {}, "linear": {"steps": 2}, "finetune": {"steps": 1, "batch_size": 8}}

DTYPES = [torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _defaults():
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def computed(dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Results of public functions if the caller has set another default type or device."""
    raw = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    keys = torch.tensor([1, 2])
    torch.set_default_dtype(dtype)
    encoders, models = {}, {}
    for name, sizes in SIZES.items():
        torch.manual_seed(0)
        encoders[name] = create_encoder(name, 32, **sizes)
        models[name] = tiny_model(name, target="ema")
    if device != "cpu":  # from here on; those who make a module choose its device
        torch.set_default_device(device)
    preprocess = Preprocess((24, 40))
    masks = disjoint_masks(2, (4, 4), keys=keys)
    found = {"mask": masks.mask, "visible": masks.visible, "masked": masks.subset_masked(0.5).masked}
    found |= {"hog": hog(raw, 4), "hog of floats": hog(raw.float(), 8, 40), "hog of nothing": hog(raw[:0], 4)}
    found |= {"normalized": preprocess.normalize(raw), "denormalized": preprocess.denormalize(raw)}
    found["preprocessed"] = preprocess(raw[0].permute(1, 2, 0).numpy())
    for name, encoder in encoders.items():
        tokens = encoder(preprocess.normalize(raw))
        found |= {f"{name} {key}": value for key, value in encoder.state_dict().items()}
        found |= {f"{name} tokens": tokens, f"{name} pooled": encoder.pool(tokens)}
        found[f"{name} positions"] = encoder.positions((3, 5))
        model = models[name]
        losses = model(preprocess.normalize(raw), raw, keys=keys)
        losses["loss"].backward()
        found |= {f"{name} {key}": value for key, value in losses.items()}
        found |= {f"{name} gradient {key}": p.grad for key, p in model.named_parameters() if p.grad is not None}
    return found


@pytest.fixture(scope="module")
def expected():
    return computed()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_do_not_depend_on_the_default_type(dtype, expected):
    actual = computed(dtype)
    assert torch.get_default_dtype() == dtype
    assert {k: v.dtype for k, v in actual.items()} == {k: v.dtype for k, v in expected.items()}
    assert [key for key in expected if not torch.equal(actual[key], expected[key])] == []


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_results_do_not_depend_on_the_default_device(device, expected):
    """Which need not even exist."""
    actual = computed(device=device)
    assert {value.device.type for value in actual.values()} == {"cpu"}
    assert [key for key in expected if not torch.equal(actual[key], expected[key])] == []


@pytest.mark.parametrize("context", [torch.device, torch.set_default_device])
def test_public_functions_do_not_depend_on_the_default_device(tmp_path, image_folder, context):
    """A whole run, and what reads it."""
    fields = TINY_FIELDS | {"data": image_folder, "labels": "folder", "steps": 2, "batch_size": 8, "num_workers": 0}
    own = {"data": image_folder, "labels": "folder", "test_data": image_folder, "num_workers": 0}
    default = context("meta") or contextlib.nullcontext()
    with default:
        run = pretrain(recipes.digits(out=tmp_path / "run", **fields)).path
        assert evaluate("knn", run, **own)["result"]["top1"] > 0
        assert evaluate("finetune", run, steps=1, batch_size=8, **own)["result"]
        assert embed(run, out=tmp_path / "features.npy", num_workers=0).exists()
        assert show("masks", run, out=tmp_path / "masks.png").exists()
        assert export(run, out=tmp_path / "vit.safetensors", format="safetensors")
        loaded = [load_encoder(run), load_classifier(run), load_model(run)[0], load_encoder("vit_tiny_patch16")]
        model = MaskedImageModel(load_encoder(run)) if context is torch.device else None
    assert {p.device.type for module in loaded for p in module.state_dict().values()} == {"cpu"}
    if model is not None:  # who makes a module chooses its device
        assert {p.device.type for p in model.branches.parameters()} == {"meta"}


def test_runs_do_not_depend_on_the_default_type(tmp_path, image_folder):
    """Pre-training, evaluation and features."""
    data = {"data": image_folder, "labels": "folder"}
    fields = TINY_FIELDS | data | {"steps": 2, "batch_size": 8, "drop_path": 0.1, "num_workers": 0}
    scores, features = [], []
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(dtype)
        run = pretrain(recipes.digits(out=tmp_path / str(dtype), **fields)).path
        own = data | {"test_data": image_folder, "num_workers": 0}
        scores.append([evaluate(task, run, **own, **more)["result"] for task, more in TASKS.items()])
        features.append(np.load(embed(run, out=run / "features.npy", num_workers=0)))
    assert_same_bits(*(tmp_path / str(dtype) for dtype in (torch.float32, torch.bfloat16)))
    assert scores[0] == scores[1]
    np.testing.assert_array_equal(*features)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_run_trains_where_the_caller_switched_gradients_off(tmp_path, mode):
    fields = TINY_FIELDS | {"steps": 2, "batch_size": 8}
    with mode():
        result = pretrain(recipes.digits(out=str(tmp_path / "run"), **fields))
    assert result.finished
