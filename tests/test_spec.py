"""Specs: what parses, what does not, and that mistakes are shown at their place."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer import registry
from veneer.errors import BadValue, UnknownName, VeneerError
from veneer.spec import parse, parse_spec


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("lora", [("lora", {})]),
        ("lora()", [("lora", {})]),
        (" lora ( r = 4 , ) ", [("lora", {"r": 4})]),
        ("lora(r=8, targets='attn.q attn.v')", [("lora", {"r": 8, "targets": "attn.q attn.v"})]),
        ("lora(targets=attn.q attn.v, r=2)", [("lora", {"targets": "attn.q attn.v", "r": 2})]),
        ('lora(targets="a, (b) + c")', [("lora", {"targets": "a, (b) + c"})]),
        ("lora(start=pissa)", [("lora", {"start": "pissa"})]),
        ("lora(rank=4, lora_alpha=1e1)", [("lora", {"r": 4, "alpha": 10.0})]),
        ("lora(leave_out=(0, 1), rslora=true)", [("lora", {"leave_out": (0, 1), "rslora": True})]),
        ("lora(alpha=None)", [("lora", {"alpha": None})]),
        ("lora(r=2) + lora(r=4)+lora", [("lora", {"r": 2}), ("lora", {"r": 4}), ("lora", {})]),
        ("lora\n+ lora", [("lora", {}), ("lora", {})]),
    ],
)
def test_reads(text: str, parts: list) -> None:
    assert parse_spec(text) == parts


@pytest.mark.parametrize(
    ("text", "kind", "place", "words"),
    [
        ("lorra(r=8)", UnknownName, 0, "Nearest: 'lora'"),
        ("lora + lorra", UnknownName, 7, "Nearest: 'lora'"),
        ("lora(rnk=8)", UnknownName, 5, "Nearest: 'rank'"),
        ("lora(r=0)", BadValue, 7, "at least 1"),
        ("lora(r=8.5)", BadValue, 7, "must be an int"),
        ("lora(start=pisa)", BadValue, 11, "'pissa'"),
        ("lora(r=8 alpha=16)", BadValue, 9, "comma is missing"),
        ("lora(r=8", BadValue, 7, "closing bracket"),
        ("lora(", BadValue, 5, "')'"),
        ("lora(r=", BadValue, 7, "closing bracket"),
        ("lora(r=)", BadValue, 7, "value is missing"),
        ("lora(r)", BadValue, 6, "'=' after 'r'"),
        ("lora(8)", BadValue, 5, "an option of lora"),
        ("lora(targets='attn.q)", BadValue, 13, "quote"),
        ("lora(r=4, rank=8)", BadValue, 10, "given twice"),
        ("lora lora", BadValue, 5, "'+' between methods"),
        ("lora(r=4))", BadValue, 9, "'+' between methods"),
        ("lora +", BadValue, 6, "name of a method"),
        ("+ lora", BadValue, 0, "name of a method"),
        ("lora(r=__import__('os').system('true'))", BadValue, 7, "is not a number"),
        ("lora(r=2**9)", BadValue, 7, "is not a number"),
    ],
)
def test_mistakes_show_their_place(text: str, kind: type[VeneerError], place: int, words: str) -> None:
    with pytest.raises(kind) as caught:
        parse_spec(text)
    message, shown, caret = str(caught.value).split("\n")
    assert words in message
    assert shown.strip() == text.strip() and caret.index("^") - 2 == place


def test_a_long_spec_is_shown_around_the_place() -> None:
    text = " + ".join(["lora(r=8)"] * 40 + ["lora(r=0)"] + ["lora(r=8)"] * 40)
    with pytest.raises(BadValue) as caught:
        parse_spec(text)
    _, shown, caret = str(caught.value).split("\n")
    assert len(shown) <= 102 and shown[caret.index("^") - 2 :].startswith("r=0)")


@pytest.mark.parametrize("text", ["", "  ", None, 3])
def test_nothing_is_not_a_spec(text: object) -> None:
    with pytest.raises(BadValue, match="empty"):
        parse_spec(text)  # type: ignore[arg-type]


@given(st.text(max_size=60) | st.text(alphabet="lora(r=8,)+' .[]{}\"\\\n", max_size=60))
def test_any_text_parses_or_says_why(text: str) -> None:
    try:
        parse_spec(text)
    except VeneerError as error:
        assert len(str(error).split("\n")) <= 3


@pytest.mark.parametrize("slug", [c.slug for c in registry.methods()])
def test_printed_methods_parse_back(slug: str) -> None:
    method = registry.method(slug, leave_out=(1, 2), targets="attn.q")
    assert parse(str(method)) == method


def test_plus_gives_a_stack_in_order() -> None:
    assert [m.slug for m in parse("lora(r=2) + lora(r=4)").parts] == ["lora", "lora"]
    assert str(parse("lora(r=2) + lora(r=4)")) == "lora(r=2) + lora(r=4)"


def test_parsing_imports_no_torch() -> None:
    code = "import sys; from veneer.spec import parse_spec; parse_spec('lora(r=8) + lora'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
