"""Names from outside, made safe to print."""

import pytest
from hostile_names import NAMES
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from dmjd.text import drawable, file_name, printable, shortened, without_secrets


def test_control_characters_are_shown():
    assert printable("a\x1b[31mred\x07\n") == "a\\x1b[31mred\\x07\\n"
    assert printable("two\nlines\x1b", keep="\n") == "two\nlines\\x1b"


def test_bytes_of_a_file_name_are_shown():
    assert printable(b"caf\xe9.png".decode("utf-8", "surrogateescape")) == "caf\\udce9.png"


def test_other_names_stay():
    for name in ("été 1.png", "猫", "[lr=1e-3]", "$x_1$", "a\\b"):
        assert printable(name) == name


def test_right_to_left_marks_are_shown():
    assert printable("photo\u202egnp.exe") == "photo\\u202egnp.exe"


@given(st.text(st.characters()))
def test_the_result_can_be_encoded_and_has_one_line(text):
    shown = printable(text)
    assert shown.encode("utf-8") is not None
    assert len(shown.splitlines()) <= 1
    assert printable(shown) == shown


@pytest.mark.parametrize("name", NAMES)
def test_any_name_can_be_drawn(name):
    """Matplotlib shows the name itself: no formula, no character that it cannot encode."""
    figure = Figure(figsize=(1, 1))
    text = figure.text(0, 0, drawable(name))
    shown, is_formula = text._preprocess_math(text.get_text())
    assert not is_formula
    assert shown.removeprefix(" ") == shortened(name, 60).removeprefix(" ")
    assert len(shown) <= 61
    assert not drawable(name).startswith("_")


@pytest.mark.parametrize("name", NAMES)
def test_any_name_can_be_part_of_a_file_name(tmp_path, name):
    (tmp_path / file_name(name)).write_text("")
    assert len(list(tmp_path.iterdir())) == 1


def test_long_names_are_shortened():
    assert shortened("a" * 9, 8) == "aaaaaaa…"
    assert shortened("a" * 8, 8) == "a" * 8


def test_addresses_are_shown_without_secrets():
    assert without_secrets("nothing: a@b") == "nothing: a@b"
    text = "https://bob:p@ss@host:80/a.csv?s=x%2B/y=&t=1, which HTTPS://host/b?c. See s3://k:x@b/c: and http://h/d?e: f"
    shown = "https://bob:...@host:80/a.csv, which HTTPS://host/b. See s3://k:...@b/c: and http://h/d: f"
    assert (without_secrets(text), printable(text)) == (shown, shown)
