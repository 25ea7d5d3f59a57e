"""Options and reports of the whole suite: one seed a run, and the method × feature table that the conformance suite writes."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("VENEER_SEED", str(random.randrange(10_000)))

MATRIX = Path(__file__).parents[1] / "veneer" / "matrix.json"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-matrix", action="store_true", help="write the method × feature table to veneer/matrix.json")


@pytest.fixture
def seed() -> int:
    """The seed of this run; VENEER_SEED=… repeats a run."""
    return int(os.environ["VENEER_SEED"])


@pytest.fixture(autouse=True)
def _global_seed(seed: int) -> Iterator[None]:
    """Dropout and other global random numbers are the run's, too."""
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(seed)
    yield


_cells: dict[str, dict[str, bool | str]] = {}
_features: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    for name, value in report.user_properties:
        if name == "cell" and report.when == "call":
            cell: Any = value
            slug, feature, held = cell
            _cells.setdefault(slug, {})[feature] = held if report.passed else False
        elif name == "features" and not _features:
            _features.extend(value)  # type: ignore[arg-type]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not session.config.getoption("--write-matrix") or hasattr(session.config, "workerinput") or not _cells:
        return
    old = json.loads(MATRIX.read_text("utf-8"))["methods"] if MATRIX.exists() else {}
    known = set(_known_methods())
    rows = {slug: {**old.get(slug, {}), **_cells.get(slug, {})} for slug in sorted({*old, *_cells} & known)}
    ordered = {slug: {f: row[f] for f in _features if f in row} for slug, row in rows.items()}
    MATRIX.write_text(json.dumps({"features": _features, "methods": ordered}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _known_methods() -> list[str]:
    import veneer

    return [card.slug for card in veneer.methods()]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if terminalreporter.stats.get("failed"):
        terminalreporter.write_line(f"Random numbers came from VENEER_SEED={os.environ['VENEER_SEED']}.")
