"""Checks of single values: types, bounds, empty texts; NumPy's numbers count as Python's."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dmjd.config import FinetuneConfig, KnnConfig, LinearConfig, PretrainConfig, SegmentationConfig, recipes
from dmjd.config.checks import (
    Bounds,
    check_bool,
    check_float,
    check_int,
    check_out,
    check_path,
    check_seed,
    check_text,
    shown,
)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        *((LinearConfig, {"blr": value}, "blr must be") for value in (np.nan, np.inf, 1e300, 10**400, "x", True)),
        *((PretrainConfig, {"seed": value}, "seed must") for value in (2**63, -(2**63), 10**5000, 0.5, "0", np.nan)),
        *((KnnConfig, {name: ""}, f"{name} must not be empty") for name in ("data", "test_data", "out", "labels")),
        *(
            (SegmentationConfig, {"decoder_dim": value}, f"multiple of 16, got {value}: the nearest is {nearest}$")
            for value, nearest in ((17, 16), (20, 16), (36, 32), (50, 48), (100, 96), (16_383, 16_384))
        ),
        (PretrainConfig, {"out": ""}, "out must not be empty"),
        (PretrainConfig, {"out": "  "}, "out must not be empty"),
        (PretrainConfig, {"out": "a\0b"}, "out must not hold a null character, got 'a.x00b'"),
        (PretrainConfig, {"out": 3}, "out must be str, got 3"),
        (PretrainConfig, {"out": b"runs"}, "out must be str"),
        (PretrainConfig, {"teacher": "", "target": "teacher"}, "teacher must not be empty"),
        (PretrainConfig, {"flip": 1}, "flip must be bool, got 1"),
        (PretrainConfig, {"flip": "yes"}, "flip must be bool, got 'yes'"),
        (PretrainConfig, {"img_size": [224, True]}, "img_size must be int, got True"),
        (PretrainConfig, {"img_size": []}, "img_size takes 1 or 2 numbers, got 0"),
        (PretrainConfig, {"embed_dim": []}, "embed_dim must be one or more of type int"),
        (PretrainConfig, {"mean": (0.1, np.nan, 0.2), "std": (1, 1, 1)}, "mean must be"),
        (PretrainConfig, {"std": (0.1, 0.0, 0.2), "mean": (1, 1, 1)}, "std must be at least"),
        (PretrainConfig, {"img_size": 10**6}, "img_size must be at most 16384, got 1000000"),
        (PretrainConfig, {"embed_dim": 10**9}, "embed_dim must be at most 16384"),
        (PretrainConfig, {"depth": 100_000}, "depth must be at most 1000"),
        (PretrainConfig, {"num_views": 1000}, "num_views must be at most 64, got 1000"),
        (PretrainConfig, {"num_workers": 100_000}, "num_workers must be at most 512"),
        (PretrainConfig, {"batch_size": 10**12}, "batch_size must be at most 1000000,"),
        (PretrainConfig, {"epochs": 1e308}, "epochs must be at most 1000000,"),
        (PretrainConfig, {"epochs": None, "steps": 10**30}, "steps must be at most 1000000000,"),
        (KnnConfig, {"seeds": 10**9}, "seeds must be at most 1000"),
        (KnnConfig, {"k": 10**9}, "k must be at most 100000"),
        (FinetuneConfig, {"mixup": np.inf}, "mixup must be at least 0, got inf"),
        (SegmentationConfig, {"ignore_index": [255, np.nan]}, "ignore_index must be int, got nan"),
    ],
)
def test_values_that_are_refused(config, changes, message):
    with pytest.raises(ValueError, match=message) as refused:
        config(**changes)
    assert len(str(refused.value)) < 300


def test_numbers_of_numpy_and_paths_are_stored_as_json():
    config = recipes.digits(
        data=Path("digits"),
        batch_size=np.int64(32),
        mask_ratio=np.float32(0.5),
        theta=np.array(2.0),
        img_size=np.array([32, 32]),
        flip=np.True_,
        seed=np.uint64(3),
        crop_scale=torch.tensor([0.5, 1.0]),
        depth=[np.int32(3)],
    )
    plain = recipes.digits(
        data="digits", batch_size=32, mask_ratio=0.5, theta=2.0, img_size=(32, 32), seed=3, crop_scale=(0.5, 1), depth=3
    ).replace(flip=True)
    assert config == plain
    assert PretrainConfig.from_json(config.to_json()) == plain
    assert [type(config.batch_size), type(config.mask_ratio), type(config.flip)] == [int, float, bool]


def test_single_values():
    assert check_int("n", np.int8(3), Bounds(ge=1)) == 3
    assert check_float("x", 3) == 3.0
    assert check_bool("b", np.False_) is False
    assert check_seed(np.int64(-5)) == -5
    assert check_text("t", Path("a")) == "a"
    assert check_path("p", "~") == Path.home()
    for check, value in ((check_int, 3.0), (check_int, None), (check_float, "1"), (check_float, 1j), (check_bool, 0)):
        with pytest.raises(ValueError, match=r"^it must be"):
            check("it", value)
    with pytest.raises(ValueError, match="no such home folder"):
        check_path("out", "~no-such-user/runs")
    with pytest.raises(ValueError, match="out must not be empty"):
        check_path("out", "")
    assert check_path("run", "caf\udce9") == Path("caf\udce9")
    with pytest.raises(ValueError, match=r"out 'caf\\udce9' is not UTF-8 text"):
        check_out("out", "caf\udce9")


def test_refused_values_are_shown_on_one_short_line():
    assert shown("a\nb\x1b[31m") == "'a\\nb\\x1b[31m'"
    assert len(shown("x" * 10_000)) < 200
    assert shown(10**5000) == "a number of thousands of digits"


def test_a_configuration_file_with_wrong_values_is_named():
    text = recipes.digits(data="digits", out="runs/a").to_json()
    for field, value in (("depth", [10**9]), ("embed_dim", [True]), ("img_size", [10**9]), ("num_heads", "3")):
        changed = json.dumps(json.loads(text) | {field: value})
        with pytest.raises(ValueError, match=f"^runs/a/config.json: {field} must be"):
            PretrainConfig.from_json(changed, "runs/a/config.json")
    for broken in ("[1]", "{", "[" * 10_000):
        with pytest.raises(ValueError, match=r"^runs/a/config.json: "):
            PretrainConfig.from_json(broken, "runs/a/config.json")
