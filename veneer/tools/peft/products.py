"""Methods whose change is a product of thin matrices: PEFT's DELORA, LOHA and LOKR."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from veneer.method import Method, Params
from veneer.part import Part
from veneer.site import Site
from veneer.tools.peft.layered import Kept, Layered


def joined_loha(parts: Sequence[Part], site: Site) -> tuple[Method, Params]:
    """Row ranges as further ranks: of each factor [out, r] only the own rows are not zero."""
    method: Any = parts[0].method
    p: Params = {name: torch.cat([part.tensors()[name] for part in parts]) for name in ("w1_b", "w2_b")}
    for name in ("w1_a", "w2_a"):
        p[name] = p["w1_b"].new_zeros(site.out_features, len(p["w1_b"]))
        for i, part in enumerate(parts):
            p[name][slice(*part.site.rows or ()), i * method.r : (i + 1) * method.r] = part.tensors()[name]
    return replace(method, r=method.r * len(parts), alpha=method.scale * method.r * len(parts)), p


def alpha(method: Any, site: Site) -> float:
    """The scale's numerator; r where none is given."""
    return method.r if method.alpha is None else method.alpha


def against_scrambled(site: Site, layer: nn.Module) -> str:
    """PEFT multiplies the whole large factor of a 1-d convolution by the small one along the wrong axes."""
    return "a 1-d convolution" if site.kind == "conv" and len(site.kernel) == 1 else ""


KERNEL = "a convolution's kernel as a factor of its own (use_effective_conv2d)"

DROPOUTS = {"rank_dropout": "rank_dropout", "module_dropout": "module_dropout"}

PRODUCTS = (
    Layered(
        "DELORA", "delora",
        (Kept("delora_A", "A"), Kept("delora_B", "B"), Kept("delora_lambda", "lambda"), Kept("delora_w_norm", "w_n")),
        options={"r": "r", "delora_lambda": "lambda_initial"}, patterns={"r": "rank_pattern", "lambda_initial": "lambda_pattern"},
        training=("module_dropout",),
    ),
    Layered(
        "LOHA", "loha", tuple(Kept(f"hada_{name}", name) for name in ("w1_a", "w1_b", "w2_a", "w2_b")),
        options={"r": "r", "alpha": "alpha", **DROPOUTS}, patterns={"r": "rank_pattern", "alpha": "alpha_pattern"},
        values={"alpha": alpha}, refused={"hada_t1": KERNEL}, kinds=("linear", "conv"), biases=False, join=joined_loha,
    ),
    Layered(
        "LOKR", "lokr",
        (
            *(Kept(f"lokr_{name}", name) for name in ("w1", "w1_a", "w1_b", "w2_a", "w2_b")),
            Kept("lokr_w2", "w2", lambda t, site: t.flatten(1), lambda t, site: t.reshape(len(t), -1, *site.kernel)),
        ),
        options={
            "r": "r", "alpha": "alpha", "decompose_both": "decompose_both", "decompose_factor": "decompose_factor",
            "rank_dropout_scale": "rank_dropout_scale", **DROPOUTS,
        },
        patterns={"r": "rank_pattern", "alpha": "alpha_pattern"}, values={"alpha": alpha}, refused={"lokr_t2": KERNEL},
        kinds=("linear", "conv"), biases=False, unfit=against_scrambled,
    ),
)  # fmt: skip
"""As they stand in PEFT's format."""
