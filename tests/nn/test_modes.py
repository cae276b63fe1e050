"""Temporary evaluation mode."""

import pytest
import torch
from torch import nn

from dmjd.nn.modes import evaluating


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
