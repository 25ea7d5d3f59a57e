"""Options and reports of the whole suite: one seed a run, and the method × feature table that the conformance suite writes."""

from __future__ import annotations

import importlib.util
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

if importlib.util.find_spec("triton"):
    import torch

    if not torch.cuda.is_available():  # before anything imports triton: its kernels then run interpreted
        os.environ.setdefault("TRITON_INTERPRET", "1")

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
_pairs: dict[str, dict[str, bool | str]] = {}
_features: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    for name, value in report.user_properties:
        if name == "cell" and report.when == "call":
            cell: Any = value
            slug, feature, held = cell
            _cells.setdefault(slug, {})[feature] = held if report.passed else False
        elif name == "pair" and report.when == "call":
            pair: Any = value
            strategy, method, held = pair
            _pairs.setdefault(strategy, {})[method] = held if report.passed else False
        elif name == "features" and not _features:
            _features.extend(value)  # type: ignore[arg-type]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not session.config.getoption("--write-matrix") or hasattr(session.config, "workerinput") or not (_cells or _pairs):
        return
    old: dict[str, Any] = json.loads(MATRIX.read_text("utf-8")) if MATRIX.exists() else {}
    families, features = _known_methods(), _features or old.get("features", [])
    methods = [slug for slug in families if families[slug] != "strategy"]
    table = {
        "features": features,
        "methods": _merged(old.get("methods", {}), _cells, methods, features),
        "strategies": _merged(old.get("strategies", {}), _pairs, [slug for slug in families if slug not in methods], methods),
    }
    MATRIX.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _merged(old: dict[str, Any], new: dict[str, Any], rows: list[str], columns: list[str]) -> dict[str, dict[str, bool | str]]:
    """The cells of old runs and of this one, rows by name, columns in their order; what is no more falls out."""
    found = {row: {**old.get(row, {}), **new.get(row, {})} for row in sorted({*old, *new} & set(rows))}
    return {row: {column: cells[column] for column in columns if column in cells} for row, cells in found.items()}


def _known_methods() -> dict[str, str]:
    """Slug → family of every method there is."""
    import veneer

    return {card.slug: card.family for card in veneer.methods()}


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if terminalreporter.stats.get("failed"):
        terminalreporter.write_line(f"Random numbers came from VENEER_SEED={os.environ['VENEER_SEED']}.")
