"""Programs for PyTorch alone."""

import json
import subprocess
import sys

import pytest
import torch
from exported_encoders import SMALL, SMALL_CONV, random_images, saved

from dmjd.encoders.stored import encoder_metadata
from dmjd.interop.export import export
from dmjd.interop.exported import TokensAndFeatures
from dmjd.interop.torch_export import check_program

ALONE = """
import sys
sys.modules["dmjd"] = sys.modules["timm"] = None  # an import would fail
import torch
"""

USED = """
images, expected = torch.load({expected!r})
{usage}
for theirs, ours in zip((tokens, features), expected, strict=True):
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
assert model(images[:1])[1].shape[0] == 1
assert model(torch.cat([images] * 4))[1].shape[0] == 4 * len(images)
print("used")
"""


def test_programs_run_without_our_code(tmp_path):
    code = ALONE
    for name, size, chans, options in (
        ("vit_tiny_patch8", (16, 24), 1, {"class_token": True} | SMALL),
        ("conv_vit_tiny_patch8", (32, 16), 5, SMALL_CONV),
    ):
        (folder := tmp_path / name).mkdir()
        encoder, file = saved(folder, name, size, chans, **options)
        exported = export(file, format="torch", out=folder / 'the "encoder".pt2')
        images = random_images(encoder, 5)
        with torch.inference_mode():
            torch.save((images, TokensAndFeatures(encoder)(images)), folder / "expected.pt")
        code += USED.format(expected=str(folder / "expected.pt"), usage=exported.usage)
        extra = {"dmjd": ""}
        torch.export.load(exported.path, extra_files=extra)
        assert json.loads(extra["dmjd"]) == encoder_metadata(encoder)
        with torch.no_grad():
            encoder.pos_embed.add_(0.01)
        with pytest.raises(ValueError, match="the program's tokens differ from the encoder's by up to"):
            check_program(exported.path.read_bytes(), TokensAndFeatures(encoder))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "used\n" * 2
