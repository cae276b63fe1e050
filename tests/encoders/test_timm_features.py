"""Non-public parts of timm, tested with the versions below. A failure means that timm has changed them."""

import inspect

import pytest
import timm
from support import small_encoder
from timm.models import _features

from dmjd.encoders.timm_features import FeatureGetterNet, feature_backbone, take_indices

TRIED_ON = ("1.0.26", "1.0.31")  # timm: the oldest version allowed, and the newest one tested


def test_timm_still_has_what_is_used():
    hint = f"timm {timm.__version__} differs from the versions this was written for ({', '.join(TRIED_ON)})"
    assert {"num_features", "indices"} <= set(inspect.signature(_features.feature_take_indices).parameters), hint
    assert {"model", "out_indices"} <= set(inspect.signature(_features.FeatureGetterNet).parameters), hint


@pytest.mark.parametrize(
    ("indices", "taken"),
    [(None, [0, 1, 2, 3]), (2, [2, 3]), ([0, -1], [0, 3]), ((1,), [1])],
)
def test_indices(indices, taken):
    found, last = take_indices(4, indices)
    assert (list(found), last) == (taken, max(taken))


def test_a_backbone_has_the_last_four_maps_by_default():
    backbone = feature_backbone(small_encoder("vit_tiny_patch8", img_size=16))
    assert isinstance(backbone, FeatureGetterNet)
    assert backbone.feature_info.channels() == [32] * 3
    assert feature_backbone(small_encoder("conv_vit_tiny_patch8", img_size=16), [0, 1]).feature_info.channels() == [
        8,
        12,
    ]
