"""The recipe on made satellite series: what the shift of region and year costs, and what adapting gives back.

Run with `pytest -m slow tests/slow -s`; the base is pretrained the first time, in a minute or two.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from veneer.tasks.phenology import SOURCE, phenology
from veneer.tasks.task import prepare
from veneer.train import Recipe, train
from veneer.train.use import measure

pytestmark = pytest.mark.slow

RECIPE = Path(__file__).parents[2] / "recipes" / "winter-wheat.yaml"


def test_adapting_makes_up_for_the_shift(tmp_path: Path) -> None:
    task, _ = prepare(phenology(SOURCE, sizes=(2, 2, 64)))
    model, processor = task.load("tsvit-phenology")
    at_home = measure(model, processor, task).metrics["mean_f1"]
    found = {}
    for name, method in {"adapted": Recipe.read(RECIPE).method, "head alone": "probe"}.items():
        found[name] = train(Recipe.read(RECIPE, {"method": method, "out": str(tmp_path / name)}), progress=False)
        print(f"{name}: {found[name].metrics['mean_f1']}")
    untouched, adapted = found["adapted"].base_metrics["mean_f1"], found["adapted"].metrics["mean_f1"]
    print(f"region A, 2019: {at_home}; region B, 2020, untouched: {untouched}")
    assert untouched.high < at_home.low, "the shift shows"
    assert adapted.low > untouched.high, "adapting makes up for it"
    assert adapted.value > found["head alone"].metrics["mean_f1"].value, "more than the head has to change"
