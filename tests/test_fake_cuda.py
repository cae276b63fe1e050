"""The forward pass on a CUDA device that does not exist: tensors have shapes and devices, but no values.

Reading a value, which would wait for the device, raises an error, and so does a tensor that was left on the CPU.
"""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import timm
import torch
from tiny_models import KEYS, tiny_model
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode

from dmjd.data.train_loader import Batch
from dmjd.encoders.classifier import ImageClassifier
from dmjd.encoders.registry import create_encoder
from dmjd.images import preprocess
from dmjd.images.preprocess import Preprocess
from dmjd.images.resampling import resample
from dmjd.pretraining.run import PretrainTask
from dmjd.targets.teacher import TeacherSettings

FAKE = FakeTensorMode(allow_non_fake_inputs=False)  # one for all: tensors of two modes do not mix
BOTH = pytest.mark.parametrize("name", ["vit_tiny_patch8", "conv_vit_tiny_patch8"])


@pytest.fixture(autouse=True)
def no_fake_constants() -> Iterator[None]:
    """Cached constants of the preprocessing are fake in these tests, and only in these."""
    preprocess._per_channel.cache_clear()
    yield
    preprocess._per_channel.cache_clear()


def small_timm_vit() -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    return timm.create_model("vit_tiny_patch16_224", pretrained_cfg_overlay={"input_size": (3, 32, 32)}, **sizes)


def to_fake_cuda(model: nn.Module) -> None:
    """Replace every parameter and buffer by one on a CUDA device; within FakeTensorMode."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                fake = torch.empty(p.shape, dtype=p.dtype, device="cuda")
                module._parameters[name] = nn.Parameter(fake, requires_grad=p.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")


class NoLists(TorchFunctionMode):
    """An error where a tensor is indexed by a list: the index is copied to the device, and the host waits for it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(part, list | np.ndarray) for part in index), "an index that is not a tensor"
        return func(*args, **(kwargs or {}))


class NoDouble(TorchFunctionMode):
    """An error where a float64 tensor is made on the device: Apple's MPS has none."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in (result if isinstance(result, tuple | list) else [result]) if isinstance(x, torch.Tensor)]
        assert not any(x.dtype == torch.float64 and x.device.type == "cuda" for x in tensors), "float64 on the device"
        return result


def run(
    model: nn.Module, channels: int = 3, teacher: nn.Module | None = None, nodata: str | None = None
) -> dict[str, torch.Tensor]:
    """One training pass as the engine runs it: normalization on the device, masks from keys, losses."""
    preprocess = Preprocess((32, 32), channels, (0.5,) * channels, (0.25,) * channels, nodata=nodata)
    normalize = preprocess.normalize
    if nodata is not None:
        model.encoder.preprocess = preprocess
    with FAKE, NoLists(), NoDouble():
        to_fake_cuda(model)
        if teacher is not None:
            to_fake_cuda(teacher)
        kind = torch.uint8 if nodata is None else torch.float32
        raw = torch.empty(4, channels, 32, 32, dtype=kind, device="cuda")
        return model(normalize(raw), raw, keys=torch.empty(4, dtype=torch.int64, device="cuda"))


@BOTH
@pytest.mark.parametrize("nodata", [None, "auto"])
@pytest.mark.parametrize("target", ["hog", "pixel", "ema", "teacher"])
def test_a_training_pass_stays_on_the_device(name, target, nodata):
    teacher = small_timm_vit()  # a model does not register its teacher
    settings = TeacherSettings(teacher) if target == "teacher" else target
    model = tiny_model(name, {"drop_path": 0.5}, mim={"decode_ratio": 0.5}, target=settings).train()
    out = run(model, teacher=teacher, nodata=nodata)
    assert {value.device.type for value in out.values()} == {"cuda"}
    assert out["loss"].requires_grad


@pytest.mark.parametrize("masks", [{"num_views": 1}, {"num_views": 3, "mask_ratio": 0.75, "block_size": 1}])
def test_masks_and_channels_of_other_numbers(masks):
    assert run(tiny_model("vit_tiny_patch8", {"in_chans": 5}, masks=masks), channels=5)["loss"].device.type == "cuda"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_crops_of_images_on_the_device_stay_there(dtype):
    with FAKE, NoLists():
        images = torch.empty(4, 3, 32, 40, dtype=dtype, device="cuda")
        boxes = torch.empty(4, 4, dtype=torch.float64, device="cuda")
        crops = resample(images, boxes, (16, 16), torch.empty(4, dtype=torch.bool, device="cuda"))
    assert (crops.device.type, crops.dtype, tuple(crops.shape)) == ("cuda", dtype, (4, 3, 16, 16))


@BOTH
def test_a_classifier_stays_on_the_device(name):
    encoder = create_encoder(name, img_size=32)
    encoder.preprocess = Preprocess((32, 32))
    model = ImageClassifier(encoder, ["a", "b"], test_crop=1.0)
    with FAKE, NoLists():
        to_fake_cuda(model)
        assert model(torch.empty(2, 3, 32, 32, device="cuda")).device.type == "cuda"


@pytest.mark.parametrize(
    ("name", "target", "nodata"),
    [
        # Slow: the next two have all of it.
        pytest.param("vit_tiny_patch8", "hog", None, marks=pytest.mark.slow),
        ("conv_vit_tiny_patch8", "hog", None),
        ("vit_tiny_patch8", "hog", "auto"),
        ("vit_tiny_patch8", "pixel", "auto"),
    ],
)
def test_a_compiled_step_is_one_graph_without_constant_tensors(name, target, nodata):
    """Constants would be copied to the device, and waited for, in every step; single numbers become arguments.

    ``fullgraph`` fails on graph breaks. Stochastic depth and a subset of masked tokens are drawn inside the graph.
    """
    constants = []

    def look(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        made = [node for node in graph.graph.nodes if node.target is torch.tensor]
        constants.extend(node.args[0] for node in made if not isinstance(node.args[0], int))
        return graph.forward

    model = tiny_model(name, {"drop_path": 0.5}, mim={"decode_ratio": 0.5}, target=target).train()
    model.encoder.preprocess = Preprocess((32, 32), nodata=nodata)
    task = PretrainTask(model, model.encoder.preprocess)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    if nodata is not None:
        images = images.float()
        images[1, :, :20, :12] = torch.nan
    batch = Batch(images, KEYS)
    actual = torch.compile(task, backend=look, fullgraph=True)(batch)
    torch.compiler.reset()
    assert constants == []
    torch.testing.assert_close(actual, task(batch))


def test_reading_a_value_or_leaving_a_tensor_on_the_cpu_is_noticed():
    class Reads(nn.Module):
        def forward(self, images, raw, keys):
            return {"loss": images * float(images.sum())}

    class Leaves(nn.Module):
        def forward(self, images, raw, keys):
            return {"loss": images + torch.arange(32)}

    class Holds(nn.Module):
        table = torch.arange(32)

        def forward(self, images, raw, keys):
            return {"loss": images + self.table}

    class Lists(nn.Module):
        def forward(self, images, raw, keys):
            return {"loss": images[[0, 2]]}

    class Doubles(nn.Module):
        def forward(self, images, raw, keys):
            return {"loss": images.double()}

    with pytest.raises(AssertionError, match="float64"):
        run(Doubles())
    with pytest.raises(DataDependentOutputException):
        run(Reads())
    with pytest.raises(RuntimeError, match="cpu"):
        run(Leaves())
    with pytest.raises(AssertionError, match="FakeTensor"):
        run(Holds())
    with pytest.raises(AssertionError, match="not a tensor"):
        run(Lists())
