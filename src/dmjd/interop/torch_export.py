"""Export to a program of plain PyTorch, which needs none of our code."""

import io
import json
from pathlib import Path

import torch

from dmjd.encoders.base import Encoder
from dmjd.encoders.stored import encoder_metadata
from dmjd.files import METADATA_KEY, write_bytes
from dmjd.interop.exported import BATCHES, Exported, TokensAndFeatures, check_close, images_comment, program_images


def to_torch(encoder: Encoder, out: Path) -> Exported:
    """Write the encoder as a program for ``torch.export.load``, which is compared with it first."""
    model = TokensAndFeatures(encoder).eval()
    with torch.no_grad():
        program = torch.export.export(
            model, (program_images(encoder, 2),), dynamic_shapes={"images": {0: torch.export.Dim("batch")}}
        )
    buffer = io.BytesIO()
    metadata = json.dumps(encoder_metadata(encoder), sort_keys=True)
    torch.export.save(program, buffer, extra_files={METADATA_KEY: metadata})
    content = buffer.getvalue()
    check_program(content, model)
    write_bytes(out, content)
    lines = [
        "import torch",
        "",
        f"model = torch.export.load({str(out)!r}).module()",
        images_comment(encoder),
        "with torch.inference_mode():",
        "    tokens, features = model(images)",
    ]
    return Exported(out, "\n".join(lines))


def check_program(content: bytes, model: TokensAndFeatures) -> None:
    """Compare the bytes of a program with the encoder; ValueError if they differ."""
    loaded = torch.export.load(io.BytesIO(content)).module()
    for batch in BATCHES:
        images = program_images(model.encoder, batch)
        with torch.inference_mode():
            expected, got = model(images), loaded(images)
        for name, ours, theirs in zip(("tokens", "features"), expected, got, strict=True):
            check_close(f"the program's {name}", theirs.numpy(), ours.numpy())
