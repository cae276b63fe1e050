"""A run folder as written by pre-training."""

import shutil

import pytest
from support import FEATURE_SIZE, tiny_encoder

from dmjd.config.pretrain import PretrainConfig
from dmjd.encoders.stored import encoder_bytes
from dmjd.encoders.weights import ENCODER_FILE


@pytest.fixture
def run(tmp_path, image_folder):
    """A run folder as written by pre-training, with images in two class folders and a test part."""
    data = tmp_path / "my data"
    shutil.copytree(image_folder, data / "train")
    shutil.copytree(image_folder / "cats", data / "test" / "cats")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ENCODER_FILE).write_bytes(encoder_bytes(tiny_encoder()))
    config = PretrainConfig(data=str(data), labels="folder", img_size=FEATURE_SIZE, encoder="vit_tiny_patch8")
    (folder / "config.json").write_text(config.to_json())
    return folder
