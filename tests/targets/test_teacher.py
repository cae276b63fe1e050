"""The teacher target: whitened features of a frozen model, on the student's grid."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from support import TINY_FIELDS

from dmjd import ComplementaryMasks, Distillation, MaskedImageModel, Reconstruction, create_encoder, pretrain
from dmjd.config import recipes
from dmjd.encoders.base import Encoder
from dmjd.encoders.stored import encoder_bytes
from dmjd.encoders.weights import load_encoder
from dmjd.figures.show import show
from dmjd.images.preprocess import Preprocess
from dmjd.runs.build import load_model
from dmjd.targets.base import whiten, whitened_mean
from dmjd.targets.teacher import TeacherSettings, TeacherTarget, to_channels, to_grid
from dmjd.warning import DMJDWarning

TIMM_SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}

OWN = Preprocess((32, 32), 3, (0.3, 0.4, 0.5), (0.2, 0.2, 0.3))


def student(patch: int = 8, in_chans: int = 3, size: int = 32) -> Encoder:
    torch.manual_seed(1)
    return create_encoder(f"vit_tiny_patch{patch}", size, in_chans, embed_dim=32, depth=2, num_heads=2)


def own_teacher(name: str = "vit_tiny_patch8") -> Encoder:
    torch.manual_seed(2)
    sizes = (
        {"embed_dim": 48, "depth": 3} if name.startswith("vit") else {"embed_dims": (16, 32, 48), "depths": (1, 1, 3)}
    )
    teacher = create_encoder(name, 32, class_token=name.startswith("vit"), num_heads=3, **sizes)
    teacher.preprocess = OWN
    return teacher.eval()


def timm_vit(in_chans: int = 3) -> torch.nn.Module:
    torch.manual_seed(3)
    data = {"input_size": (in_chans, 32, 32), "mean": (0.4,) * in_chans, "std": (0.2,) * in_chans}
    return timm.create_model(
        "vit_tiny_patch16_224", pretrained_cfg_overlay=data, in_chans=in_chans, num_classes=0, **TIMM_SIZES
    )


def make_images(channels: int = 3, size: tuple[int, int] = (32, 32)) -> torch.Tensor:
    return torch.randint(0, 256, (4, channels, *size), generator=torch.Generator().manual_seed(0)).float()


NOISE = torch.full((4, 3, 32, 32), float("nan"))  # the student's own normalized images are not used


@pytest.mark.parametrize("name", ["vit_tiny_patch8", "conv_vit_tiny_patch8"])
def test_a_runs_encoder_gives_its_own_whitened_features_on_the_same_grid(tmp_path, name):
    teacher = own_teacher(name)
    (tmp_path / "encoder.safetensors").write_bytes(encoder_bytes(teacher))
    raw = make_images()
    for source in (teacher, str(tmp_path), tmp_path / "encoder.safetensors"):
        target = TeacherTarget(student(), TeacherSettings(source))
        actual = target(NOISE, raw)
        with torch.no_grad():
            expected = whiten(teacher(OWN.normalize(raw))[:, teacher.num_prefix_tokens :])
        assert target.dim == 48
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_timm_model_gives_its_normed_patch_tokens():
    teacher, raw = timm_vit(), make_images()
    teacher.norm.weight.data.uniform_(0.5, 2.0)
    actual = TeacherTarget(student(), TeacherSettings(teacher))(NOISE, raw)
    mean, std = (torch.tensor(teacher.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        tokens = teacher.forward_features((raw / 255 - mean) / std)
    assert tokens.shape[1] == 17  # a class token before the 16 of the grid
    torch.testing.assert_close(actual, whiten(tokens[:, 1:]), rtol=1e-4, atol=1e-5)


def test_several_layers_are_whitened_averaged_and_whitened():
    teacher, raw = own_teacher(), make_images()
    x, outputs = teacher.prepare(OWN.normalize(raw))[0], []
    with torch.no_grad():
        for block in teacher.blocks:
            x = block(x)
            outputs.append(x[:, 1:])
    expected = whiten((whiten(outputs[1]) + whiten(outputs[2])) / 2)
    actual = TeacherTarget(student(), TeacherSettings(teacher, layers=2))(NOISE, raw)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(actual, TeacherTarget(student(), TeacherSettings(teacher))(NOISE, raw), atol=0.01)
    convolutional = own_teacher("conv_vit_tiny_patch8")
    last = convolutional.block_outputs(OWN.normalize(raw), 2)
    assert len(last) == 2
    torch.testing.assert_close(last[-1], convolutional(OWN.normalize(raw)))


@pytest.mark.parametrize(("patch", "size"), [(4, (32, 32)), (16, (32, 32)), (8, (16, 48))])
def test_other_grids_and_sizes_are_resized(patch, size):
    """The teacher gets 32 x 32 pixels, and its 4 x 4 tokens are resized to the student's grid."""
    teacher = own_teacher()
    target = TeacherTarget(student(patch, size=size), TeacherSettings(teacher))
    raw = make_images(size=size)
    actual = target(raw, raw)
    resized = F.interpolate(raw, (32, 32), mode="bicubic", antialias=True).clamp(0, 255) if size != (32, 32) else raw
    with torch.no_grad():
        tokens = teacher(OWN.normalize(resized))[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    h, w = size[0] // patch, size[1] // patch
    if (h, w) == (2, 2):
        expected = F.avg_pool2d(tokens, 2)
    else:
        expected = F.interpolate(tokens, (h, w), mode="bilinear", align_corners=False)
    assert actual.shape == (4, h * w, 48)
    torch.testing.assert_close(actual, whiten(expected.flatten(2).transpose(1, 2)), rtol=1e-4, atol=1e-4)


def test_feature_maps_of_a_convolutional_network():
    network = timm.create_model("resnet10t", pretrained_cfg_overlay={"input_size": (3, 64, 64)})
    target = TeacherTarget(student(), TeacherSettings(network))
    assert target(make_images(), make_images()).shape == (4, 16, 512)
    with pytest.raises(ValueError, match="differ in width: use --teacher-layers 1"):
        TeacherTarget(student(), TeacherSettings(network, layers=2))


def test_a_network_gets_its_images_with_channels_last():
    """Convolutions are nearly twice as fast then, and the features are the same."""
    encoder = create_encoder("vit_tiny_patch8", 32, embed_dim=32, depth=1, num_heads=2)
    raw = torch.randint(0, 256, (2, 3, 32, 32)).float()
    model = timm.create_model("tf_efficientnet_lite0", pretrained_cfg_overlay={"input_size": (3, 64, 64)})
    seen: list[torch.Tensor] = []
    model.conv_stem.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    target = TeacherTarget(encoder, TeacherSettings(model))
    given = target(raw, raw)
    assert seen[-1].shape[1:] == (3, 64, 64)
    assert seen[-1].is_contiguous(memory_format=torch.channels_last)
    maps = target._maps(seen[-1].contiguous())
    plain = whitened_mean([to_grid(maps[0], encoder.grid).flatten(2).transpose(1, 2)])
    torch.testing.assert_close(given, plain)


def test_to_grid_pools_and_interpolates():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.equal(to_grid(x, (4, 4)), x)
    assert to_grid(x, (2, 2)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert to_grid(x, (8, 2)).shape == (1, 1, 8, 2)


def test_channels_become_the_teachers():
    gray, color = make_images(1), make_images(3)
    assert torch.equal(to_channels(gray, 3), gray.expand(-1, 3, -1, -1))
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    torch.testing.assert_close(to_channels(color, 1), (color * weights).sum(1, keepdim=True))
    clear = torch.cat([color, torch.zeros(4, 1, 32, 32)], dim=1)
    assert torch.equal(to_channels(clear, 3), torch.full_like(color, 255))
    assert to_channels(clear, 1).shape == gray.shape
    target = TeacherTarget(student(in_chans=1), TeacherSettings(own_teacher()))
    assert target(gray, gray).shape == (4, 16, 48)


def test_the_teacher_is_frozen_and_outside_the_model():
    teacher = own_teacher()
    target = TeacherTarget(student(), TeacherSettings(teacher))
    model = MaskedImageModel(
        student(), ComplementaryMasks(4), Reconstruction(target=target), Distillation(target=target)
    )
    passes = []
    teacher.register_forward_hook(lambda *_: passes.append(1))
    teacher.blocks[-1].register_forward_hook(lambda *_: passes.append(1))
    model.train()
    raw = make_images()
    out = model(OWN.normalize(raw), raw, keys=torch.arange(4))
    out["loss"].backward()
    assert set(out) == {"loss", "mim", "vis"}
    assert len(passes) == 1  # one pass for four views and both branches
    assert not any(part.training for part in teacher.modules())
    assert all(p.grad is None for p in teacher.parameters())
    names = {id(p) for p in model.parameters()}
    assert not any(id(p) in names for p in teacher.parameters())
    assert [key for key in model.state_dict() if key.startswith("branch_targets")] == [
        "branch_targets.mim._extra_state"
    ]
    model.to(torch.float64)
    assert next(teacher.parameters()).dtype == torch.float64  # it is cast with the model


def test_branches_may_differ():
    encoder = student()
    model = MaskedImageModel(encoder, vis=Distillation(target=TeacherSettings(own_teacher(), layers=2)))
    assert (model.target("mim").name, model.target("vis").name) == ("hog", "teacher")
    assert model.branches["vis"].head.predictor.out_features == 48
    assert model.target("vis").layers == 2


def test_another_teacher_is_refused():
    teacher = own_teacher()
    state = TeacherTarget(student(), TeacherSettings(teacher)).state_dict()
    TeacherTarget(student(), TeacherSettings(teacher)).load_state_dict(state)
    teacher.blocks[0].mlp.fc1.bias.data[0] += 1e-3
    with pytest.raises(ValueError, match="is not the teacher this run began with"):
        TeacherTarget(student(), TeacherSettings(teacher)).load_state_dict(state)


def test_timm_weights_from_a_folder(tmp_path):
    """Weights without a network; the random state is left unchanged."""
    teacher = timm_vit()
    save_file(teacher.state_dict(), tmp_path / "model.safetensors")
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 0,
        "model_args": TIMM_SIZES,
        "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.25] * 3, "num_classes": 0},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    target = TeacherTarget(student(), TeacherSettings(f"local-dir:{tmp_path}"))
    state = torch.get_rng_state()
    torch.manual_seed(0)
    student()
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        expected = whiten(teacher.eval().forward_features((make_images() / 255 - 0.5) / 0.25)[:, 1:])
    torch.testing.assert_close(target(NOISE, make_images()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("teacher", "options", "message"),
    [
        (None, {}, "target 'teacher' needs a teacher: --teacher"),
        ("runs/nowhere", {}, "is not a run folder, an encoder file or a timm model"),
        ("vit_tiny_patch16_225", {}, "did you mean 'vit_tiny_patch16_224'"),
        ("timm/resnet1", {}, "teacher timm/resnet1 is not .*; did you mean 'timm/resnet18'"),
        ("timm/", {}, "teacher timm/ is not a run folder, an encoder file or a timm model"),
        ("timm/resnet18.nonsense", {}, "the weights of teacher timm/resnet18.nonsense are not available"),
        ("resnet18.nonsense", {}, "the weights of teacher resnet18.nonsense are not available"),
        (torch.nn.Linear(1, 1), {}, "gives no token grid or feature map"),
        (create_encoder("vit_tiny_patch8", 32), {}, "does not know its preprocessing"),
        (own_teacher(), {"layers": 4}, "the teacher has only 3 blocks"),
        (timm_vit(), {"layers": 4}, "has fewer layers"),
        (timm_vit(in_chans=5), {}, "takes 5 channels, the run has 3"),
    ],
)
def test_unusable_teachers(teacher, options, message):
    with pytest.raises(ValueError, match=message):
        TeacherTarget(student(), TeacherSettings(teacher, **options))


def test_a_run_teaches_the_next_one(tmp_path, image_folder):
    """Two stages: resume with a moved teacher, show, load; another or a missing teacher is refused."""
    fields = TINY_FIELDS | {"data": str(image_folder), "batch_size": 8}
    first, second = tmp_path / "first", tmp_path / "second"
    pretrain(recipes.folder(out=str(first), steps=3, **fields))
    taught = recipes.folder(out=str(second), steps=2, target="teacher", teacher=str(first), **fields)
    pretrain(taught)
    weights = load_file(second / "checkpoints" / "final.safetensors")
    assert sum("branch_targets" in key for key in weights) == 1  # the hash alone
    first.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="not a run folder"):
        pretrain(taught.replace(steps=4))
    with pytest.raises(ValueError, match="is not the teacher this run began with"):
        pretrain(taught.replace(steps=4, teacher=str(second)))
    result = pretrain(taught.replace(steps=4, teacher=str(tmp_path / "moved")))
    assert result.step == 4
    assert "target_std" not in result.metrics
    model, config = load_model(second)
    assert config.teacher == str(tmp_path / "moved")
    assert model.target("mim") is model.target("vis")
    for kind in ("targets", "reconstructions"):
        assert show(kind, second, out=tmp_path / f"{kind}.png").stat().st_size > 1000
    assert load_encoder(second / "checkpoints" / "final.safetensors").embed_dim == 32
    with pytest.raises(ValueError, match="not a run folder"):
        pretrain(taught.replace(out=str(tmp_path / "third"), teacher=str(first)))
    assert not (tmp_path / "third").exists()


def test_layers_can_be_skipped_and_the_teacher_can_see_smaller_images():
    model = timm.create_model("efficientnet_lite0", num_classes=0).eval()
    encoder = create_encoder("vit_tiny_patch16", img_size=64, depth=1)
    raw = torch.rand(2, 3, 64, 64) * 255
    target = TeacherTarget(encoder, TeacherSettings(model, skip=1, size=(64,)))
    whole = model.forward_features(target.preprocess.normalize(raw))
    assert whole.shape[2:] == (2, 2)  # stride 32
    maps = model.forward_intermediates(target.preprocess.normalize(raw), intermediates_only=True)
    torch.testing.assert_close(target(raw, raw), whitened_mean([maps[-2].flatten(2).transpose(1, 2)]))
    assert maps[-2].shape == (2, target.dim, 4, 4)


def test_a_convolutional_teacher_from_a_folder(tmp_path):
    """Its batch norms hold counters, which are no random weights."""
    model = timm.create_model("efficientnet_lite0", num_classes=0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    encoder, raw = create_encoder("vit_tiny_patch16", img_size=64, depth=1), torch.rand(2, 3, 64, 64) * 255
    settings = {"skip": 1, "size": (64,)}
    loaded = TeacherTarget(encoder, TeacherSettings(f"local-dir:{tmp_path}", **settings))
    torch.testing.assert_close(loaded(raw, raw), TeacherTarget(encoder, TeacherSettings(model, **settings))(raw, raw))


def test_skipped_blocks_of_an_encoder_are_the_last_ones():
    teacher = create_encoder("vit_tiny_patch16", img_size=32, depth=3)
    teacher.preprocess = Preprocess((32, 32))
    raw = torch.rand(1, 3, 32, 32) * 255
    target = TeacherTarget(create_encoder("vit_tiny_patch16", img_size=32, depth=1), TeacherSettings(teacher, skip=2))
    first = teacher.block_outputs(teacher.preprocess.normalize(raw), 3)[0]
    torch.testing.assert_close(target(raw, raw), whitened_mean([first]))


def test_a_vit_teacher_takes_other_sizes(tmp_path):
    model = timm_vit()
    timm.models.save_for_hf(model, tmp_path, model_args=TIMM_SIZES, safe_serialization=True)
    encoder = create_encoder("vit_tiny_patch16", img_size=64, depth=1)
    target = TeacherTarget(encoder, TeacherSettings(f"local-dir:{tmp_path}", size=(64,)))
    assert target(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64)).shape == (1, 16, 32)
    with pytest.raises(ValueError, match="--teacher-size"):  # a model that is given is left as it is
        TeacherTarget(encoder, TeacherSettings(model, size=(64,)))


@pytest.mark.parametrize(
    ("patch", "size", "expected"),
    [
        (16, (128, 128), (128, 128)),
        (16, (96, 160), (96, 160)),
        (4, (32, 32), (128, 128)),  # half of 8 x 8 tokens
        (4, (64, 32), (224, 128)),  # at most its own size
        (16, (256, 256), (256, 256)),
    ],
)
def test_images_of_a_cnn_are_the_students_size_or_give_half_of_its_tokens(patch, size, expected):
    model = timm.create_model("efficientnet_lite0", num_classes=0).eval()  # 32 pixels a cell, its own size 224
    target = TeacherTarget(create_encoder(f"vit_tiny_patch{patch}", size, depth=1), TeacherSettings(model, size=(0,)))
    assert target.preprocess.img_size == expected


@pytest.mark.parametrize(("size", "expected"), [(32, 56), (128, 126), (96, 98)])
def test_images_of_a_vit_are_the_nearest_whole_patches(size, expected):
    teacher = create_encoder("vit_tiny_patch14", img_size=224, depth=1)
    teacher.preprocess = Preprocess((224, 224))
    encoder = create_encoder("vit_tiny_patch4" if size == 32 else "vit_tiny_patch16", size, depth=1)
    target = TeacherTarget(encoder, TeacherSettings(teacher, size=(0,)))
    assert target.preprocess.img_size == (expected, expected)
    raw = torch.rand(1, 3, size, size) * 255
    assert target(raw, raw).shape == (1, encoder.num_patches, teacher.embed_dim)


def test_a_teacher_with_one_feature_for_an_image_is_warned_of():
    model, encoder = timm.create_model("efficientnet_lite0", num_classes=0).eval(), student()
    with pytest.warns(DMJDWarning, match=r"32 x 32 pixels.*--teacher-size"):
        TeacherTarget(encoder, TeacherSettings(model, size=(32,)))
    with pytest.raises(ValueError, match="0 stands for height and width"):
        TeacherSettings(model, size=(0, 64))


def test_a_vit_teacher_gets_whole_patches(tmp_path):
    """timm leaves out the pixels beyond the last whole patch, which would shift the map against the student's grid."""
    model = timm_vit()
    timm.models.save_for_hf(model, tmp_path, model_args=TIMM_SIZES, safe_serialization=True)
    encoder = create_encoder("vit_tiny_patch16", img_size=64, depth=1)
    ours = create_encoder("vit_tiny_patch16", img_size=32, depth=1)
    ours.preprocess = Preprocess((32, 32))
    for teacher in (f"local-dir:{tmp_path}", ours):
        with pytest.raises(ValueError, match=r"--teacher-size 60 x 64 .* the teacher's \d+-pixel patch.*: 64 x 64"):
            TeacherTarget(encoder, TeacherSettings(teacher, size=(60, 64)))
