"""Which names of timm are encoders, and what is said about the others."""

import inspect

import pytest
import timm

from dmjd.encoders.registry import create_encoder, encoder_family, is_encoder_name
from dmjd.encoders.timm_names import CLASSES, class_of, timm_names
from dmjd.encoders.timm_vit import TimmViT


def test_names_are_those_of_the_two_classes():
    names = timm_names()
    assert {class_of(name) for name in names} == set(CLASSES)
    assert {"vit_small_patch16_224", "vit_small_patch16_dinov3", "eva02_tiny_patch14_224"} <= {*names}
    assert not {"swin_tiny_patch4_window7_224", "beit_base_patch16_224", "deit_base_distilled_patch16_224"} & {*names}
    for name, argument in CLASSES.items():  # its parameters tell which norms a model has
        assert argument in inspect.signature(getattr(timm.models, name)).parameters


def test_a_tag_of_weights_is_part_of_the_name():
    assert encoder_family("timm/vit_tiny_patch16_224.augreg_in21k") is TimmViT
    encoder = create_encoder("timm/vit_tiny_patch16_224.augreg_in21k", 32, depth=1)
    assert encoder.name == "timm/vit_tiny_patch16_224.augreg_in21k"
    assert is_encoder_name("timm/vit_tny_patch16_224")
    assert not is_encoder_name("timm/")
    assert not is_encoder_name("timmy/vit_tiny_patch16_224")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/vit_smal_patch16_224", "no model 'vit_smal_patch16_224'; did you mean 'vit_small_patch16_224'"),
        ("timm/vit_tiny_patch16_224.augreg_in21", "no weights .*; did you mean 'vit_tiny_patch16_224.augreg_in21k'"),
        ("timm/x", "timm has no model 'x'"),
        (
            "timm/",
            r"unknown encoder 'timm/'.* vit_\{tiny,small,.*\}_patch\{2,.*,32\}, conv_vit_.*, timm/NAME",
        ),
        ("vit_small_patch16_224", "unknown encoder 'vit_small_patch16_224'; did you mean 'timm/vit_small_patch16_224'"),
        ("timm/swin_tiny_patch4_window7_224", r"\(SwinTransformer\) cannot leave masked tokens out: it is no plain"),
        ("timm/convnext_tiny", r"\(ConvNeXt\) cannot leave .* take a plain one, such as timm/vit_small_patch16_224"),
        ("timm/hiera_tiny_224", r"\(hiera\) cannot leave masked tokens out"),
        ("timm/beit_base_patch16_224", "table of relative positions that belongs to whole images; take a plain one"),
        ("timm/vit_relpos_small_patch16_224", "table of relative positions"),
        ("timm/deit_tiny_distilled_patch16_224", "a token and a head for distillation"),
        ("timm/vit_tiny_r_s16_p8_224", "convolutional stem, which mixes neighboring patches; take a plain one"),
    ],
)
def test_other_names_are_one_line_that_says_what_to_take(name, message):
    with pytest.raises(ValueError, match=message) as error:
        create_encoder(name, 32)
    assert "\n" not in str(error.value)
