"""C3A: a change of the weight made of circulant blocks, one trained row each (2024, arXiv:2407.19342)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Generator, Tensor

from veneer.init import uniform, zeros
from veneer.kernels.circulant import circulant_linear, rolled
from veneer.maths.factor import nearest_divisors
from veneer.method import AdditiveMethod, Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class C3A(AdditiveMethod):
    """W_eff = W + ΔW, ΔW[i b + k, j b + l] = w_ij[(l − k) mod b] / in; y = x W_effᵀ + b

    Pick it where the change may have full rank at a small budget: out · in / b numbers. It costs two Fourier transforms
    per layer and pass, always in float32 or wider. Not for widths without a large common divisor b.

    Tensors: w [out/b, in/b, b], the first row of every circulant block; zeros: starts as the base. start="xavier":
    uniform in ±√(6 / (in + out)), as in the authors' code.
    """

    b: int = option(256, "block size; must divide in and out", ge=1)
    start: str = option("zeros", "first values", choices=("zeros", "xavier"))

    sizes = ("b",)
    default_lr = 1e-1
    default_targets = "attn.q attn.v attn.qkv cross.q cross.v"
    aliases = {"block_size": "b"}

    @property
    def limits(self) -> Mapping[str, str]:  # type: ignore[override]
        return {"identity": "its rows start as random numbers unless start='zeros'"} if self.start == "xavier" else {}

    def check(self, site: Site) -> None:
        out, inside = site.out_features, site.in_features
        if out % self.b or inside % self.b:
            legal = nearest_divisors(self.b, inside, out)
            raise self.refuse(f"b={self.b} does not divide in={inside} and out={out} {{at}}; choose b = {legal}.", site)

    def init(self, site: Site, generator: Generator) -> Params:
        shape = (site.out_features // self.b, site.in_features // self.b, self.b)
        bound = math.sqrt(6 / (site.in_features + site.out_features))
        return {"w": uniform(shape, generator, bound) if self.start == "xavier" else zeros(shape)}

    def change(self, p: Params, site: Site) -> Tensor:
        return rolled(p["w"]) / site.in_features

    def delta(self, x: Tensor, p: Params, site: Site) -> Tensor:
        return circulant_linear(x, p["w"] / site.in_features)
