"""Encoders on the hub: upload and download through the real client, to a server on this machine."""

import time

import huggingface_hub.constants as hub
import pytest
import timm
import torch
from loopback_hub import loopback_hub

import dmjd
from dmjd.cli.main import main
from dmjd.encoders.registry import create_encoder
from dmjd.encoders.sources import read_weights
from dmjd.encoders.stored import encoder_bytes
from dmjd.hub import check_repo, upload
from dmjd.images.preprocess import Preprocess

SMALL = {"embed_dim": 16, "depth": 1, "num_heads": 2}


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A hub on this machine, with an empty cache and a token that it takes."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with loopback_hub() as running:
        monkeypatch.setattr(hub, "ENDPOINT", running.url)
        monkeypatch.setattr(
            hub, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "good")
        yield running


def encoder_of(name="vit_tiny_patch8", **options):
    torch.manual_seed(0)
    encoder = create_encoder(name, 16, **({**SMALL, **options} if name[0] == "v" else options)).eval()
    encoder.preprocess = Preprocess((16, 16))
    return encoder


def test_an_encoder_goes_to_the_hub_and_back(server, monkeypatch):
    encoder = encoder_of()
    assert encoder.push_to_hub("me/first") == f"{server.url}/me/first"
    files = server.repos["me/first"]
    assert set(files) == {"model.safetensors", "config.json", "README.md"}
    assert 'load_encoder("hf-hub:me/first")' in files["README.md"].decode()

    again = dmjd.load_encoder("hf-hub:me/first")
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(again(images), encoder(images))
    assert again.preprocess == encoder.preprocess
    model = timm.create_model("hf-hub:me/first", pretrained=True, num_classes=0).eval()
    torch.testing.assert_close(model.forward_features(images), encoder.forward_features(images), rtol=1e-5, atol=1e-5)

    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")  # the cache has it
    assert torch.equal(dmjd.load_encoder("hf-hub:me/first")(images), encoder(images))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch8", SMALL),  # which timm knows, too
        ("conv_vit_tiny_patch8", {"embed_dims": (8, 8, 16), "depths": (1, 1, 1), "num_heads": 2}),
    ],
)
def test_a_run_starts_from_an_encoder_on_the_hub(server, name, options):
    encoder = encoder_of(name, **options)
    encoder.push_to_hub("me/first")
    started = dmjd.create_encoder(name, 16, init="hf-hub:me/first", **options)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(started.eval()(images), encoder(images))


def test_weights_in_several_files_are_downloaded(server, tmp_path):
    """All that the index names, and nothing else."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=16, patch_size=8))
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    files = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    assert len(files) > 4
    server.repos["me/big"] = files | {"other.safetensors": b""}
    weights = read_weights("hf-hub:me/big")
    assert weights.hash == read_weights(tmp_path / "model").hash
    assert {file.name for file in (tmp_path / "cache").rglob("snapshots/*/*")} == set(files)
    index = files["model.safetensors.index.json"].replace(b"model-00001", b"../model-00001")
    server.repos["me/hostile"] = files | {"model.safetensors.index.json": index}
    with pytest.raises(ValueError, match=r"is not the name of a \.safetensors file in the same folder"):
        read_weights("hf-hub:me/hostile")
    server.repos["me/empty"] = {"config.json": files["config.json"]}
    with pytest.raises(ValueError, match=r"EntryNotFound.*/model\.safetensors"):
        read_weights("hf-hub:me/empty")


def test_the_command_uploads_what_it_writes(server, tmp_path, capsys):
    file = tmp_path / "encoder.safetensors"
    file.write_bytes(encoder_bytes(encoder_of()))
    command = ["export", str(file), "--format", "timm", "--out", str(tmp_path / "out"), "--push", "me/first"]
    assert main(command) == 0
    assert f"Uploaded to {server.url}/me/first" in capsys.readouterr().out
    assert server.repos["me/first"] == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert main(["export", "hf-hub:me/first", "--format", "safetensors", "--out", str(tmp_path / "b.safetensors")]) == 0
    assert (tmp_path / "b.safetensors").read_bytes() == file.read_bytes()


def test_a_card_that_was_edited_on_the_hub_is_kept(server):
    encoder = encoder_of()
    encoder.push_to_hub("me/first")
    card = server.repos["me/first"]["README.md"]
    with torch.no_grad():
        encoder.norm.weight.add_(1)
    encoder.push_to_hub("me/first")
    assert server.repos["me/first"]["README.md"] == card
    server.repos["me/first"]["README.md"] = edited = card.replace(b"A vision encoder", b"My vision encoder")
    encoder.push_to_hub("me/first")
    assert server.repos["me/first"]["README.md"] == edited


def test_what_is_not_there_or_not_allowed_is_one_line(server, monkeypatch, tmp_path):
    def message(call) -> str:
        with pytest.raises(ValueError) as caught:  # noqa: PT011, the message is looked at
            call()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no such repository" in message(lambda: dmjd.load_encoder("hf-hub:me/nowhere"))
    server.repos["me/other"] = {"config.json": b'{"architecture": "resnet18"}', "model.safetensors": b""}
    assert "was not written by dmjd" in message(lambda: dmjd.load_encoder("hf-hub:me/other"))
    server.repos["me/empty"] = {"config.json": b"{}"}
    assert "EntryNotFound" in message(lambda: dmjd.load_encoder("hf-hub:me/empty"))
    monkeypatch.setenv("HF_TOKEN", "bad")
    assert "could not upload to me/first" in message(lambda: encoder_of().push_to_hub("me/first"))
    assert "me/first" not in server.repos


@pytest.mark.parametrize("name", ["encoder", "me/", "a/b/c", "me/na me", "../x/y", "", "me/[x]", "me/x.git"])
def test_names_that_cannot_be_repositories(name):
    with pytest.raises(ValueError, match="hub") as caught:
        check_repo(name)
    assert "\n" not in str(caught.value)


def test_without_token_or_network(monkeypatch, tmp_path, capfd):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub, "ENDPOINT", "https://no-such-host.invalid")
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"needs a token of .* 'hf auth login', or set HF_TOKEN$"):
        encoder_of().push_to_hub("me/first")
    monkeypatch.setenv("HF_TOKEN", "good")
    with pytest.raises(ValueError, match=r"could not upload to me/first: .* cannot be reached; write the encoder to a"):
        upload("me/first", {"a": b""})
    with pytest.raises(ValueError, match=rf"hf-hub:me/first cannot be loaded: .*not in its cache, {tmp_path}"):
        dmjd.load_encoder("hf-hub:me/first")
    assert time.perf_counter() - start < 10
    assert capfd.readouterr().err == ""
