"""The Hugging Face hub without a network: only the cache is searched, at once.

The clients would try again for up to a minute, with a message for each try.
"""

import contextlib
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator

import huggingface_hub.constants as hub

CONNECT_SECONDS = 5.0


@contextlib.contextmanager
def offline_if_unreachable() -> Iterator[bool]:
    """Search only the cache if the hub cannot be reached; yields whether it can be. Working downloads are the same."""
    datasets = sys.modules.get("datasets")  # slow to import; it has a copy of the setting
    settings = [(hub, hub.HF_HUB_OFFLINE)] + ([(datasets.config, datasets.config.HF_HUB_OFFLINE)] if datasets else [])
    reachable = not hub.HF_HUB_OFFLINE and _reachable(hub.ENDPOINT)
    for module, before in settings:
        module.HF_HUB_OFFLINE = before or not reachable
    try:
        yield reachable
    finally:
        for module, before in settings:
            module.HF_HUB_OFFLINE = before


def _reachable(endpoint: str) -> bool:
    """Whether the host takes a connection. A proxy may reach it where this machine cannot."""
    if urllib.request.getproxies():
        return True
    url = urllib.parse.urlsplit(endpoint)
    try:
        with socket.create_connection((url.hostname or "", url.port or 443), timeout=CONNECT_SECONDS):
            return True
    except (OSError, ValueError):
        return False
