"""SketchTune: every row of a weight as a few shared values and an index for each entry; the values are trained (2024, arXiv:2410.06364)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from veneer.init import zeros
from veneer.maths.factor import nearest_divisors
from veneer.maths.grids import packed, unpacked
from veneer.maths.quantised_start import QuantisedStart
from veneer.maths.sketch import gathered, sketch
from veneer.method import Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class SketchTune(QuantisedStart):
    """W_eff[o, G · g + j] = w[o, G, codes[o, G, j]], g = in / gpr, K = 2^bits values a block; y = x W_effᵀ + b

    Pick it where the model is to be three or four times smaller and every task a table over the same codes: one product,
    no path beside it, changes of full rank. Its gradient is that of the weight, summed over the entries that share a value,
    one layer at a time: memory is small, time that of training all weights. Not where few numbers a task are wanted.

    Tensors: w [out, gpr, K], weighted k-means of every block; codes [out, gpr, g/2] in uint8, two a byte, the first in the
    high half, frozen. Starts as the compressed base; a block of fewer different weights than K is exact.

    Args:
        exponent: weights of k-means, d^−exponent; 2 weighs by the loss, more protects sensitive weights.
        damp: share of its mean added to the diagonal of inputs' products.
        act_order: codes are assigned from the largest input to the smallest.
    """

    bits: int = option(4, "bits of a code", ge=2, le=4)
    gpr: int = option(4, "blocks a row (groups per row)", ge=1)
    exponent: float = option(4.0, "how much sensitive weights count among the values", ge=0)
    damp: float = option(0.1, "damping of the inputs' products", gt=0)
    act_order: bool = option(True, "codes by descending input instead of left to right")
    seed: int = option(0, "of k-means++, with 4 bits", ge=0)

    frozen = ("codes",)
    sizes = ("gpr", "bits")
    default_lr = 8e-5
    aliases = {"GPR": "gpr", "groups_per_row": "gpr", "wbits": "bits", "percdamp": "damp"}

    def check(self, site: Site) -> None:
        inside, K = site.in_features, 2**self.bits
        if inside % self.gpr or inside // self.gpr % 2:
            legal = f"choose gpr = {nearest_divisors(self.gpr, inside // 2)}" if inside % 2 == 0 else "choose other targets"
            raise self.refuse(f"gpr={self.gpr} does not cut in={inside} into blocks of an even size {{at}}; {legal}.", site)
        if inside // self.gpr < K:
            what = f"a block of in/gpr={inside // self.gpr} weights has fewer than the {K} values of bits={self.bits}"
            raise self.refuse(f"{what} {{at}}; choose gpr ≤ {inside // K} or fewer bits.", site)

    def check_tensors(self, p: Params, site: Site) -> None:
        if p["codes"].dtype != torch.uint8 or bool((unpacked(p["codes"]) >= 2**self.bits).any()):
            raise self.refuse(f"codes must be whole numbers in 0 … {2**self.bits - 1} {{at}}.", site)

    def init(self, site: Site, generator: Generator) -> Params:
        out, half = site.out_features, site.in_features // self.gpr // 2
        return {"w": zeros((out, self.gpr, 2**self.bits)), "codes": torch.zeros(out, self.gpr, half, dtype=torch.uint8)}

    def made(self, W: Tensor, S: Tensor | None, p: Params, site: Site) -> Params:
        w, codes = sketch(W, S, 2**self.bits, self.gpr, self.exponent, self.damp, self.act_order, self.seed)
        return {"w": w, "codes": packed(codes.unflatten(1, (self.gpr, -1)))}

    def weight(self, W: Tensor, p: Params, site: Site | None = None) -> Tensor:
        return gathered(p["w"], unpacked(p["codes"]).flatten(-2)).reshape(W.shape)
