"""The laws on other settings of trained slices than the defaults: rows, whole heads, fused layers, scores, differences."""

from __future__ import annotations

import pytest
from case import Case
from laws import LAWS, OF_WEIGHTS

SETTINGS = {
    "paca(r=5, alpha=7)": "gpt2",
    "paca(r=3, form='difference', alpha=6)": "llama",
    "paca(r=3, selection='weight', smallest=True)": "bert",
    "s2ft(v=0.5, o=0.25, u=0.1, d=0.1)": "llama",
    "s2ft(v=0.5, o=0.25, u=0.1, d=0.1, seed=3)": "gpt2",
    "s2ft(v=0.3, o=0, u=0.2, d=0, selection='weight')": "encoder",
    "paca(r=3, selection='gradient')": "bert",
    "s2ft(v=0.5, o=0.25, u=0.1, d=0.1, selection='gradient')": "encoder",
}


@pytest.mark.parametrize("law", OF_WEIGHTS)
@pytest.mark.parametrize("spec", SETTINGS)
def test_setting(spec: str, law: str, seed: int) -> None:
    case = Case.of(spec, seed, SETTINGS[spec])
    LAWS[law](case)
