"""The Hugging Face hub: files of a repository, and what happens without a network.

Only the cache is searched then, at once. The clients would try again for up to a minute, with a message for each try.
"""

import contextlib
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants as hub
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

from dmjd.config.checks import check_text, shown

HUB = "hf-hub:"  # begins the names of models on the hub, ours and timm's

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


def check_repo(repo: str) -> str:
    """The name of a repository, ``user/name``; ValueError for what cannot be one."""
    try:
        huggingface_hub.utils.validate_repo_id(check_text("the hub's name of an encoder", repo))
    except HFValidationError as error:
        raise ValueError(f"{shown(repo)} cannot be the name of an encoder on the hub: {_reason(error)}") from None
    if repo.count("/") != 1:
        raise ValueError(f"{shown(repo)} is not the name of an encoder on the hub: give user/name")
    return repo


def check_upload(repo: str) -> None:
    """Check before the work that an encoder can be uploaded.

    Raises:
        ValueError: for a wrong name, without a token, or if the hub cannot be reached.
    """
    check_repo(repo)
    if huggingface_hub.get_token() is None:
        raise ValueError(
            f"uploading to {repo} needs a token of {hub.ENDPOINT} that may write: run 'hf auth login', or set HF_TOKEN"
        )
    with offline_if_unreachable() as reachable:
        if not reachable:
            raise ValueError(
                f"could not upload to {repo}: {hub.ENDPOINT} cannot be reached; write the encoder to a folder, and "
                "upload it later"
            )


def download(source: str, names: Sequence[str]) -> Path:
    """Get files of a repository, from the cache if they are there, and return the folder that holds them.

    Args:
        source: ``user/name``, or ``user/name@revision``.
        names: of the files.

    Raises:
        ValueError: in one line that says where was searched.
    """
    repo, _, revision = source.partition("@")
    check_repo(repo)
    with offline_if_unreachable() as reachable:
        try:
            files = [huggingface_hub.hf_hub_download(repo, name, revision=revision or None) for name in names]
        # Networks and caches fail in many ways; all mean that the files are not available.
        except Exception as error:
            reason = _unavailable(error)
            if not reachable:
                reason = f"{hub.ENDPOINT} cannot be reached, and it is not in its cache, {hub.HF_HUB_CACHE}"
            raise ValueError(f"hf-hub:{source} cannot be loaded: {reason}") from None
    return Path(files[0]).parent


def read_remote(repo: str, name: str) -> bytes | None:
    """A file of a repository as it is on the hub now; None if there is none, or no such repository.

    Raises:
        ValueError: if the hub cannot be reached or refuses.
    """
    with _uploading(repo):
        try:
            return Path(huggingface_hub.hf_hub_download(repo, name)).read_bytes()
        except (EntryNotFoundError, RepositoryNotFoundError):
            return None


def upload(repo: str, files: Mapping[str, bytes], private: bool = False) -> str:
    """Write files to a repository, which is created if it does not exist, in one commit; returns its address.

    Raises:
        ValueError: without a token, for a wrong name, or if the hub cannot be reached or refuses.
    """
    api = huggingface_hub.HfApi(endpoint=hub.ENDPOINT)
    operations = [huggingface_hub.CommitOperationAdd(name, content) for name, content in files.items()]
    with _uploading(repo):
        api.create_repo(repo, exist_ok=True, private=private or None)
        api.create_commit(repo, operations, commit_message="Upload encoder")
    return f"{hub.ENDPOINT}/{repo}"


@contextlib.contextmanager
def _uploading(repo: str) -> Iterator[None]:
    """Let errors of an upload be a ValueError that says what to do."""
    check_upload(repo)
    try:
        yield
    except Exception as error:  # as in `download`
        raise ValueError(f"could not upload to {repo}: {_unavailable(error)}") from None


def _unavailable(error: Exception) -> str:
    """Why something on the hub cannot be had."""
    if isinstance(error, RepositoryNotFoundError):
        return f"{hub.ENDPOINT} has no such repository, or HF_TOKEN does not give access to it"
    return f"{type(error).__name__}: {_reason(error)}"


def _reason(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
