"""Build a model from a configuration, and load configuration, model and images from a run folder."""

import re

import pytest
import torch
from support import TINY_FIELDS

import dmjd
from dmjd.config import recipes
from dmjd.encoders.stored import encoder_bytes
from dmjd.images.preprocess import Preprocess
from dmjd.runs.build import build_encoder, build_model, load_model, open_images, open_test_data, read_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("build") / "run"
    dmjd.pretrain(recipes.digits(out=str(out), steps=2, batch_size=8, **TINY_FIELDS))
    return out


def test_only_the_seed_determines_the_weights():
    first, second = (encoder_bytes(build_model(recipes.digits(**TINY_FIELDS)).encoder) for _ in range(2))
    assert first == second
    assert encoder_bytes(build_model(recipes.digits(**TINY_FIELDS, seed=1)).encoder) != first


def test_the_model_of_a_run_folder_loads(run):
    before = torch.get_rng_state()
    model, config = load_model(run)
    assert torch.equal(torch.get_rng_state(), before)
    assert config == read_config(run)
    assert not model.training
    assert encoder_bytes(model.encoder) == (run / "encoder.safetensors").read_bytes()


def test_images_of_a_run_and_others(run, image_folder):
    preprocess = load_model(run)[0].encoder.preprocess
    assert open_images(run, preprocess).name == "digits"
    assert open_images(run, preprocess, image_folder).name == str(image_folder)
    assert open_images(run / "encoder.safetensors", preprocess, image_folder, labels="folder").labels is not None
    with pytest.raises(ValueError, match="has no data of its own: pass --data"):
        open_images(run / "encoder.safetensors", preprocess)
    gray = Preprocess((16, 16), 1, (0.5,), (0.5,))
    assert open_images(run, gray, image_folder).read(0).shape[2] == 1


def test_others_need_not_have_the_labels_of_the_run(image_folder, tmp_path):
    config = recipes.folder(str(image_folder), str(tmp_path / "run"), labels="folder", **TINY_FIELDS)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(config.to_json())
    preprocess, cats = Preprocess((16, 16)), image_folder / "cats"
    assert open_images(tmp_path / "run", preprocess, image_folder).labels is not None
    with pytest.warns(UserWarning, match=r"cats is used without labels: it has none like .* \(--labels folder\)"):
        source = open_images(tmp_path / "run", preprocess, cats)
    assert (len(source), source.labels) == (12, None)
    with pytest.raises(ValueError, match="lie in no class folder"):
        open_images(tmp_path / "run", preprocess, cats, labels="folder")
    with pytest.raises(ValueError, match="nowhere"):
        open_images(tmp_path / "run", preprocess, tmp_path / "nowhere")


def test_the_test_set_is_the_test_part_or_a_set_of_its_own(image_folder):
    config = recipes.digits(**TINY_FIELDS)
    test = open_test_data(config, "digits", None)
    assert test is not None
    assert len(test) < len(open_images("nowhere", Preprocess((8, 8)), "digits"))
    assert open_test_data(config, str(image_folder), None) is None
    alone = open_test_data(config, "digits", str(image_folder))
    assert alone is not None
    assert len(alone) == 24


def test_folders_without_a_run(tmp_path):
    with pytest.raises(ValueError, match=r"is not a run folder: it has no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(recipes.digits(**TINY_FIELDS).to_json())
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            recipes.mae(encoder="conv_vit_base_patch16"),
            "conv_vit_base_patch16 has no class token, which the recipe mae adds: give --no-class-token; the recipe "
            "convmae is mae without one",
        ),
        (
            recipes.dmjd(class_token=True),
            "conv_vit_base_patch16 has no class token, which --class-token adds: give --no-class-token",
        ),
    ],
)
def test_an_encoder_without_a_class_token_says_who_adds_one(config, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build_encoder(config)
