"""The cache of remote files, in all commands that read images."""

from pathlib import Path

import pytest
from eight_shards import NUM_SHARDS, SHARDS, in_gb
from flaky_server import flaky_server
from support import TINY, mistake

from dmjd.cli.main import main
from dmjd.config.plan import PlanConfig
from dmjd.pretraining.plan import command_of
from dmjd.pretraining.plan_choices import choose_start

pytest.importorskip("aiohttp")


@pytest.fixture(scope="module")
def url():
    with flaky_server() as server:
        server.files = dict(SHARDS)
        yield f"{server.url}/set/{{0..{NUM_SHARDS - 1}}}.tar"


@pytest.fixture(scope="module")
def run(url, tmp_path_factory):
    """A run on images that are on the disk."""
    folder = tmp_path_factory.mktemp("run")
    for path, content in SHARDS.items():
        (folder / path[5:]).write_bytes(content)
    command = ["pretrain", "--data", folder, *TINY, "--batch-size", 4, "--steps", 1, "--out", folder / "run"]
    assert main([str(a) for a in command]) == 0
    return folder / "run"


@pytest.mark.parametrize(
    "command",
    [
        ["embed", "RUN", "--out", "OUT/a.parquet", "--data", "URL", "--num-workers", "0"],
        ["show", "neighbors", "RUN", "--out", "OUT/a.png", "--data", "URL"],
        ["evaluate", "knn", "RUN", "--labels", "column", "--test-data", "URL", "--data", "URL", "--num-workers", "0"],
        ["inspect", "URL", "--sample", "4", "--num-workers", "0"],
    ],
    ids=lambda command: command[0],
)
def test_commands_read_through_a_bounded_cache(url, run, tmp_path, monkeypatch, command, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    places = {"RUN": str(run), "URL": url}
    words = [places.get(word, word).replace("OUT", str(tmp_path)) for word in command]
    assert main([*words, "--cache-dir", str(tmp_path / "cache"), "--cache-gb", f"{in_gb(2.5):.9f}"]) == 0
    shards = list((tmp_path / "cache" / "bounded").rglob("*.tar"))
    assert 0 < sum(path.stat().st_size for path in shards) <= 2.5e9 * in_gb(1)
    assert not (Path(tmp_path) / "user" / "dmjd" / "remote").exists()
    capsys.readouterr()
    assert "--cache-gb must be greater than 0" in mistake(capsys, *words, "--cache-gb", "-1")


def test_a_plan_keeps_the_cache():
    asked = PlanConfig(data="https://host/{0..9}.tar", hours=1, cache_gb=5, cache_dir="/big")
    choices = choose_start(asked)
    config = choices.config(asked, minutes=1)
    assert (config.cache_gb, config.cache_dir) == (5, "/big")
    assert "--cache-dir /big --cache-gb 5" in command_of(choices, asked, config)
