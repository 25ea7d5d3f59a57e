"""The text-to-image recipes on the small pipeline that is made here: what it has not seen is learned, and the sheet shows it.

Run with `pytest -m slow tests/slow/test_text_to_image.py -s`. Skipped, with the install line, where the pictures are missing.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from veneer import assets
from veneer.train import Recipe, train

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("name", ["text-to-image", "text-to-image-wara", "text-to-image-tlora", "text-to-image-nera"])
def test_a_recipe_lowers_the_loss_on_unseen_pictures(name: str, tmp_path: Path) -> None:
    if not assets.available("tiny-diffusion"):
        pytest.skip(f"needs: {assets.INSTALL['tiny-diffusion']}")
    outcome = train(Recipe.read(RECIPES / f"{name}.yaml", {"out": str(tmp_path / "run"), "sample_steps": 5}), progress=False)
    print(f"{name}: {outcome.base_metrics['loss']} → {outcome.metrics['loss']} with {outcome.trained:,} trained")
    assert outcome.metrics["loss"].high < outcome.base_metrics["loss"].low
    assert (outcome.folder / "contact-sheet.png").is_file()
