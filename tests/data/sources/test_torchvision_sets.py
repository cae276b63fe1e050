"""Sets that torchvision downloads."""

import pytest

from dmjd.data.sources.registry import open_source


def test_named_set_without_a_network(monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(ValueError, match=r"cifar10 can't be loaded from .* or downloaded .*check the network"):
        open_source("cifar10")
