"""The recipe on furniture meshes, with both methods for point clouds. Skipped, with the install line, where the meshes are missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from veneer import assets
from veneer.assets_points import furniture, furniture_parts
from veneer.train import Recipe, train

pytestmark = pytest.mark.slow

RECIPE = Path(__file__).parents[2] / "recipes" / "furniture.yaml"


@pytest.fixture(autouse=True)
def meshes() -> None:
    if not assets.available("furniture"):
        pytest.skip(f"needs: {assets.INSTALL['furniture']}")


def test_the_furniture_is_as_described_and_split_once_for_all() -> None:
    points, categories, _ = furniture()
    assert points.shape == (820, 2048, 3) and len(set(categories)) == 12
    parts = furniture_parts()
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 491, "validation": 83, "test": 246}
    held = [row["points"].tobytes() for rows in parts.values() for row in rows]
    assert len(set(held)) == 820


@pytest.mark.parametrize("method", ["dapt(r=16)", "point-peft"])
def test_furniture_is_told_apart(method: str, tmp_path: Path) -> None:
    recipe = Recipe.read(RECIPE, {"method": method, "out": str(tmp_path / "run"), "steps": 60, "eval_every": 30})
    outcome = train(recipe, progress=False)
    assert outcome.metrics["accuracy"].low > 0.25 > outcome.base_metrics["accuracy"].value  # 18 % are living-room pieces
