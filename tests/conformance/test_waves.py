"""The laws on other settings than the defaults, where those take another path: wavelets, frequencies, splines, compounds."""

from __future__ import annotations

import pytest
from case import Case
from laws import LAWS, declared

SETTINGS = {
    "wara(form='feature', r=2, wavelet='db2')": "llama",
    "wara(form='weight', r=2, ranks=(2, 1, 0, 1), levels=2, wavelet='db3')": "llama",
    "wara(form='tiny', r=3)": "llama",
    "wara(form='tiny', r=3, coef='diag')": "vit",
    "wara(form='grid', r=2, prefix_tokens=1, prefix_update=True)": "vit",
    "wara(form='grid', r=2, prefix_tokens=1)": "vit",
    "wara(form='grid', r=2, prefix_tokens=1, gains=True, act='tanh')": "vit",
    "wara(form='tiny_grid', r=2, prefix_tokens=1, gains=True, wavelet='db2')": "vit",
    "fourierft(n=1)": "llama",
    "waveft(n=1, targets='mlp.up mlp.down')": "llama",
    "waveft(n=1, use_idwt=False, wavelet='db2', targets='mlp.up')": "llama",
    "waveft(density=0.2, wavelet='db3')": "vit",
    "nera(form='bspline', r=3, G=4, order=2)": "llama",
    "nera(r=2, K=7, exact_identity=False)": "vit",
    "quantum-adapter(N=1, orders=(1, 2, 3), scaling=True)": "llama",
    "quantum-adapter(N=2, P=2, block_share=True)": "llama",
    "quantum-adapter(N=2, P=3, offset=True)": "llama",
    "quantum-adapter(N=2, P=2, orthogonal=False, minors='perm')": "llama",
    "quantum-adapter(N=2, minors='max', start='xavier')": "llama",
}


@pytest.mark.parametrize("law", ["identity", "step", "gradients", "definition", "save", "merge", "rows", "compile", "ckpt", "bf16"])
@pytest.mark.parametrize("spec", SETTINGS)
def test_setting(spec: str, law: str, seed: int) -> None:
    case = Case.of(spec, seed, SETTINGS[spec])
    if declared(case, law) is None:
        LAWS[law](case)
