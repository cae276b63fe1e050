"""The settings of invalid pixels."""

import numpy as np
import pytest

from dmjd.cli.main import main
from dmjd.config.inspection import InspectConfig
from dmjd.config.invalid import nodata_text, nodata_value
from dmjd.config.plan import PlanConfig
from dmjd.config.pretrain import PretrainConfig
from dmjd.config.resuming import resume_differences


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        (None, None),
        ("auto", "auto"),
        (-9999, "-9999"),
        ("-9999.0", "-9999"),
        (np.float32(0.5), "0.5"),
        (-3.4028234663852886e38, "-3.4028234663852886e+38"),
        ("nan", "nan"),
    ],
)
def test_nodata_is_stored_as_text(given, stored):
    assert nodata_text(given) == stored
    for cls in (PretrainConfig, InspectConfig, PlanConfig):
        assert cls(nodata=given).nodata == stored


def test_the_number():
    assert nodata_value(None) is nodata_value("auto") is None
    assert nodata_value("-9999") == -9999


@pytest.mark.parametrize("wrong", ["abc", "", True, [1, 2], "1 2"])
def test_what_is_no_number(wrong):
    with pytest.raises(ValueError, match="nodata must be auto or the value of invalid pixels"):
        nodata_text(wrong)


def test_a_resumed_run_keeps_them():
    old, new = PretrainConfig(), PretrainConfig(nodata="auto", alpha="invalid")
    assert resume_differences(old, new) == ["nodata: None -> auto", "alpha: white -> invalid"]


def test_a_negative_number_with_an_exponent_is_no_flag(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "none"), "--nodata", "-3.4e38"]) == 2
    assert "there is no" in capsys.readouterr().err
