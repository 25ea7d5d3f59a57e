"""The segmentation recipe on a real vision transformer, shortened: it learns, and every domain is measured.

Run with `pytest -m slow tests/slow`. Skipped, with the install line, where the carrier is missing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from veneer import assets
from veneer.tasks.shapes import CLASSES, DOMAINS, scene
from veneer.train import Recipe, predict, train

pytestmark = pytest.mark.slow

RECIPE = Path(__file__).parents[2] / "recipes" / "earth-adapter.yaml"


@pytest.mark.parametrize(
    "changes",
    [{"method": "probe"}, {"method": "probe + self-training(start=0.7)", "unlabelled": "artefacts"}],
    ids=["probe", "self-training"],
)
def test_shapes_are_found_in_every_domain(tmp_path: Path, changes: dict[str, str]) -> None:
    if not assets.available("dinov2-small"):
        pytest.skip(f"needs: {assets.INSTALL['dinov2-small']}")
    plan = Recipe.read(RECIPE, {"steps": 60, "lr": 5e-3, "eval_every": 60, "test_rows": 24, "out": str(tmp_path / "run"), **changes})
    found = train(plan, progress=False).metrics
    assert found["clean/mean_iou"].value > 0.25, "to call everything ground gives 0.14"
    assert all(found[f"{domain}/mean_iou"].value > 0.17 for domain in DOMAINS)
    picture, mask = scene((1, 2, 3))
    answer = predict(tmp_path / "run", [picture])[0]
    assert answer["mask"].size == mask.shape and set(answer["scores"]) == set(CLASSES)
    assert (np.array(answer["mask"]) == mask).mean() > 0.6
    assert Image.open(tmp_path / "run" / "predictions.png").width > 400
