"""What ``--init`` takes, and what it refuses in one line."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import huggingface_hub.constants as hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from support import GOLDEN, SHARED, small_encoder

from dmjd.encoders.base import Encoder
from dmjd.encoders.classifier import ImageClassifier, classifier_bytes
from dmjd.encoders.published import to_published
from dmjd.encoders.registry import create_encoder
from dmjd.encoders.source_settings import as_flags
from dmjd.encoders.sources import hash_of, read_weights
from dmjd.encoders.stored import encoder_bytes, encoder_metadata, weights_hash
from dmjd.files import safetensors_bytes
from dmjd.images.preprocess import Preprocess
from dmjd.runs.build import load_model
from dmjd.runs.checkpoint import named_tensors, save_checkpoint


@pytest.fixture
def encoder() -> Encoder:
    encoder = small_encoder("vit_tiny_patch8", img_size=(16, 24))
    encoder.preprocess = Preprocess((16, 24), 3, (0.1,) * 3, (0.2,) * 3)
    return encoder


def test_files_of_ours(encoder, tmp_path):
    """An encoder file, its folder and a checkpoint hold the same weights; the decoder is read on request."""
    (tmp_path / "encoder.safetensors").write_bytes(encoder_bytes(encoder))
    checkpoint = tmp_path / "checkpoint.safetensors"
    tensors = named_tensors("model.encoder", encoder) | {"model.branches.mim.x": torch.ones(2)}
    save_checkpoint(checkpoint, tensors, {"progress": {"step": 3}, "encoder": encoder_metadata(encoder)})
    for source in (tmp_path, tmp_path / "encoder.safetensors", str(checkpoint)):
        weights = read_weights(source, decoder=True)
        assert weights.hash == weights_hash(encoder)
        assert all(torch.equal(weights.tensors[key], value) for key, value in encoder.state_dict().items())
        assert (weights.grid, weights.num_heads, weights.source) == ((2, 3), 2, str(source))
        assert weights.preprocess == encoder.preprocess
        assert as_flags(weights.settings) == "--encoder vit_tiny_patch8 --embed-dim 32 --depth 3 --num-heads 2"
        assert (weights.img_size, weights.in_chans) == (encoder.img_size, encoder.in_chans)
        assert set(weights.decoder) == ({"branches.mim.x"} if str(source) == str(checkpoint) else set())
    assert read_weights(checkpoint).decoder == {}


@pytest.mark.parametrize("name", ["classifier.safetensors", "best.safetensors"])
def test_the_encoder_of_a_fine_tuned_classifier(name, encoder, tmp_path):
    """It is what the same encoder in a file of its own is; head and classes do not matter."""
    (tmp_path / "encoder.safetensors").write_bytes(encoder_bytes(encoder))
    folder = tmp_path / "finetune"
    folder.mkdir()
    (folder / name).write_bytes(classifier_bytes(ImageClassifier(encoder, ["cat", "dog"], test_crop=0.5)))
    weights = read_weights(folder / name, decoder=True)
    expected = dataclasses.asdict(read_weights(tmp_path / "encoder.safetensors"))
    found = dataclasses.asdict(weights) | {"source": expected["source"]}
    assert found.pop("tensors").keys() == expected["tensors"].keys()
    assert all(torch.equal(weights.tensors[key], value) for key, value in expected.pop("tensors").items())
    assert found == expected
    assert weights.settings is not None


@pytest.mark.parametrize("damage", ["classes", "digest", "encoder"])
def test_damaged_classifiers(damage, encoder, tmp_path):
    file = tmp_path / "classifier.safetensors"
    model = ImageClassifier(encoder, ["cat", "dog"])
    content = bytearray(classifier_bytes(model))
    message = "is damaged: its content does not match its digest"
    if damage == "digest":
        content[-1] ^= 1
    else:
        metadata = encoder_metadata(encoder) | {"classes": 2 if damage == "classes" else ["cat"], "test_crop": 1.0}
        metadata |= {"options": []} if damage == "encoder" else {}
        content = safetensors_bytes(model.state_dict(), {"classifier": metadata})
        message = {"classes": r"wrong content .*`\$\.classes`", "encoder": "do not describe an encoder"}[damage]
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"classifier\.safetensors:? .*{message}") as refused:
        read_weights(file)
    assert "\n" not in str(refused.value)


def test_trainings_of_evaluations_are_refused(encoder, tmp_path):
    """Their checkpoints hold no description of the encoder; the folder of a finished fine-tuning has the classifier."""
    checkpoints = tmp_path / "training" / "checkpoints"
    checkpoints.mkdir(parents=True)
    state = {"progress": {"step": 3}, "scores": {}, "best": {}}
    for name in ("final", "best-000000003"):
        save_checkpoint(checkpoints / f"{name}.safetensors", named_tensors("model.pyramid.encoder", encoder), state)
    for source in (checkpoints.parent, checkpoints / "final.safetensors", checkpoints / "best-000000003.safetensors"):
        with pytest.raises(ValueError, match=r"holds the training of an evaluation .*: give the run, or") as refused:
            read_weights(source)
        assert "\n" not in str(refused.value)
    shutil.rmtree(checkpoints)
    (checkpoints.parent / "classifier.safetensors").touch()
    with pytest.raises(ValueError, match=r"the folder of a classifier: give \S+/training/classifier\.safetensors$"):
        read_weights(checkpoints.parent)


def test_the_run_of_a_former_version():
    weights = read_weights(GOLDEN / "run_v0.1", decoder=True)
    assert weights.hash == json.loads((GOLDEN / "run_v0.1" / "evaluation" / "knn.json").read_text())["encoder"]
    model, _ = load_model(GOLDEN / "run_v0.1")
    others = {key: value for key, value in model.state_dict().items() if key.startswith("branches.")}
    assert others
    assert weights.decoder.keys() == others.keys()
    assert all(torch.equal(weights.decoder[key], value) for key, value in others.items())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["vit_tiny_patch8", "conv_vit_tiny_patch8"])
def test_published_files(name, suffix, tmp_path):
    """Encoder and decoder get our names; 1 x 1 convolutions of the published ConvViT lose two dimensions."""
    conv_vit = name.startswith("conv")
    sizes = {"embed_dims": (8, 12, 16), "depths": (1, 1, 1)} if conv_vit else {"embed_dim": 32, "depth": 1}
    encoder = create_encoder(name, 32, num_heads=2, **sizes)
    state = {}
    for key, value in encoder.state_dict().items():
        published = to_published(f"encoder.{key}", conv_vit)
        pointwise = conv_vit and published.startswith(("blocks1.", "blocks2.")) and value.dim() == 2
        state[published] = value[:, :, None, None].contiguous() if pointwise else value
    state |= {"decoder_embed.weight": torch.zeros(3), "mask_token": torch.zeros(1)}
    file = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"model": state, "epoch": 3}, file)
    else:
        save_file(state, file)
    weights = read_weights(file, decoder=True)
    assert weights.tensors.keys() == encoder.state_dict().keys()
    assert all(torch.equal(weights.tensors[key], value) for key, value in encoder.state_dict().items())
    assert set(weights.decoder) == {"branches.mim.decoder.embed.weight", "branches.mim.decoder.mask_token"}
    assert (weights.grid, weights.num_heads, weights.preprocess) == ((4, 4), None, None)


def test_the_hash_depends_on_names_shapes_and_values():
    first = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    assert hash_of(first) == hash_of(dict(reversed(first.items())))
    others = [{"a": torch.zeros(3, 2), "b": torch.ones(1)}, {"a": torch.zeros(2, 3), "c": torch.ones(1)}]
    assert len({hash_of(one) for one in [first, *others, {"a": torch.zeros(2, 3), "b": torch.zeros(1)}]}) == 4


def test_weights_of_lower_precision_become_float32(tmp_path):
    file = tmp_path / "half.safetensors"
    save_file(
        {key: value.half() for key, value in small_encoder("vit_tiny_patch8", img_size=16).state_dict().items()}, file
    )
    assert {value.dtype for value in read_weights(file).tensors.values()} == {torch.float32}


TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def saved_timm(folder: Path, name: str = "vit_tiny_patch16_224", **args: object) -> torch.nn.Module:
    """A model with a head of five classes in timm's form; returned without it."""
    model = timm.create_model(name, num_classes=5, **args)
    save_file(model.state_dict(), folder / "model.safetensors")
    data = {"input_size": [3, 32, 32], "mean": [0.4] * 3, "std": [0.25] * 3, "num_classes": 5, "classifier": "head"}
    config = {"architecture": name, "num_classes": 5, "model_args": args, "pretrained_cfg": data}
    model.reset_classifier(0)
    (folder / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_a_folder_of_timm(prefix, tmp_path):
    model = saved_timm(tmp_path, **TIMM)
    weights = read_weights(f"{prefix}{tmp_path}")
    assert all(torch.equal(weights.tensors[key], value) for key, value in model.state_dict().items())
    assert (weights.grid, weights.num_heads) == ((4, 4), 2)
    assert (weights.preprocess.mean, weights.preprocess.std) == ((0.4,) * 3, (0.25,) * 3)


def test_a_folder_of_timm_that_lacks_tensors(tmp_path):
    """timm itself leaves them random without an error."""
    model = saved_timm(tmp_path, **TIMM)
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("blocks.1.mlp")}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lack 2 tensors of VisionTransformer: blocks\.1\.mlp\.fc1\.weight, blocks"):
        read_weights(tmp_path)
    save_file({f"model.{key}": value for key, value in state.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lack 12 tensors .*: cls_token, pos_embed, .* and 7 more") as refused:
        read_weights(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_folder_of_a_convolutional_network(tmp_path):
    """It is refused before its weights are read."""
    saved_timm(tmp_path, "resnet10t")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="is not a ViT: its class is ResNet") as refused:
        read_weights(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.skipif(not (SHARED / "models").is_dir(), reason="real weights are not part of the project")
def test_real_weights_of_a_convolutional_network_are_refused():
    with pytest.raises(ValueError, match="tf_efficientnet_lite0 is not a ViT: its class is EfficientNet"):
        read_weights(SHARED / "models" / "tf_efficientnet_lite0")


@pytest.fixture
def offline(monkeypatch, tmp_path) -> Path:
    """A hub that cannot be reached, and an empty cache."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub, "ENDPOINT", "https://no-such-host.invalid")
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("source", ["vit_tiny_patch16_224", "timm/vit_tiny_patch16_224", "hf-hub:user/model"])
def test_without_a_network_it_says_where_it_looked(source, offline):
    with pytest.raises(ValueError, match=r"\.invalid cannot be reached, and they are not in its cache") as told:
        read_weights(source)
    assert str(offline) in str(told.value)
    assert "--init local-dir:FOLDER" in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("form", ["timm", "transformers", "several files"])
def test_models_of_the_hub_from_its_cache(form, offline):
    """The files lie where the hub's own library puts them."""
    model, revision = offline / "models--user--model", "0" * 40
    folder = model / "snapshots" / revision
    folder.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(revision)
    if form == "timm":
        expected = saved_timm(folder, **TIMM).state_dict()["norm.weight"]
    else:
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        saved = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=32, patch_size=8))
        saved.save_pretrained(folder, max_shard_size="20KB" if form == "several files" else "5GB")
        expected = saved.layernorm.weight
    weights = read_weights("hf-hub:user/model")
    assert torch.equal(weights.tensors["norm.weight"], expected)
    assert weights.source == "hf-hub:user/model"
    next(folder.glob("model*.safetensors")).unlink()
    with pytest.raises(ValueError, match="cannot be reached, and they are not in its cache"):
        read_weights("hf-hub:user/model")


class Bomb:
    """Runs code when it is unpickled without ``weights_only``."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):
        return (Path.touch, (self.victim,))


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path):
    torch.save({"model": {"pos_embed": torch.zeros(1)}, "more": Bomb(tmp_path / "ran")}, tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match=r"could not be read as plain weights .*Nothing in a file is ever executed"):
        read_weights(tmp_path / "bomb.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "init must not be empty"),
        (" ", "init must not be empty"),
        ("vit_tinny_patch16_224", "did you mean 'vit_tiny_patch16_224'"),
        (
            "timm/vit_smal_patch16_224",
            "--init timm/vit_smal_patch16_224 is .*; did you mean 'timm/vit_small_patch16_224'",
        ),
        ("timm/", "--init timm/ is not a run folder, an encoder file or a timm model"),
        ("timm/resnet18", "--init timm/resnet18 is not a ViT: its class is ResNet"),
        ("vit_tiny_patch16", "is not a run folder, an encoder file or a timm model; did you mean"),
        ("resnet18", "--init resnet18 is not a ViT: its class is ResNet"),
        ("swin_tiny_patch4_window7_224", "is not a ViT: its class is SwinTransformer"),
        ("runs/nowhere", "--init runs/nowhere is not a run folder"),
        ("local-dir:nowhere", r"the weights of --init local-dir:nowhere are not available \(FileNotFoundError"),
        ("empty", "neither a run folder nor one with a config.json of transformers or timm"),
        ("fifo", "is a FIFO, not a file"),
        ("text.pth", "could not be read as plain weights"),
        ("text.safetensors", "is not a readable safetensors file"),
        ("other.safetensors", r"no weights of a ViT or ConvViT: patch_embed\.proj\.weight is missing"),
        ("oblong.safetensors", "a position table of 15 patches is not square"),
        ("run", "holds no encoder.safetensors: it is not a run folder, or nothing has been saved yet"),
    ],
)
def test_sources_that_cannot_be_used(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    os.mkfifo(tmp_path / "fifo")
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("not weights")
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    tensors = {"patch_embed.proj.weight": torch.zeros(4, 3, 2, 2), "pos_embed": torch.zeros(1, 15, 4)}
    save_file(tensors, tmp_path / "oblong.safetensors")
    with pytest.raises(ValueError, match=message) as refused:
        read_weights(source)
    assert "\n" not in str(refused.value)


def test_a_damaged_checkpoint_is_passed_over_for_the_decoder(encoder, tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    state = {"progress": {"step": 3}, "encoder": encoder_metadata(encoder)}
    tensors = named_tensors("model.encoder", encoder) | {"model.fusion.x": torch.ones(2)}
    save_checkpoint(folder / "step-000000003.safetensors", tensors, state)
    shutil.copy(folder / "step-000000003.safetensors", folder / "step-000000004.safetensors")
    with (folder / "step-000000004.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\xff\xff\xff\xff")
    with pytest.warns(UserWarning, match="is damaged"):
        weights = read_weights(tmp_path, decoder=True)
    assert torch.equal(weights.decoder["fusion.x"], torch.ones(2))
