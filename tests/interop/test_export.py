"""Exported files reproduce the encoder's outputs, and the printed code loads them."""

import json

import pytest
import timm
import torch
from exported_encoders import SMALL, SMALL_CONV, random_images, run_lines, saved

from dmjd.cli.encoder import EXPORT_FORMATS
from dmjd.cli.main import main
from dmjd.encoders.stored import encoder_bytes, encoder_metadata
from dmjd.encoders.weights import load_encoder
from dmjd.interop.export import FORMATS, export, formats_of
from dmjd.interop.exported import TokensAndFeatures
from dmjd.interop.onnx_export import check_onnx


@pytest.mark.parametrize(
    ("name", "size", "chans", "options"),
    [
        ("vit_tiny_patch16", 224, 3, {"class_token": True, "depth": 2}),
        ("vit_tiny_patch16", 224, 3, {"depth": 2}),
        ("vit_small_patch8", (32, 48), 1, {"class_token": True} | SMALL),
        ("vit_base_patch4", (16, 24), 5, {"mlp_ratio": 2.5} | SMALL),
        ("timm/vit_small_patch16_dinov3", (32, 48), 2, SMALL),
        ("timm/vit_base_patch16_siglip_224", (32, 48), 3, {"class_token": True, "patch_size": 8} | SMALL),
    ],
)
def test_timm_loads_the_file_by_the_printed_lines(name, size, chans, options, tmp_path):
    encoder, file = saved(tmp_path, name, size, chans, **options)
    exported = export(file, format="timm", out=tmp_path / "new" / "vit's.safetensors")
    model = run_lines(exported.usage)["model"].eval()
    images = random_images(encoder)
    with torch.inference_mode():
        torch.testing.assert_close(
            model.forward_features(images), encoder.forward_features(images), rtol=1e-4, atol=1e-4
        )
        assert model(images).shape == (2, encoder.embed_dim)
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (chans, *encoder.img_size)
    assert (config["mean"], config["std"]) == ((0.4,) * chans, (0.2,) * chans)


def test_a_standard_vit_needs_no_arguments_but_the_file(tmp_path):
    encoder, file = saved(tmp_path, "vit_tiny_patch16", class_token=True, preprocess=False)
    export(file, format="timm", out=tmp_path / "vit.safetensors")
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, checkpoint_path=tmp_path / "vit.safetensors"
    ).eval()
    assert set(model.state_dict()) == set(encoder.state_dict())
    images = random_images(encoder, 1)
    with torch.inference_mode():
        torch.testing.assert_close(
            model.forward_features(images), encoder.forward_features(images), rtol=1e-4, atol=1e-4
        )


def test_without_class_token_few_arguments_are_needed(tmp_path):
    _, file = saved(tmp_path, "vit_tiny_patch16", preprocess=False)
    usage = export(file, format="timm", out=tmp_path / "vit.safetensors").usage
    given = [line.strip().split("=")[0] for line in usage.splitlines()[3:-1]]
    assert given[1:] == ["checkpoint_path", "num_classes", "class_token", "global_pool", "fc_norm"]


@pytest.mark.parametrize(
    ("name", "size", "chans", "options"),
    [
        # Slow: its operations are among those of the third.
        pytest.param("vit_tiny_patch8", (16, 24), 1, {"class_token": True} | SMALL, marks=pytest.mark.slow),
        ("conv_vit_tiny_patch8", (32, 16), 5, SMALL_CONV),
        ("timm/vit_small_patch16_dinov3", (32, 48), 3, SMALL),
    ],
)
def test_onnx_gives_the_encoders_outputs_for_any_batch(name, size, chans, options, tmp_path):
    pytest.importorskip("onnxruntime")
    encoder, file = saved(tmp_path, name, size, chans, **options)
    exported = export(file, format="onnx", out=tmp_path / 'the "encoder".onnx')
    for batch in (1, 2, 5):
        images = random_images(encoder, batch)
        names = run_lines(exported.usage, images=images.numpy())
        with torch.inference_mode():
            tokens = encoder(images)
            torch.testing.assert_close(torch.from_numpy(names["tokens"]), tokens, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(torch.from_numpy(names["features"]), encoder.pool(tokens), rtol=1e-4, atol=1e-4)
    metadata = names["session"].get_modelmeta().custom_metadata_map
    assert json.loads(metadata["dmjd"]) == encoder_metadata(encoder)
    assert {path.name for path in tmp_path.iterdir()} == {"encoder.safetensors", 'the "encoder".onnx'}
    with torch.no_grad():
        encoder.norm.weight.add_(1)  # not in the outputs
        check_onnx(exported.path, TokensAndFeatures(encoder))
        encoder.blocks[0].norm1.weight.add_(0.1)
    with pytest.raises(ValueError, match="differ from the encoder's by up to"):
        check_onnx(exported.path, TokensAndFeatures(encoder))


def test_onnx_names_missing_packages(tmp_path, monkeypatch):
    _, file = saved(tmp_path, "vit_tiny_patch8", 16, **SMALL)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs onnx and onnxscript and onnxruntime: pip install 'dmjd\[onnx\]'"):
        export(file, format="onnx", out=tmp_path / "encoder.onnx")


def test_safetensors_is_the_encoder_with_its_metadata(tmp_path):
    encoder, file = saved(tmp_path, "conv_vit_tiny_patch8", 16, **SMALL_CONV)
    exported = export(file, format="safetensors", out=tmp_path / 'the "copy".safetensors')
    again = run_lines(exported.usage)["encoder"]
    assert again.preprocess == encoder.preprocess
    assert encoder_bytes(again) == file.read_bytes() == exported.path.read_bytes()
    assert torch.equal(again(images := random_images(encoder)), load_encoder(file)(images))


def test_errors_are_explained(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    _, file = saved(tmp_path, "conv_vit_tiny_patch8", 16, **SMALL_CONV)
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").touch()
    for arguments, message in [
        ([file, "--format", "timm", "--out", tmp_path / "a.safetensors"], "timm has no ConvViT"),
        ([file, "--format", "onxx", "--out", tmp_path / "a.onnx"], "did you mean 'onnx'"),
        ([file, "--format", "timm", "--out", tmp_path / "a.pth"], "ends in .safetensors"),
        ([file, "--format", "safetensors", "--out", file / "a.safetensors"], "cannot be written"),
        ([tmp_path / "nowhere", "--format", "timm", "--out", tmp_path / "a.safetensors"], "does not exist"),
        ([file, "--out", tmp_path / "a.safetensors"], "required: --format"),
        ([file, "--format", "hubb", "--out", tmp_path / "a"], "did you mean 'hub'"),
        ([file, "--format", "timm", "--out", tmp_path / "a"], "timm has no ConvViT"),
        ([file, "--format", "hub", "--out", tmp_path / "a.safetensors"], "hub writes a folder; give a name without"),
        ([file, "--format", "hub", "--out", file], "hub writes a folder"),
        ([file, "--format", "timm", "--out", tmp_path / "taken"], "is a file; give a folder"),
        ([tmp_path / "empty", "--format", "hub", "--out", tmp_path / "a"], "holds no encoder.safetensors"),
        ([file, "--format", "torch", "--out", tmp_path / "a.onnx"], "ends in .pt2"),
        ([file, "--format", "torch", "--out", tmp_path], "ends in .pt2"),
        ([file, "--format", "hf", "--out", tmp_path / "a"], "Use --format torch"),
        ([file, "--format", "torch", "--out", tmp_path / "a.pt2", "--push", "me/x"], "--push uploads a folder"),
        ([file, "--format", "hub", "--out", tmp_path / "a", "--push", "x"], "give user/name"),
        ([file, "--format", "hub", "--out", tmp_path / "a", "--push", "me/x"], "needs a token"),
        (["hf-hub:x", "--format", "hub", "--out", tmp_path / "a"], "give user/name"),
    ]:
        assert main(["export", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.strip().splitlines()) == 1 + ("required" in message)
    assert {path.name for path in tmp_path.iterdir()} == {"encoder.safetensors", "empty", "taken"}


def test_the_formats_of_the_banner_are_those_that_work(tmp_path):
    for name, options, missing in (
        ("vit_tiny_patch8", SMALL | {"class_token": True}, set()),
        ("vit_tiny_patch8", SMALL, {"hf"}),
        ("conv_vit_tiny_patch8", SMALL_CONV, {"hf", "timm"}),
    ):
        encoder, _ = saved(tmp_path, name, 16, **options)
        assert set(formats_of(encoder)) == set(FORMATS) - missing
    assert tuple(FORMATS) == EXPORT_FORMATS


def test_the_hub_format_is_save_pretrained(tmp_path, capsys):
    encoder, file = saved(tmp_path, "conv_vit_tiny_patch8", 16, **SMALL_CONV)
    assert main(["export", str(file), "--format", "hub", "--out", str(tmp_path / "out.v2")]) == 0
    assert "dmjd.load_encoder(" in capsys.readouterr().out
    load_encoder(file).save_pretrained(tmp_path / "same")
    written, same = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("out.v2", "same"))
    assert written == same
    assert encoder_bytes(load_encoder(tmp_path / "out.v2")) == encoder_bytes(encoder)
