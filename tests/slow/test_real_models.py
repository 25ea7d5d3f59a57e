"""The recipes on real models and data, with methods of different kinds; prints a table for benchmarks/RESULTS.md.

Run with `pytest -m slow tests/slow -s`. Skipped, with the install line, where a carrier is missing.
"""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from veneer import assets
from veneer.train import Outcome, Recipe, predict, train

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).parents[2] / "recipes"
METHODS = ("lora(r=8)", "wegeft")
LINES: list[str] = []


def need(*names: str) -> None:
    for name in names:
        if not assets.available(name):
            pytest.skip(f"needs: {assets.INSTALL[name]}")


def trained(name: str, method: str, folder: Path, **changes: object) -> Outcome:
    recipe = Recipe.read(RECIPES / f"{name}.yaml", {"method": method, "out": str(folder / "run"), **changes})
    outcome = train(recipe, progress=False)
    main, base = outcome.metrics["accuracy"], outcome.base_metrics.get("accuracy")
    shown = f"{base.value:.3f}" if base else ""
    LINES.append(
        f"| {name} | {method} | {outcome.trained:,} | {100 * outcome.trained / outcome.total:.2f} | {shown} | "
        f"{main.value:.3f} [{main.low:.3f}, {main.high:.3f}] | {main.n} | {outcome.steps} | {outcome.seconds:.0f} | "
        f"{outcome.peak_memory / 2**20:.0f} | {outcome.adapter_bytes / 1e3:.0f} |"
    )
    return outcome


@pytest.fixture(scope="module", autouse=True)
def table() -> object:
    yield
    print(f"\n\n{platform.machine()}, {platform.system()}\n")
    print("| recipe | method | trained | % | accuracy before | accuracy after, 95 % | test rows | steps | seconds | peak MiB | kB |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    print("\n".join(LINES))


@pytest.mark.parametrize("method", METHODS)
def test_minilm_learns_sentiment(method: str, tmp_path: Path) -> None:
    need("minilm", "movie-sentiment")
    outcome = trained("minilm-sentiment", method, tmp_path)
    assert outcome.metrics["accuracy"].low > 0.72  # a linear probe on frozen sentence embeddings reaches 0.75
    found = predict(outcome.folder, ["A wonderful, moving film.", "A dull and clumsy mess."])
    assert [one["label"] for one in found] == ["positive", "negative"]


@pytest.mark.parametrize("method", METHODS)
def test_smollm2_learns_arithmetic(method: str, tmp_path: Path) -> None:
    need("smollm2", "arithmetic")
    outcome = trained("smollm2-arithmetic", method, tmp_path)
    assert outcome.metrics["loss"].high < outcome.base_metrics["loss"].low
    # The base answers about one problem in sixty; so few steps and rows can show a loss of answers, not a gain.
    assert outcome.metrics["accuracy"].high > outcome.base_metrics["accuracy"].value


@pytest.mark.parametrize("method", METHODS)
def test_dinov2_learns_clothes(method: str, tmp_path: Path) -> None:
    need("dinov2-small", "fashion-mnist")
    outcome = trained("dinov2-fashion", method, tmp_path)
    assert outcome.metrics["accuracy"].low > 0.75
