"""Captions of real pictures by a real small language model: what 16 image tokens and a few steps teach it."""

from __future__ import annotations

from pathlib import Path

import pytest

from veneer import assets
from veneer.train import Recipe, predict, train

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("method", ["context-peft(r=4)", "lora(r=8, targets='attn.* mlp.*')"])
def test_smollm2_learns_to_caption_clothes(method: str, tmp_path: Path) -> None:
    for name in ("smollm2", "dinov2-small", "fashion-mnist"):
        if not assets.available(name):
            pytest.skip(f"needs: {assets.INSTALL[name]}")
    recipe = Recipe.read(
        Path(__file__).parents[2] / "recipes" / "context-peft-captions.yaml", {"out": str(tmp_path / "run"), "method": method}
    )
    found = train(recipe, progress=False)
    assert found.metrics["loss"].high < 2.0  # the untouched base, which sees noise, is at about 5
    said = predict(found.folder, [assets.fashion_mnist()[2][0]])[0]["caption"]
    assert said.endswith(".") and len(said.split()) > 5
