"""A separate cache for tests that convert tables or download sets."""

import pytest
from archives import three_shards


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """No test writes to the user's cache."""
    import datasets

    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


@pytest.fixture
def shards(tmp_path):
    """A folder with a tar, a stored zip and a deflated one, of 4 images each, with labels."""
    three_shards(tmp_path / "shards")
    return tmp_path / "shards"
