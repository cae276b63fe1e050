"""Every target takes batches of any size and memory layout, also a single image, with the same values."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import TINY_FIELDS
from tiny_models import SIZES

from dmjd import bench, create_encoder, pretrain, recipes
from dmjd.branches import Distillation, Reconstruction
from dmjd.data.sources.registry import open_source
from dmjd.data.train_loader import TrainLoader
from dmjd.encoders.base import Encoder
from dmjd.images.preprocess import Preprocess
from dmjd.masking import DisjointMasks
from dmjd.model import MaskedImageModel
from dmjd.targets.hog import hog
from dmjd.targets.registry import TARGETS, create_target

SIZE = (16, 32)

FAMILIES = list(SIZES)


def encoder_of(name: str, channels: int) -> Encoder:
    torch.manual_seed(0)
    encoder = create_encoder(name, SIZE, channels, **SIZES[name])
    encoder.preprocess = Preprocess(SIZE, channels, (0.4,) * channels, (0.2,) * channels)
    return encoder


def layouts(raw: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values in other memory layouts."""
    return {
        "channels first": raw.contiguous(),
        "channels last": raw.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        "columns first": raw.transpose(2, 3).contiguous().transpose(2, 3),
        "a part of a larger image": torch.nn.functional.pad(raw, (3, 2, 1, 4))[..., 1:-4, 3:-2],
    }


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("target", TARGETS)
def test_targets_do_not_depend_on_layout_and_batch_size(target, name, channels, dtype):
    encoder = encoder_of(name, channels)
    settings: dict[str, Any] = {"source": encoder_of(name, channels)} if target == "teacher" else {}
    compute = create_target(target, encoder, **settings)
    generator = torch.Generator().manual_seed(1)
    raw = torch.randint(0, 256, (4, channels, *SIZE), generator=generator, dtype=torch.uint8).to(dtype)
    assert encoder.preprocess is not None
    with torch.no_grad():
        expected = compute(encoder.preprocess.normalize(raw), raw)
        for count in (1, 2, 4):
            for layout, images in layouts(raw[:count]).items():
                actual = compute(encoder.preprocess.normalize(images), images)
                torch.testing.assert_close(actual, expected[:count], atol=1e-4, rtol=1e-4, msg=f"{count}, {layout}")


@pytest.mark.parametrize("channels", [1, 3])
def test_hog_of_any_layout_has_the_same_bits(channels):
    raw = torch.randint(0, 256, (3, channels, *SIZE), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    expected = hog(raw, 4)
    for count in (1, 2, 3):
        for layout, images in layouts(raw[:count]).items():
            assert torch.equal(hog(images, 4), expected[:count]), (count, layout)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_trains_on_one_image(name, channels):
    encoder = encoder_of(name, channels)
    small = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}
    branches = Reconstruction(target="hog", **small), Distillation(target="pixel", projector_dim=32)
    model = MaskedImageModel(encoder, masks=DisjointMasks(block_size=1), mim=branches[0], vis=branches[1])
    raw = torch.randint(0, 256, (2, channels, *SIZE), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    keys = torch.tensor([3, 5])
    assert encoder.preprocess is not None
    losses = []
    for images, own in [(raw, keys), *(((x, keys[:1])) for x in layouts(raw[:1]).values())]:
        loss = model(encoder.preprocess.normalize(images), images, keys=own)["loss"]
        loss.backward()
        losses.append(loss.item())
    assert all(np.isfinite(losses))
    assert losses[1:] == pytest.approx([losses[1]] * 4, rel=1e-5)


@pytest.fixture(scope="module", params=["one size", "many sizes"])
def images(request, tmp_path_factory) -> Path:
    """A folder of four images, which is held in memory if they have one size."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("images")
    for i in range(4):
        height = 40 if request.param == "one size" else 40 + i
        Image.fromarray(rng.integers(0, 256, (height, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("channels", [1, 3])
def test_one_image_from_every_loader_path(images, channels, num_workers):
    """Micro-batches of one image have the same targets as those of two."""
    source = open_source(images, in_chans=channels)
    features = []
    for accumulate in (1, 2):
        loader = TrainLoader(
            source, img_size=SIZE, batch_size=2, accumulate=accumulate, num_workers=num_workers, seed=3
        )
        with contextlib.closing(loader.batches()) as batches:
            taken = [next(batches).images for _ in range(2 * accumulate)]
        features.append([hog(x, 4) for x in taken])
    assert [len(x) for x in features[1]] == [1, 1, 1, 1]
    assert torch.equal(torch.cat(features[0]), torch.cat(features[1]))


def test_training_with_one_image_per_micro_batch(images, tmp_path):
    fields = TINY_FIELDS | {"data": images, "steps": 1, "img_size": (16, 32), "num_workers": 0}
    loss = {}
    for accumulate in (1, 2):
        config = recipes.dmjd(out=tmp_path / str(accumulate), batch_size=2, accumulate=accumulate, **fields)
        loss[accumulate] = pretrain(config).metrics["loss"]
    assert loss[2] == pytest.approx(loss[1], rel=1e-5)


def test_bench_with_one_image():
    config = recipes.digits(batch_size=1, embed_dim=16, depth=1, num_heads=2)
    assert bench(config, 1)["images_per_s"]["with_loader"] > 0
