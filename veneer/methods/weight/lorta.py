"""LoRTA: one low-rank tensor over heads, layers and matrices is the change of all attention weights (2024, arXiv:2410.04060)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from veneer.errors import BadValue
from veneer.init import kaiming_uniform, zeros
from veneer.method import LowRankMethod, Params
from veneer.option import option
from veneer.site import Site

MATRICES = "qkvo"


@dataclass(frozen=True)
class LoRTA(LowRankMethod):
    """W_eff = W + s · [D_1 … D_H]ᵀ, D_h = A diag(C_H[h] ⊙ C_L[layer] ⊙ C_M[matrix]) B, s = alpha / r; for o without the ᵀ

    Pick it where LoRA of rank 1 is still too big: a rank costs d + d_h + H + L + 4 numbers for the whole model, so ranks
    far above LoRA's are normal. Not for MLPs, nor for keys and values that have fewer heads than the queries.

    Tensors, one set for all layers of a stack of blocks (another for its cross-attention, if targeted): A [d, r],
    uniform ±1/√r; B [r, d_h], zeros: starts as the base; C_H [H, r], C_L [L, r], C_M [4, r] (rows q, k, v, o),
    uniform ±√(6 / (r (1 + 5 init_scale²))). d is the hidden width, d_h a head's, H counts heads, L the stack's blocks.

    Args:
        r: may exceed d.
        layout: side of the weight on which heads lie: "paper" the outputs of q, k and v and the inputs of o; "heads_in" and
            "heads_out", of the authors' two programs, the inputs or outputs of all four, which must then be square.
        untie: gives each layer, or each of the four matrices, an A, a B and C of its own, with a leading axis, and no C_L or C_M.
    """

    r: int = option(8, "rank of the tensor", ge=1)
    alpha: float | None = option(None, "scale numerator; None means r", gt=0)
    dropout: float = option(0.0, "dropout on the input of the change, in training", ge=0, lt=1)
    rslora: bool = option(False, "scale by alpha/√r instead of alpha/r")
    layout: str = option("paper", "side of each weight on which heads lie", choices=("paper", "heads_in", "heads_out"))
    init_scale: float = option(0.0, "slope in the first values of C_H, C_L and C_M: larger means smaller", ge=0)
    untie: str = option("no", "a mode with tensors of its own for each index", choices=("no", "layers", "matrices"))

    kinds = ("linear",)
    default_targets = "attn.q attn.k attn.v attn.o attn.qkv"
    default_lr = 5e-3
    aliases = {"rank": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "use_rslora": "rslora"}

    @property
    def scale(self) -> float:
        return (self.r if self.alpha is None else self.alpha) / (self.r**0.5 if self.rslora else self.r)

    def select(self, sites: Sequence[Site]) -> list[Site]:
        found = super().select(sites)
        for site in found:
            self.check(site)
        return found

    def check(self, site: Site) -> None:
        sublayer, _, matrix = site.role.rpartition(".")
        if site.role == "attn.qkv":
            raise self.refuse("the rows of query, key and value are interleaved {at}; target 'attn.o'.", site)
        if sublayer not in ("attn", "cross") or matrix not in MATRICES:
            raise self.refuse(f"it is for attention's q, k, v and o, not for the {site.role!r} {{at}}; choose among those.", site)
        if not site.heads:
            raise self.refuse("the number of heads is not known {at}; choose other targets.", site)
        if matrix in "kv" and site.kv_heads != site.heads:
            raise self.refuse(f"{site.heads} query heads share {site.kv_heads} key and value heads {{at}}; target 'attn.q attn.o'.", site)
        wide = site.out_features if self.heads_out(site) else site.in_features
        if wide % site.heads:
            raise self.refuse(f"{site.heads} heads do not divide {wide} features {{at}}; choose layout='paper' or other targets.", site)

    def heads_out(self, site: Site) -> bool:
        """Whether heads lie along the outputs."""
        return self.layout == "heads_out" or (self.layout == "paper" and not site.role.endswith(".o"))

    def size(self, site: Site) -> tuple[int, int, int, int]:
        """d, d_h, H and L."""
        wide, d = (site.out_features, site.in_features) if self.heads_out(site) else (site.in_features, site.out_features)
        return d, wide // site.heads, site.heads, site.length

    def tie(self, site: Site) -> str | None:
        stack = site.side or ("all" if site.depth in (None, site.index) else f"blocks{site.depth - site.index}")
        return f"{stack}.cross" if site.role.startswith("cross.") else stack

    def init_shared(self, sites: Sequence[Site], generator: Generator) -> Params:
        first, r = sites[0], self.r
        d, d_h, H, L = self.size(first)
        for other in sites:
            if self.size(other) != (d, d_h, H, L):
                what = f"{first.name} and {other.name} share tensors, but their widths, heads and layers are"
                raise BadValue(f"LoRTA: {what} {(d, d_h, H, L)} and {self.size(other)}; choose layout='paper' or other targets.")
        lead = {"no": (), "layers": (L,), "matrices": (4,)}[self.untie]
        gain = (6 / (1 + 5 * self.init_scale**2)) ** 0.5
        modes = {"C_H": H, "C_L": L, "C_M": 4}
        modes.pop({"no": "", "layers": "C_L", "matrices": "C_M"}[self.untie], None)
        return {
            "A": kaiming_uniform((*lead, d, r), generator),
            "B": zeros((*lead, r, d_h)),
            **{name: kaiming_uniform((*lead, size, r), generator, gain=gain) for name, size in modes.items()},
        }

    def factors(self, p: Params, site: Site | None = None) -> tuple[Tensor, Tensor]:
        if site is None or not site.heads:
            raise BadValue("LoRTA: a change belongs to a layer, matrix and head; give the site of an attention projection.")
        layer, matrix = site.index, MATRICES.index(site.role[-1])
        if self.untie != "no":
            p = {name: t[layer if self.untie == "layers" else matrix] for name, t in p.items()}
        c = self.scale * p["C_H"]  # [H, r]
        for name, index in (("C_L", layer), ("C_M", matrix)):
            c = c * p[name][index] if name in p else c
        across = torch.einsum("hk,kj->hjk", c, p["B"]).flatten(0, 1)  # [H · d_h, r]
        return (across, p["A"].T) if self.heads_out(site) else (p["A"], across.T)
