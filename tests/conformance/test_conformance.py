"""Every method × every feature: one cell, one test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from case import Case, fitted
from laws import FAMILIES, FEATURES, LAWS, declared, refused

import veneer
from veneer.errors import BadValue, NoMatch, Unsupported

MATRIX = Path(veneer.__file__).with_name("matrix.json")
SLUGS = [card.slug for card in veneer.methods() if card.family != "strategy"]  # those: test_strategies.py


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("slug", SLUGS)
def test_cell(slug: str, feature: str, seed: int, record_property: Callable[[str, Any], None]) -> None:
    """The law holds, or the method declares why it cannot and the library refuses for that reason."""
    case = Case(slug, seed)
    reason = declared(case, feature) or _foreign(slug, feature)
    record_property("features", FEATURES)
    record_property("cell", (slug, feature, reason or True))
    if reason is None:
        LAWS[feature](case)
    elif feature not in FAMILIES:
        refused(case, feature, reason)


def _foreign(slug: str, family: str) -> str | None:
    """Why the method's own targets do not fit a model family."""
    if family not in FAMILIES:
        return None
    try:
        fitted(slug, family)
    except (NoMatch, Unsupported, BadValue) as error:
        return str(error).splitlines()[0]
    return None


def test_the_table_is_current(request: pytest.FixtureRequest) -> None:
    """veneer/matrix.json has a row for every method and a cell for every feature, and no law fails in it."""
    if request.config.getoption("--write-matrix"):
        return  # it is written when the run ends
    table = json.loads(MATRIX.read_text("utf-8"))
    again = "run `pytest tests/conformance --write-matrix`"
    assert table["features"] == list(FEATURES), again
    assert sorted(table["methods"]) == sorted(SLUGS), again
    for slug, row in table["methods"].items():
        assert list(row) == list(FEATURES), f"{slug}: {again}"
        assert all(cell is True or (isinstance(cell, str) and cell) for cell in row.values()), slug
