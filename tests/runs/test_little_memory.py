"""Runs on a device whose memory holds fewer images than a batch has; the limit is the model's."""

import pytest
import torch
from support import metrics

import dmjd
from dmjd.model import MaskedImageModel
from dmjd.pretraining.run import build_model, pretrain


class Limited(MaskedImageModel):
    """Raises what torch raises on a device with little memory, from ``first_step`` on."""

    limit, first_step, calls = 4, 0, 0

    def forward(self, images, *others, **more):
        self.calls += 1
        if len(images) > self.limit and self.calls > self.first_step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().forward(images, *others, **more)


def run(data, folder, limit: int | None = None, first_step: int = 0, **changes):
    settings = {"encoder": "vit_tiny_patch4", "embed_dim": (32,), "depth": (2,), "num_heads": 2, "decoder_dim": 32}
    settings |= {"decoder_depth": 1, "decoder_heads": 2, "batch_size": 16, "steps": 6, "log_every": 1, "device": "cpu"}
    settings |= {"eval_every": 0, "final_eval": False, "report": False}
    config = dmjd.recipes.digits(data=str(data), out=str(folder), num_workers=0, **settings | changes)
    model = build_model(config)
    if limit is not None:
        model.__class__, model.limit, model.first_step = Limited, limit, first_step
    return pretrain(config, model=model)


def test_it_goes_on_with_fewer_images_at_a_time(image_folder, tmp_path, capsys):
    """The same bits as with the --accumulate that fits, and a line that says so."""
    assert run(image_folder, tmp_path / "little", limit=4).finished
    assert "out of memory: going on with --accumulate 4, 4 image(s) at a time" in capsys.readouterr().err
    run(image_folder, tmp_path / "given", accumulate=4)
    first, second = (metrics(tmp_path / name) for name in ("little", "given"))
    assert [line["loss"] for line in first] == [line["loss"] for line in second]
    weights = [(tmp_path / name / "encoder.safetensors").read_bytes() for name in ("little", "given")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("batch_size", "parts"), [(16, 16), (9, 9), (6, 6)])
def test_where_not_even_the_smallest_part_fits(image_folder, tmp_path, batch_size, parts):
    with pytest.raises(ValueError, match=rf"out of memory with {batch_size // parts} image.*--accumulate {parts}\)"):
        run(image_folder, tmp_path / "run", limit=0, batch_size=batch_size)


def test_later_it_is_an_error_and_the_state_is_saved(image_folder, tmp_path):
    """After the first steps nothing new is needed: it is a leak, or another program."""
    with pytest.raises(torch.OutOfMemoryError):
        run(image_folder, tmp_path / "run", limit=4, first_step=4)
    assert run(image_folder, tmp_path / "run").step == 6
