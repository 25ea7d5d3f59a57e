"""Generated forgeries on a real vision tower: what is learned of one manipulation, and that others are measured too."""

from __future__ import annotations

from pathlib import Path

import pytest

from veneer import assets
from veneer.train import Recipe, train

pytestmark = pytest.mark.slow


def test_norms_of_dinov2_learn_to_see_twists(tmp_path: Path) -> None:
    for name in ("dinov2-small", "fashion-mnist"):
        if not assets.available(name):
            pytest.skip(f"needs: {assets.INSTALL[name]}")
    recipe = Recipe.read(Path(__file__).parents[2] / "recipes" / "clip-deepfake.yaml", {"out": str(tmp_path / "run")})
    found = train(recipe, progress=False)
    assert found.metrics["auroc"].low > found.base_metrics["auroc"].high
    assert {f"auroc fashion-{kind}" for kind in ("splice", "resample", "compress")} < found.metrics.keys()
