"""The laws on other settings than the defaults: methods for point clouds where those take another path, and others on points."""

from __future__ import annotations

import pytest
from case import Case
from laws import LAWS, declared

SETTINGS = {
    "point-peft(L=4, D_p=1, k=4, m=3, inner=4, heads=2, skip_best=True, pooling='max+mean')": "points",
    "point-peft(L=3, D_p=2, k=4, m=3, leave_out=(1,))": "points",
    "point-peft(prior=False, L=3, k=2, m=3)": "vit",
    "dapt(r=3, exact_start=True)": "points",
    "dapt(r=3, targets='mlp mlp.down norm.mlp')": "llama",
    "ladder-side-tuning(w=4, heads=2)": "points",
    "ssf": "points",
    "full": "points",
}

SEEDS = {"dapt(r=3, exact_start=True)": 1}
"""Where chance may leave nothing to see: in so small a model the scale, a ReLU, may be zero for every token."""


@pytest.mark.parametrize("law", ["identity", "step", "gradients", "save", "two", "rows", "disable", "deepcopy", "compile", "ckpt", "bf16"])
@pytest.mark.parametrize("spec", SETTINGS)
def test_setting(spec: str, law: str, seed: int) -> None:
    case = Case.of(spec, SEEDS.get(spec, seed), SETTINGS[spec])
    if declared(case, law) is None:
        LAWS[law](case)
