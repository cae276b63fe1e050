"""Encoder files: round trips, use by other libraries, errors."""

import json
import re
import shutil
import time
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support import GOLDEN, small_encoder
from torch import nn

from dmjd.encoders.registry import create_encoder
from dmjd.encoders.stored import encoder_bytes, encoder_metadata, weights_hash
from dmjd.encoders.weights import load_encoder
from dmjd.files import digest_of, write_safetensors
from dmjd.images.preprocess import Preprocess
from dmjd.runs.checkpoint import named_tensors, save_checkpoint


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch8", {"class_token": True, "in_chans": 5, "mlp_ratio": 2.0}),
        ("conv_vit_tiny_patch4", {"in_chans": 1, "mlp_ratios": (4.0, 4.0, 2.0)}),
    ],
)
def test_encoder_file_round_trip(name, options, tmp_path):
    encoder = small_encoder(name, img_size=(16, 24), drop_path=0.1, **options)
    encoder.preprocess = Preprocess(
        (16, 24), options["in_chans"], (0.5,) * options["in_chans"], (0.25,) * options["in_chans"]
    )
    data = encoder_bytes(encoder)
    assert data == encoder_bytes(encoder)
    file = tmp_path / "encoder.safetensors"
    file.write_bytes(data)
    with safe_open(file, "pt") as opened:
        assert list(opened.metadata()) == ["dmjd"]
        metadata = json.loads(opened.metadata()["dmjd"])
        assert opened.metadata()["dmjd"] == json.dumps(metadata, sort_keys=True)
        assert set(opened.keys()) == set(encoder.state_dict())
    for source in (file, str(file), tmp_path):
        loaded = load_encoder(source)
        assert not loaded.training
        assert loaded.preprocess == encoder.preprocess
        assert encoder_bytes(loaded) == data
        images = torch.randn(1, options["in_chans"], 16, 24)
        with torch.no_grad():
            assert torch.equal(loaded(images), encoder(images))


def test_encoder_file_does_not_depend_on_drop_path():
    assert encoder_bytes(small_encoder("vit_tiny_patch8", img_size=16, drop_path=0.3)) == encoder_bytes(
        small_encoder("vit_tiny_patch8", img_size=16)
    )


@pytest.mark.parametrize(
    ("name", "options", "indices"),
    [("vit_tiny_patch8", {"class_token": True}, (0, 1)), ("conv_vit_tiny_patch4", {}, (0, 1, 2))],
)
def test_a_trained_encoder_as_a_frozen_backbone(name, options, indices, tmp_path):
    """Libraries use ``feature_info`` and the list of maps of a timm backbone, in their own training step."""
    encoder = small_encoder(name, img_size=(16, 24), **options)
    (tmp_path / "encoder.safetensors").write_bytes(encoder_bytes(encoder))
    backbone = load_encoder(tmp_path, features_only=True, out_indices=indices)
    assert not any(module.training for module in backbone.modules())
    backbone.requires_grad_(False)
    images = torch.randn(2, 3, 16, 24)
    maps = backbone(images)
    expected = encoder.forward_intermediates(images, indices=indices, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
    for features, width, reduction in zip(
        maps, backbone.feature_info.channels(), backbone.feature_info.reduction(), strict=True
    ):
        assert features.shape == (2, width, 16 // reduction, 24 // reduction)
    head = nn.Conv2d(maps[-1].shape[1], 2, 1)
    head(maps[-1]).mean().backward()
    assert head.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_a_trained_encoder_in_a_custom_loop(tmp_path):
    encoder = small_encoder("vit_tiny_patch8", img_size=16)
    (tmp_path / "encoder.safetensors").write_bytes(encoder_bytes(encoder))
    loaded = load_encoder(tmp_path)
    assert (loaded.embed_dim, loaded.patch_size, loaded.grid) == (encoder.embed_dim, 8, (2, 2))
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 0, 1])
    tokens, maps = loaded.forward_intermediates(images)
    assert torch.equal(tokens, loaded.forward_features(images))
    assert torch.equal(maps[-1].flatten(2).transpose(1, 2), loaded(images))
    model = nn.Sequential(loaded.train(), nn.Flatten(), nn.Linear(4 * loaded.embed_dim, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_load_encoder_by_name():
    encoder = load_encoder("vit_tiny_patch32")
    assert (encoder.name, encoder.img_size, encoder.training) == ("vit_tiny_patch32", (224, 224), False)
    with pytest.raises(ValueError, match="did you mean 'vit_tiny_patch32'"):
        load_encoder("vit_tinny_patch32")


def test_load_encoder_errors(tmp_path):
    def refused(source, message: str) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            load_encoder(source)
        assert "\n" not in str(caught.value)

    refused(tmp_path / "nowhere", "nowhere does not exist: give a run folder")
    refused(tmp_path, "holds no encoder.safetensors: it is not a run folder")
    (tmp_path / "text.safetensors").write_text("not weights")
    refused(tmp_path / "text.safetensors", "not a readable safetensors file .* may be cut short")
    encoder = small_encoder("vit_tiny_patch8", img_size=16)
    whole = encoder_bytes(encoder)
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "cut.safetensors", "cut short")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    refused(tmp_path / "empty.safetensors", "cut short")
    save_file(encoder.state_dict(), tmp_path / "foreign.safetensors")
    refused(tmp_path / "foreign.safetensors", "not written by dmjd; .*load_official")
    with safe_open(tmp_path / "foreign.safetensors", "pt") as opened:
        state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    (tmp_path / "good.safetensors").write_bytes(whole)
    with safe_open(tmp_path / "good.safetensors", "pt") as opened:
        metadata = json.loads(opened.metadata()["dmjd"])
    metadata.pop("sha256")  # as if version 0.1 had written it
    state.pop("norm.bias")
    save_file(state, tmp_path / "lacking.safetensors", {"dmjd": json.dumps(metadata)})
    refused(tmp_path / "lacking.safetensors", "weights do not fit vit_tiny_patch8: .*norm.bias")
    save_file(state, tmp_path / "newer.safetensors", {"dmjd": json.dumps(metadata | {"format": 99})})
    refused(tmp_path / "newer.safetensors", r"newer dmjd \(format 99\)")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({"depth": value}, "depth must be") for value in (10**9, 0, -1, True, "3", 1e300, None, [3])),
        ({"depth": 900}, "900 blocks, but the file holds"),
        *(({"embed_dim": value}, "embed_dim must be") for value in (10**9, 0, False, "32", float("inf"))),
        ({"embed_dim": 16_384}, "ask for|weights alone take"),
        *(({"img_size": value}, "img_size must be") for value in (10**9, 0, [16, -16], "16", True, {}, [1, 2, 3])),
        ({"img_size": [16_384, 16_384]}, "1048576 tokens|pos_embed is|ask for|more than"),
        ({"img_size": [16, 24]}, "pos_embed is .* ask for"),
        *(({"num_heads": value}, "num_heads must be|do not divide") for value in (10**9, 0, -2, True, "2", 3)),
        *(({"mlp_ratio": value}, "mlp_ratio must be") for value in (10**9, 0, -1.0, "4", float("nan"))),
        ({"mlp_ratio": 99.0}, "mlp.fc1.(weight|bias) is .* ask for"),
        *(({"in_chans": value}, "in_chans must be") for value in (10**9, 0, "3", True)),
        ({"class_token": "yes"}, "class_token must be bool"),
        ({"width": 3}, "does not take width"),
    ],
)
def test_hostile_metadata_are_refused_at_once(tmp_path, changes, message):
    """Before anything of the size they ask for is allocated."""
    encoder = small_encoder("vit_tiny_patch8", img_size=16)
    metadata = encoder_metadata(encoder)
    metadata["options"] |= changes
    file = tmp_path / "hostile.safetensors"
    write_safetensors(file, encoder.state_dict(), metadata)
    started = time.perf_counter()
    with pytest.raises(ValueError, match=message) as refused:
        load_encoder(file)
    assert time.perf_counter() - started < 1
    assert str(refused.value).startswith(f"{file}: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", [None, 3, "", "vit_gigantic_patch8", "vit_tiny_patch999999999", "x" * 10_000, ["vit"]])
def test_a_hostile_name_is_refused(tmp_path, name):
    encoder = small_encoder("vit_tiny_patch8", img_size=16)
    write_safetensors(tmp_path / "a.safetensors", encoder.state_dict(), encoder_metadata(encoder) | {"name": name})
    with pytest.raises(ValueError, match=r"a\.safetensors: its metadata do not describe an encoder: ") as refused:
        load_encoder(tmp_path / "a.safetensors")
    assert len(str(refused.value)) < 2000


def test_loading_leaves_the_global_random_state_as_before(tmp_path):
    """It advances by the random weights of one encoder, so that runs which load one keep their numbers."""
    encoder = small_encoder("vit_tiny_patch8", img_size=16)
    (tmp_path / "encoder.safetensors").write_bytes(encoder_bytes(encoder))
    torch.manual_seed(0)
    load_encoder(tmp_path)
    after_loading = torch.rand(3)
    torch.manual_seed(0)
    create_encoder(encoder.name, **encoder.options)
    assert torch.equal(after_loading, torch.rand(3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"img_size": [10**9, 16]}, "img_size must be at most"),
        ({"img_size": 16}, r"img_size must be \(height, width\), got 16"),
        ({"img_size": [True, 16]}, "img_size must be int, got True"),
        ({"in_chans": "3"}, "in_chans must be int"),
        ({"mean": [float("nan")] * 3}, "mean must be finite"),
        ({"std": [0.0] * 3}, "std must be positive"),
        ({"mean": "abc"}, "mean must be a tuple of numbers"),
        ({"value_range": [0]}, "value_range must be a tuple of numbers"),
        ({"width": 3}, "not the settings of a preprocessing"),
    ],
)
def test_a_hostile_preprocessing_is_refused(tmp_path, changes, message):
    encoder = small_encoder("vit_tiny_patch8", img_size=16)
    preprocess = Preprocess((16, 16)).to_dict() | changes
    metadata = encoder_metadata(encoder) | {"preprocess": preprocess}
    write_safetensors(tmp_path / "a.safetensors", encoder.state_dict(), metadata)
    with pytest.raises(ValueError, match=rf"a\.safetensors: its preprocessing cannot be used: .*{message}"):
        load_encoder(tmp_path / "a.safetensors")


def test_the_hash_of_weights_is_that_of_version_0_1():
    """Results and baselines hold it."""
    former = GOLDEN / "run_v0.1"
    assert weights_hash(load_encoder(former)) == json.loads((former / "evaluation" / "knn.json").read_text())["encoder"]


def save_run(folder, encoder, step: int, stale: bool = False) -> None:
    """A checkpoint and the encoder file of a run; with ``stale`` a kill came between the two."""
    state = {
        "progress": {"step": step},
        "encoder": encoder_metadata(encoder),
        "encoder_file": digest_of(encoder_bytes(encoder)),
    }
    (folder / "checkpoints").mkdir(exist_ok=True)
    save_checkpoint(
        folder / "checkpoints" / f"step-{step:09d}.safetensors", named_tensors("model.encoder", encoder), state
    )
    if not stale:
        (folder / "encoder.safetensors").write_bytes(encoder_bytes(encoder))


def is_quiet(folder, encoder) -> bool:
    """Whether a run's encoder loads without a warning; it must have the weights of ``encoder``."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = load_encoder(folder)
    assert encoder_bytes(loaded) == encoder_bytes(encoder)
    return not caught


def test_the_encoder_of_a_run_is_that_of_its_newest_checkpoint(tmp_path):
    first, second = (small_encoder("vit_tiny_patch8", seed, img_size=16) for seed in (0, 1))
    file = tmp_path / "encoder.safetensors"
    save_run(tmp_path, first, 2)
    assert is_quiet(tmp_path, first)
    save_run(tmp_path, second, 4, stale=True)
    with pytest.warns(UserWarning, match=r"encoder.safetensors does not belong to the newest .*step-000000004"):
        assert encoder_bytes(load_encoder(tmp_path)) == encoder_bytes(second)
    with pytest.warns(UserWarning, match=r"encoder.safetensors does not belong to the newest checkpoint; .* does"):
        assert encoder_bytes(load_encoder(file)) == encoder_bytes(first)
    file.unlink()
    with pytest.warns(UserWarning, match=r"encoder.safetensors is missing"):
        assert encoder_bytes(load_encoder(tmp_path)) == encoder_bytes(second)
    save_run(tmp_path, second, 4)
    assert is_quiet(tmp_path, second)
    whole = file.read_bytes()
    file.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.warns(UserWarning, match=r"encoder.safetensors is damaged: .* taken from .*step-000000004"):
        assert encoder_bytes(load_encoder(tmp_path)) == encoder_bytes(second)
    # The newest checkpoint is damaged: its encoder file is still the newest.
    file.write_bytes(whole)
    newest = tmp_path / "checkpoints" / "step-000000004.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    assert not is_quiet(tmp_path, second)
    file.write_bytes(b"")
    assert not is_quiet(tmp_path, first)
    shutil.rmtree(tmp_path / "checkpoints")
    file.write_bytes(whole)
    assert is_quiet(tmp_path, second)


@pytest.mark.parametrize(
    "options",
    [
        {"depth": 10**9},
        {"embed_dim": 10**9},
        {"embed_dim": 1 << 19, "depth": 3},
        {"img_size": [10**6, 10**6]},
        {"img_size": [10**6]},
        {"embed_dim": 0},
        {"in_chans": 10**12},
        {"mlp_ratio": 1e300},
        {"num_heads": 0},
        {"num_heads": "2"},
        {"depth": [3]},
        {"nonsense": 1},
    ],
)
def test_a_hostile_encoder_file_is_refused_at_once(tmp_path, options):
    encoder = small_encoder("vit_tiny_patch8", img_size=16)
    metadata = encoder_metadata(encoder)
    file = tmp_path / "a.safetensors"
    write_safetensors(file, encoder.state_dict(), metadata | {"options": metadata["options"] | options})
    started = time.monotonic()
    with pytest.raises(ValueError, match=re.escape(str(file))):
        load_encoder(file)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "change",
    [{"format": "1"}, {"options": 3}, {"preprocess": {"img_size": 3}}, {"name": None}, {"name": "vit_nano_patch8"}],
)
def test_metadata_of_other_types_is_refused(tmp_path, change):
    encoder = small_encoder("vit_tiny_patch8", img_size=16)
    file = tmp_path / "a.safetensors"
    write_safetensors(file, encoder.state_dict(), encoder_metadata(encoder) | change)
    with pytest.raises(ValueError, match=re.escape(str(file))):
        load_encoder(file)
