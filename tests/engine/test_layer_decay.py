"""Parameter groups of pre-training: layer-wise decay, and an encoder that is frozen at first."""

import pytest
import torch
from support import TINY_FIELDS

import dmjd
from dmjd import MaskedImageModel, create_encoder
from dmjd.encoders.weights import load_encoder
from dmjd.engine.layer_decay import encoder_groups
from dmjd.engine.optim import group_factor


def tiny_model() -> MaskedImageModel:
    return MaskedImageModel(create_encoder("vit_tiny_patch8", img_size=32, embed_dim=32, depth=2, num_heads=2))


def test_branches_and_final_norm_learn_fastest_and_only_the_encoder_is_frozen():
    model = tiny_model()
    groups = encoder_groups(model, model.encoder, 0.05, 0.5, frozen_until=0.25)
    names = {id(p): name for name, p in model.named_parameters()}
    of = {names[id(p)]: group for group in groups for p in group["params"]}
    assert set(of) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert of["encoder.blocks.0.mlp.fc1.weight"]["lr_scale"] == 0.25
    assert of["encoder.blocks.1.mlp.fc1.weight"]["lr_scale"] == 0.5
    assert of["encoder.patch_embed.proj.weight"]["lr_scale"] == 0.125
    assert of["encoder.norm.weight"]["lr_scale"] == of["branches.mim.decoder.mask_token"]["lr_scale"] == 1.0
    assert of["encoder.blocks.0.norm1.bias"]["weight_decay"] == 0.0
    for name, group in of.items():
        assert group.get("frozen_until", 0.0) == (0.25 if name.startswith("encoder.") else 0.0), name


@pytest.mark.parametrize(
    ("progress", "factor"), [(0.0, 0.0), (0.25, 0.0), (0.3, 0.25), (0.35, 0.5), (0.5, 0.5), (1.0, 0.5)]
)
def test_the_rate_of_a_frozen_group_rises_after_its_freeze(progress, factor):
    group = {"frozen_until": 0.25, "lr_scale": 0.5}
    assert group_factor(group, progress, warmup=0.1) == pytest.approx(factor)


def test_without_freeze_and_warm_up_the_factor_is_the_scale():
    assert group_factor({}, 0.0, warmup=0.0) == 1.0
    assert group_factor({"lr_scale": 0.3}, 0.0, warmup=0.5) == 0.3


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_begins_with_its_branches_alone(tmp_path, image_folder, optimizer):
    config = dmjd.recipes.dmjd(
        str(image_folder), str(tmp_path / "run"), **TINY_FIELDS | {"steps": 4, "optimizer": optimizer}
    ).replace(init_freeze=0.6, warmup=0.0, layer_decay=0.75)
    model = dmjd.runs.build.build_model(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    changed: list[tuple[bool, bool]] = []

    def compare(report) -> None:
        differs = {k: not torch.equal(v, before[k]) for k, v in model.state_dict().items() if v.is_floating_point()}
        changed.append(
            (
                any(v for k, v in differs.items() if k.startswith("encoder.")),
                any(v for k, v in differs.items() if k.startswith("branches.")),
            )
        )

    dmjd.pretrain(config, model=model, hooks=[compare])
    assert changed == [(False, True)] * 3 + [(True, True)]
    assert torch.equal(load_encoder(tmp_path / "run").norm.weight, model.encoder.norm.weight)
