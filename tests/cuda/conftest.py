"""The device of these tests: a CUDA device, or what DMJD_TEST_DEVICE says."""

import pytest
import torch
from device_runs import DEVICE


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device; tests are skipped on machines that do not have it."""
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; DMJD_TEST_DEVICE=cpu runs the test on the CPU")
    return torch.device(DEVICE)


@pytest.fixture(scope="session")
def card(device) -> torch.device:
    """The device of tests that have no meaning on a CPU."""
    if device.type != "cuda":
        pytest.skip("only a CUDA device has this")
    return device
