"""Devices, precision, seeds, freed memory, and the private parts of Lightning that are used."""

import os
import resource
import subprocess
import sys

import lightning
import pytest
import torch
from lightning.fabric import Fabric

from dmjd.engine.device import (
    Autocast,
    loss_scaler,
    make_fabric,
    pick_device,
    precision_name,
    seed_device,
    unscale_gradients,
)

LIGHTNING_TRIED = "2.6"  # the version whose private precision plugin was last checked


def test_a_step_is_seeded_as_by_torch():
    seed_device(torch.device("cpu"), 2**63 - 1)
    drawn = torch.rand(5)
    torch.manual_seed(2**63 - 1)
    assert torch.equal(drawn, torch.rand(5))


def test_lightning_still_has_the_private_parts_that_are_used():
    version = f"lightning {lightning.__version__} (tried: {LIGHTNING_TRIED})"
    assert precision_name(make_fabric("cpu", "fp32")) == "fp32", version
    assert precision_name(make_fabric("cpu", "bf16")) == "bf16", version
    assert loss_scaler(make_fabric("cpu", "bf16")) is None, version
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    fabric = Fabric(accelerator="cpu", devices=1, plugins=Autocast("16-mixed", "cpu", scaler))
    assert precision_name(fabric) == "fp16", version
    assert loss_scaler(fabric) is scaler, version


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_divided_by_the_scale_of_the_loss_once(fused):
    weight = torch.nn.Parameter(torch.ones(1))
    raw = torch.optim.SGD([weight], lr=1.0, fused=fused)
    fabric = Fabric(
        accelerator="cpu",
        devices=1,
        plugins=Autocast("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)),
    )
    model, wrapped = fabric.setup(torch.nn.Linear(2, 1), raw)
    for scale in (4.0, 8.0):
        fabric.backward((weight * 3).sum(), model=model)
        assert weight.grad.item() == 3.0 * scale
        unscale_gradients(fabric, raw)
        assert weight.grad.item() == 3.0
        before = weight.item()
        wrapped.step()
        assert weight.item() == before - 3.0
        wrapped.zero_grad()


def test_inputs_are_not_rounded():
    images = torch.full((2,), 254.7)
    assert make_fabric("cpu", "bf16").to_device(images).dtype == torch.float32
    assert Autocast("bf16-mixed", "cpu").convert_input(images) is images


@pytest.mark.parametrize(
    ("device", "precision", "message"),
    [
        ("gpu", "fp32", "device must be auto, cpu, cuda or mps, got 'gpu'"),
        ("cpu", "fp17", "precision must be one of auto, fp32, bf16, fp16, got 'fp17'"),
        ("cpu", "fp16", "fp16 needs a CUDA device"),
    ],
)
def test_errors(device, precision, message):
    with pytest.raises(ValueError, match=message):
        make_fabric(device, precision)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_cuda():
    assert pick_device("auto").type == "cpu"
    with pytest.raises(ValueError, match="no CUDA device is available"):
        pick_device("cuda")


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is one of glibc's")
def test_freed_memory_stays_with_the_process():
    """Tensors of sizes seen before need no new pages; by default every tensor does."""
    program = """
import os, resource, torch
from dmjd.engine.device import keep_freed_memory
def make():
    for i in range(3):
        torch.ones((40 << 20) + i * 1000, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for setting in ("keep", "keep small", "default"):
    if os.fork():  # each setting in a process of its own, without another import of torch
        assert os.wait()[1] == 0
        continue
    if setting != "default":
        assert keep_freed_memory("cpu")
        assert not keep_freed_memory("cuda")
    if setting == "keep small":
        assert keep_freed_memory("cpu", up_to=1 << 21)
    before = make()
    print(make() - before, flush=True)
    os._exit(0)
"""
    environment = os.environ | {
        "THP_MEM_ALLOC_ENABLE": "0",
        "OMP_NUM_THREADS": "1",
    }  # small pages; forks need one thread
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, check=True, env=environment)
    found = dict(zip(("keep", "keep small", "default"), map(int, done.stdout.split()), strict=True))
    pages = 3 * (40 << 20) / resource.getpagesize()
    assert found["keep"] < pages / 4 < pages / 2 < min(found["default"], found["keep small"])
