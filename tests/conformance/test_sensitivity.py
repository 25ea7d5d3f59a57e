"""The laws on other settings of SPT than the defaults: modules of either kind, modules alone, dense entries, other layers."""

from __future__ import annotations

import pytest
from case import Case
from laws import LAWS, OF_WEIGHTS, declared, refused

SETTINGS = {
    "spt(r=1, alpha=100, budget=0.1)": "vit",
    "spt(r=1, alpha=100, budget=0.1, structured_type='adapter')": "llama",
    "spt(r=2, alpha=1000, budget=0.2, structured_only=True)": "gpt2",
    "spt(alpha=0.01, budget=0.3, structured_vector=False)": "bert",
    "spt(tau=300, r=2, targets='conv1 conv2 norm')": "convnet",
    "spt(r=1, alpha=20, budget=0.05)": "encoder",
}


@pytest.mark.parametrize("law", OF_WEIGHTS)
@pytest.mark.parametrize("spec", SETTINGS)
def test_setting(spec: str, law: str, seed: int) -> None:
    case = Case.of(spec, seed, SETTINGS[spec])
    reason = declared(case, law)
    if reason is None:
        LAWS[law](case)
    else:
        refused(case, law, reason)
