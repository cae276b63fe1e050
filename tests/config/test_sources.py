"""Sources with weights: what is a path and what a weight, and which weights are refused."""

import os

import pytest

from dmjd.config.plan import PlanConfig
from dmjd.config.pretrain import PretrainConfig
from dmjd.config.resuming import resume_differences
from dmjd.config.sources import GivenSource, check_sources, check_whole, given_sources, overlapping, stored_data


@pytest.mark.parametrize(
    ("text", "data", "weight"),
    [
        ("B", "B", None),
        ("B:0.3", "B", 0.3),
        ("B:.3", "B", 0.3),
        ("B:1e-3", "B", 1e-3),
        ("my images/B é:0.3", "my images/B é", 0.3),
        (r"C:\images", r"C:\images", None),
        (r"C:\images:0.3", r"C:\images", 0.3),
        ("C:/images", "C:/images", None),
        ("hf://user/set", "hf://user/set", None),
        ("hf://user/set:0.3", "hf://user/set", 0.3),
        ("B:x", "B:x", None),
        ("B:", "B:", None),
        (":0.3", ":0.3", None),
        ("a:0.3:0.5", "a:0.3", 0.5),
        ("list.txt:-1", "list.txt", -1.0),
    ],
)
def test_weights_and_paths(text, data, weight):
    assert given_sources([text, "other"])[0] == (data, weight)


def test_a_folder_in_another_is_noticed(tmp_path):
    for name in ("set/part", "sets"):
        (tmp_path / name).mkdir(parents=True)
    whole, part, other = (str(tmp_path / name) for name in ("set", "set/part", "sets"))
    for given in ([whole, part], [f"{part}:0.5", f"{whole}/:0.5"]):
        assert overlapping(given_sources(given)).startswith(f"--data: {part} lies in {whole}")
    assert overlapping(given_sources([whole, other, "digits", f"{whole}.csv"])) is None


def test_an_existing_path_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("a:0.3")
    assert given_sources(["a:0.3", "b:0.3"]) == [("a:0.3", None), ("b", 0.3)]
    kept = given_sources(["a:0.3", "b:0.3"])[0].text  # as a run stores it
    os.rmdir("a:0.3")
    assert given_sources([kept]) == [(kept, None)]


@pytest.mark.parametrize("text", ["0", "-0.3", "nan", "inf", "1.5", "1e-12"])
def test_weights_that_are_no_shares(text):
    with pytest.raises(ValueError, match="the weight of B in --data must be a share of the samples") as error:
        check_sources(given_sources(["A", f"B:{text}"]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["A:0.7", "B:0.7"], "the weights of --data sum to 1.4: they are shares"),
        (["A:1", "B:1"], "the weights of --data sum to 2"),
        (["A:1", "B"], "sum to 1, which leaves no samples for B"),
        (["A:0.6", "B:0.6", "C"], "sum to 1.2, which leaves no samples for C"),
        (["A", "A:0.3"], "--data names A twice"),
        (["A:0.5"], "--data A is a single set"),
    ],
)
def test_mixtures_that_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        check_sources(given_sources(given))


def test_the_same_folder_by_another_path(tmp_path):
    (tmp_path / "A").mkdir()
    (tmp_path / "B").symlink_to("A")
    with pytest.raises(ValueError, match="twice"):
        check_sources([GivenSource(str(tmp_path / "A")), GivenSource(str(tmp_path / "B"))])


def test_weights_that_do_not_sum_to_one_are_told():
    assert check_sources(given_sources(["A:0.5", "B:0.5"])) is None
    assert check_sources(given_sources(["A", "B:0.5"])) is None
    for given in (["A:0.333", "B:0.333", "C:0.333"], ["A:0.335", "B:0.333", "C:0.334"]):
        assert "not 1: each is divided by that" in check_sources(given_sources(given))


def test_a_config_holds_one_text_or_several():
    one, several = PretrainConfig(data=["A"]), PretrainConfig(data=["A", "B:0.3"])
    assert one == PretrainConfig(data="A") == PretrainConfig(data=("A",))
    assert several.data == ("A", "B:0.3")
    for config in (one, several):
        assert PretrainConfig.from_json(config.to_json()) == config
    assert PlanConfig(data=["A", "B"]).data == ("A", "B")
    for wrong in ([], [""], ["A", 3], 3):
        with pytest.raises(ValueError, match="data must"):
            PretrainConfig(data=wrong)


@pytest.mark.parametrize(
    ("old", "new", "kept"),
    [
        ("A", "B", True),  # the images are compared
        (["A", "B:0.3"], ["C", "D:0.3"], True),
        (["A", "B:0.3"], ["A", "B:0.30"], True),
        (["A", "B:0.3"], ["A", "B:0.4"], False),
        (["A", "B:0.3"], ["A", "B"], False),
        (["A", "B"], ["B", "A"], False),
        ("A", ["A", "B"], False),
        (["A", "B"], ["A", "B", "C"], False),
    ],
)
def test_what_a_resumed_run_must_keep(old, new, kept):
    lines = resume_differences(PretrainConfig(data=old), PretrainConfig(data=new))
    assert bool(lines) != kept
    assert all(line.startswith("data: A") and "->" in line for line in lines)


def test_shards_that_a_shell_listed():
    """`a/*.tar` without quotes: a few may be meant as sets of their own."""
    shards = [f"a/{i:02}.tar" for i in range(9)]
    assert check_sources(given_sources(shards[:8])) is None
    with pytest.raises(ValueError, match=r"9 shards would be as many sets: quote .*'a/\*\.tar'"):
        check_sources(given_sources(shards))


def test_stored_addresses_lack_passwords_and_signatures():
    data = ("https://bob:x@host/a.csv:0.3", "https://host/b.csv?sig=x:0.2", "https://host/c.csv", "s3://b/d?.tar")
    stored = ("https://bob:...@host/a.csv:0.3", "https://host/b.csv?...:0.2", *data[2:])
    assert stored_data(data) == stored_data(stored) == stored
    assert [stored_data(one) for one in (None, "a?b=c", data[2])] == [None, "a?b=c", data[2]]
    for address in ("https://bob:...@host/a.csv", "https://host/b.csv?..."):
        with pytest.raises(ValueError, match=r"the whole address of https://.*\.csv is not known"):
            check_whole(address)
    check_whole(data[2])
