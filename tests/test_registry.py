"""The registry: methods are known by name, with their ranges, before torch is imported."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from veneer import registry
from veneer.errors import BadFile, BadValue, UnknownName

ALL = registry.methods()
SLUGS = [c.slug for c in ALL]

THIRD_PARTY = '''"""Twice: the weight times a trained number (2024, arXiv:2401.00001)."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.method import Params, WeightMethod
from veneer.option import option


@dataclass(frozen=True)
class TwiceOver(WeightMethod):
    """W_eff = s · W

    An example.

    Args:
        start: first value of s.
    """

    start: float = option(1.0, "first value of s", gt=0, le=2)
    mode: str = option("plain", "how", choices=("plain", "fancy"))
    aliases = {"scale": "start"}
    limits = {"merge": "an example of a reason"}

    def weight(self, W, p, site=None):
        return W * p["s"]
'''


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installed package that offers a method; its __init__ must not run before the method is used."""
    package = tmp_path / "some_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported too early')")
    (package / "twice_over.py").write_text(THIRD_PARTY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_offered", lambda: ["some_package.twice_over"])
    _forget()
    yield "twice-over"
    monkeypatch.undo()
    _forget()


def _forget() -> None:
    registry._places.cache_clear()
    registry._read.cache_clear()


@pytest.mark.parametrize("slug", SLUGS)
def test_card_agrees_with_the_class(slug: str) -> None:
    card, cls = registry.card(slug), registry.load(slug)
    assert card.class_name == cls.__name__ and cls.slug == slug
    fields = {f.name: f for f in dataclasses.fields(cls)}
    assert {o.name for o in card.options} == set(fields)
    for option in card.options:
        assert option.default == fields[option.name].default
        limits = {k: v for k, v in fields[option.name].metadata.items() if k != "help"}
        assert dict(option.limits) == limits
    assert dict(card.aliases) == dict(cls.aliases)
    assert set(card.aliases.values()) <= set(fields)


@pytest.mark.parametrize("slug", SLUGS)
def test_card_is_complete(slug: str) -> None:
    card = registry.card(slug)
    assert card.family in registry.FAMILIES and card.title and card.summary and card.formula
    assert all(o.help for o in card.options)
    assert str(card).startswith(slug) and "\n" not in str(card)


@pytest.mark.parametrize("slug", SLUGS)
def test_defaults_are_legal_and_specs_round_trip(slug: str) -> None:
    card = registry.card(slug)
    checked = registry.check_options(slug, {o.name: o.default for o in card.options if o.default is not None})
    method = registry.method(slug, **checked)
    assert method.spec == slug


def test_methods_are_sorted_by_family_then_slug() -> None:
    order = [(registry.FAMILIES.index(c.family), c.slug) for c in ALL]
    assert order == sorted(order)


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, veneer; veneer.methods(); veneer.registry.check_options('lora', {'r': 4}); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "transformers", "rich", "typer"} & set(loaded)


def test_unknown_method_offers_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"no method 'lorra'.*'lora'"):
        registry.card("lorra")


def test_underscores_and_capitals_are_forgiven() -> None:
    for slug in SLUGS:
        assert registry.card(slug.replace("-", "_").upper()).slug == slug


def test_third_party_methods_are_read_without_importing(third_party: str) -> None:
    card = registry.card(third_party)
    assert (card.family, card.title, card.year, card.arxiv) == ("weight", "Twice", 2024, "2401.00001")
    assert card.summary == "the weight times a trained number" and card.formula == "W_eff = s · W" and card.text == "An example."
    assert [o.name for o in card.options] == ["start", "mode", "targets", "leave_out"]
    assert card.limits == {"merge": "an example of a reason"}
    assert third_party in registry.cards()


def test_options_are_checked(third_party: str) -> None:
    assert registry.check_options(third_party, {"scale": 2, "leave_out": [0, 1]}) == {"start": 2, "leave_out": (0, 1)}
    with pytest.raises(UnknownName, match=r"TwiceOver has no option 'strat'. Nearest: 'start'"):
        registry.check_options(third_party, {"strat": 1})
    with pytest.raises(BadValue, match=r"start=3 is out of range; it must be more than 0 and at most 2"):
        registry.check_options(third_party, {"start": 3})
    with pytest.raises(BadValue, match=r"mode='odd' is not one of 'plain', 'fancy'"):
        registry.check_options(third_party, {"mode": "odd"})
    with pytest.raises(BadValue, match=r"start is given twice"):
        registry.check_options(third_party, {"start": 1, "scale": 1})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("gt=0", "gt=float('0')", "option 'start' must have literal arguments"),
        ("class TwiceOver", "class _TwiceOver", "one public dataclass; found none"),
        ("@dataclass", "@dataclass(", "not a Python file"),
    ],
)
def test_a_method_file_that_cannot_be_read_says_where(third_party: str, old: str, new: str, message: str) -> None:
    path = registry._places()[third_party].path
    path.write_text(path.read_text().replace(old, new, 1))
    for cached in (registry._tree, registry._classes, registry._imports):
        cached.cache_clear()
    with pytest.raises(BadFile, match=f"twice_over.py.*{message}"):
        registry.card(third_party)


def test_a_class_of_the_users_own_can_be_registered() -> None:
    from veneer.method import WeightMethod
    from veneer.option import option
    from veneer.spec import parse

    try:

        @registry.register
        @dataclasses.dataclass(frozen=True)
        class Halved(WeightMethod):
            """W_eff = s · W / 2"""

            start: float = option(1.0, "first value of s", gt=0)

        method = parse("halved(start=0.5)")
        assert isinstance(method, Halved) and method.spec == "halved(start=0.5)"
        assert registry.card("halved").family == "weight" and registry.card("halved").formula == "W_eff = s · W / 2"
        with pytest.raises(BadValue, match="start=-1"):
            parse("halved(start=-1)")
        with pytest.raises(BadValue, match="there is a method 'lora' already"):
            registry.register(Halved, slug="lora")
    finally:
        registry._registered.clear()
