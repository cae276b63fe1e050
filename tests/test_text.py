"""Names from outside, made safe to print."""

from hypothesis import given
from hypothesis import strategies as st

from dmjd.text import printable


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
