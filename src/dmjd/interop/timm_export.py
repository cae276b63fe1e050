"""Export to timm: one file of weights, or a folder that needs no arguments."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import timm
import torch
from timm.models import VisionTransformer

from dmjd.encoders.base import Encoder
from dmjd.encoders.folders import write_folder
from dmjd.encoders.pooling_lines import timm_pooling
from dmjd.encoders.stored import encoder_bytes
from dmjd.files import write_bytes
from dmjd.interop.conversion import timm_call
from dmjd.interop.exported import Exported, check_close, random_images


def to_timm_file(encoder: Encoder, out: Path) -> Exported:
    """Write the encoder's own file: its parameters have timm's names."""
    name, arguments = timm_call(encoder)
    model = cast(VisionTransformer, timm.create_model(name, **arguments))
    model.load_state_dict(encoder.state_dict())
    _check_model(model, encoder)
    write_bytes(out, encoder_bytes(encoder))
    lines = [f"    {name!r},", f"    checkpoint_path={str(out)!r},"]
    lines += [f"    {key}={value!r}," for key, value in arguments.items()]
    lines = ["import timm", "", "model = timm.create_model(", *lines, ")", *timm_pooling(encoder)]
    return Exported(out, "\n".join(lines))


def timm_usage(source: Path, encoder: Encoder) -> str:
    """How timm loads a folder. Older versions read no safetensors files there."""
    return "\n".join(
        [
            "import timm  # 1.0.26 or newer",
            "",
            f"model = timm.create_model({f'local-dir:{source}'!r}, pretrained=True, num_classes=0)",
            *timm_pooling(encoder),
        ]
    )


def check_timm_folder(encoder: Encoder, files: Mapping[str, bytes]) -> None:
    """Let timm load the files from a temporary folder, and compare the model with the encoder.

    Raises:
        ValueError: if they differ, or timm has no such model.
    """
    timm_call(encoder)
    with TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        write_folder(Path(folder), files)
        model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
    _check_model(cast(VisionTransformer, model), encoder)


def _check_model(model: VisionTransformer, encoder: Encoder) -> None:
    images = random_images(encoder, 2)
    model.eval()
    with torch.inference_mode():
        theirs, ours = model.forward_features(images), encoder.forward_features(images)
    check_close("timm's tokens", theirs.numpy(), ours.numpy())
