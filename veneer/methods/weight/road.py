"""RoAd: a layer's outputs turned in pairs, each by its own angle and length (2024, arXiv:2409.00119)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from veneer.init import ones, zeros
from veneer.kernels.scale_rotate import rotate
from veneer.maths.factor import divisors
from veneer.method import OutputMethod, Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class RoAd(OutputMethod):
    """h′_a = c_a h_a − s_a h_c, h′_c = s_c h_a + c_c h_c for every pair (a, c) of the outputs h = x Wᵀ + b; c, s = alpha · (cos, sin) θ

    Pick it for very few numbers, and for batches in which every row has its own adapter: it only multiplies and adds.
    Not where a large budget is free. It rotates, that is keeps lengths, while alpha = 1; the bias is turned too.

    In every group of group_size features, feature a of the first half goes with c = a + group_size/2.
    Tensors: theta, zeros, and alpha, ones: starts as the base. Both are [out/2] (road_1: c_a = c_c and s_a = s_c),
    [out] (road_2: one angle and length per feature) or [2 out] (road_4: by group, first those of the cosines, then
    those of the sines).
    """

    variant: str = option("road_1", "numbers per pair of features: 1, 2 or 4 angles", choices=("road_1", "road_2", "road_4"))
    group_size: int = option(64, "features per group; even, must divide out", ge=2)

    sizes = ("variant",)
    widens = True
    turns_bias: ClassVar[bool] = True
    default_lr = 3e-3
    default_targets = "attn.q attn.v attn.qkv cross.q cross.v"
    aliases = {"g": "group_size"}

    def check(self, site: Site) -> None:
        g, size = self.group_size, site.out_features // site.groups  # a grouped convolution cannot mix its groups' outputs
        legal = [d for d in divisors(size) if d % 2 == 0]
        if g not in legal:
            near = [str(d) for d in (*[d for d in legal if d < g][-1:], *[d for d in legal if d > g][:1])]
            choose = f"choose group_size = {' or '.join(near)}" if near else "choose other targets"
            of = f"{size} outputs of each of the {site.groups} groups" if site.groups > 1 else f"{size} outputs"
            raise self.refuse(f"group_size={g} is not an even number that divides the {of} {{at}}; {choose}.", site)

    def init(self, site: Site, generator: Generator) -> Params:
        n = {"road_1": site.out_features // 2, "road_2": site.out_features, "road_4": 2 * site.out_features}[self.variant]
        return {"theta": zeros((n,)), "alpha": ones((n,))}

    def turn(self, h: Tensor, p: Params, site: Site) -> Tensor:
        half = self.group_size // 2
        rows = {"road_1": (1, 1), "road_2": (1, 2), "road_4": (2, 2)}[self.variant]  # cosines and sines; first and second half
        theta, alpha = (p[name].unflatten(0, (-1, *rows, half)) for name in ("theta", "alpha"))
        C, S = (alpha * torch.cos(theta))[:, 0], (alpha * torch.sin(theta))[:, -1]  # [groups, 1 or 2, half]
        return rotate(h, C, S)
