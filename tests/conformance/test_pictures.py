"""The laws on other settings than the defaults: adapters of image and music models where those take another path."""

from __future__ import annotations

import functools

import pytest
from case import Case
from laws import LAWS, declared
from tiny import ROWS, SUBJECTS, Subject, vit
from torch import empty

SUBJECTS.setdefault(
    "picture",
    Subject(
        "picture",
        functools.partial(vit, image_size=16),
        lambda generator: {"pixel_values": empty(ROWS, 3, 16, 16).normal_(generator=generator)},
    ),
)

SETTINGS = {
    "adaptformer(m=3, norm='in', learned_s=True)": "vit",
    "adaptformer(m=3, sequential=True)": "llama",
    "adaptformer(m=3, norm='out')": "bert",
    "dvpt(form='vit', L=3, r=4)": "vit",
    "dvpt(form='port', L=3, r=4, share=1)": "vit",
    "dvpt(form='segformer', L=3, r=4)": "vit",
    "dvpt(form='swin', L=2, r=4, share=2)": "picture",
    "dvpt(L=3, r=4)": "encoder",
    "earth-adapter(m=3, frequency=-1, rho=0.5)": "picture",
    "earth-adapter(m=3, frequency=-1, rho=0.5, exact_start=False, grid=(4, 4), t=2)": "picture",
    "rein(m=5, r=None)": "vit",
    "rein(m=5, r=2, prefix_tokens=0)": "encoder",
    "conv-adapter(form='deep', m=16, blocks=2)": "bert",
    "conv-adapter(form='deep', m=16, blocks=2, targets='attn')": "picture",
    "conv-adapter(form='deep', m=16, targets='conv')": "convnet",
    "conv-adapter(norm=True, m=4, targets='mlp')": "llama",
    "conv-adapter(form='deep', m=16, blocks=2, causal=True, targets='norm.mlp')": "llama",
    "transformer-adapter(m=4, heads=2, blocks=2, causal=True)": "llama",
    "transformer-adapter(m=6, heads=3, targets='norm')": "bert",
    "transformer-adapter(m=4, heads=2, targets='conv')": "convnet",
    "transformer-adapter(m=4, heads=2, targets='attn mlp')": "picture",
}


@pytest.mark.parametrize(
    "law", ["identity", "step", "gradients", "save", "two", "rows", "weighted", "disable", "deepcopy", "compile", "ckpt", "bf16"]
)
@pytest.mark.parametrize("spec", SETTINGS)
def test_setting(spec: str, law: str, seed: int) -> None:
    case = Case.of(spec, seed, SETTINGS[spec])
    if declared(case, law) is None:
        LAWS[law](case)
