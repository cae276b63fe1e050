"""Without a network the hub's cache is searched at once, and the error says so in one line."""

import socket
import time

import datasets
import huggingface_hub.constants as hub
import pytest

from dmjd.hub import offline_if_unreachable
from dmjd.targets.teacher import load_teacher


@pytest.fixture
def endpoint(monkeypatch):
    """Set another endpoint of the hub, without proxies."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return lambda url: monkeypatch.setattr(hub, "ENDPOINT", url)


def test_a_host_that_answers_is_used_as_before(endpoint):
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint(f"http://127.0.0.1:{server.getsockname()[1]}")
        with offline_if_unreachable() as reachable:
            assert reachable
            assert not hub.HF_HUB_OFFLINE


@pytest.mark.parametrize("url", ["https://no-such-host.invalid", "http://127.0.0.1:9", "https://"])
def test_a_host_that_does_not_answer_is_not_asked_again(endpoint, url):
    endpoint(url)

    def failing() -> None:
        with offline_if_unreachable() as reachable:
            assert not reachable
            assert hub.HF_HUB_OFFLINE
            assert datasets.config.HF_HUB_OFFLINE
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert not hub.HF_HUB_OFFLINE
    assert not datasets.config.HF_HUB_OFFLINE


def test_an_offline_teacher_is_one_line_within_seconds(endpoint, tmp_path, monkeypatch, capfd):
    endpoint("https://no-such-host.invalid")
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    started = time.perf_counter()
    with pytest.raises(ValueError, match="cannot be reached, and they are not in its cache") as refused:
        load_teacher("vit_tiny_patch16_224")
    assert time.perf_counter() - started < 10
    message = str(refused.value)
    assert "\n" not in message
    assert all(part in message for part in ("vit_tiny_patch16_224", str(tmp_path), "--teacher local-dir:FOLDER"))
    assert capfd.readouterr().err == ""
