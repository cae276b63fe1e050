"""Model cards: names are code, never markup."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmjd.encoders.model_card import code, model_card, usage_lines
from dmjd.encoders.registry import create_encoder

HOSTILE = [
    "<script>alert(1)</script>",
    "a | b | c",
    "`code` ``more``",
    "name\n---\nlicense: mit\n---\n# Title",
    "[x](javascript:alert(1))",
    "![](https://tracker.example/p.png)",
    "x\\",
    "\u202eevil\x1b[31m",
    "",
    "'`",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_shown_as_code(name):
    encoder = create_encoder("vit_tiny_patch8", 16, embed_dim=16, depth=1, num_heads=2)
    plain = model_card(encoder, {"data": "x", "recipe": "x", "init": "x"}, usage_lines(encoder, None))
    card = model_card(encoder, {"data": name, "recipe": name, "init": name}, usage_lines(encoder, None))
    assert card.count("\n") == plain.count("\n")
    assert card.split("---")[1] == plain.split("---")[1]  # the metadata for the hub
    for before, after in zip(plain.splitlines(), card.splitlines(), strict=True):
        assert after == before.replace("`x`", code(name))


@given(st.text())
def test_code_is_one_span_in_one_cell(text):
    shown = code(text)
    fence = re.match("`+", shown)[0]
    inner = shown[len(fence) : -len(fence)]
    assert shown.endswith(fence)
    assert all(len(run) != len(fence) for run in re.findall("`+", inner))
    assert not inner.startswith("`")
    assert not inner.endswith("`")
    assert "\n" not in shown
    assert re.search(r"(?<!\\)\|", shown) is None
    assert inner.strip()
