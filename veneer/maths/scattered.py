"""A change of the weight from a few trained coefficients at drawn places of a matrix that a fixed transform turns into ΔW."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Generator, Tensor
from torch.nn.functional import linear

from veneer.init import normal, zeros
from veneer.method import AdditiveMethod, Call, Params, WeightMethod
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True, kw_only=True)
class Scattered(AdditiveMethod):
    """W_eff = W + transform(C), C [out, in] zero but for coefficients c [n] at indices [2, n] (row, column), drawn from `seed`

    Give `change`, and `product` with `thin`: how x ΔWᵀ is had without ΔW, and where that is cheaper than ΔW in every
    forward and its dense gradient in every backward.
    """

    seed: int = option(777, "of the places; sites of one shape have the same", ge=0)
    start: str = option("zeros", "first coefficients; normal: N(0, 1)", choices=("zeros", "normal"))

    n, alpha = 1000, cast("float", 1.0)  # the method's own hyper-parameters
    fixed = ("indices",)
    sizes = ("n",)

    @property
    def limits(self) -> Mapping[str, str]:  # type: ignore[override]
        return {} if self.start == "zeros" else {"identity": "its coefficients start random"}

    def count(self, site: Site) -> int:
        """The number of coefficients at a site."""
        return self.n

    def check(self, site: Site) -> None:
        entries = site.out_features * site.in_features
        if self.count(site) > entries:
            raise self.refuse(f"n={self.count(site)} is more than the {entries} entries of the weight {{at}}; choose n ≤ {entries}.", site)

    def init(self, site: Site, generator: Generator) -> Params:
        n, inside = self.count(site), site.in_features
        order = torch.randperm(site.out_features * inside, generator=Generator().manual_seed(self.seed))[:n]
        c = zeros((n,)) if self.start == "zeros" else normal((n,), generator)
        return {"c": c, "indices": torch.stack([order // inside, order % inside])}

    def check_tensors(self, p: Params, site: Site) -> None:
        at, n, out, inside = p["indices"], p["c"].shape[-1], site.out_features, site.in_features
        good = at.dtype == torch.int64 and at.shape[-2:] == (2, n) and bool((at >= 0).all())
        if good:
            row, column = at.unbind(-2)
            apart = (row * inside + column).sort(-1).values.diff() > 0
            good = bool((row < out).all() and (column < inside).all() and apart.all())
        if not good:
            raise self.refuse(f"the indices {{at}} are not those of {n} different entries of a {out}×{inside} weight.", site)

    def thin(self, site: Site) -> bool:
        """Whether `product` is cheaper than the dense ΔW; from shapes alone."""
        return False

    def product(self, x: Tensor, p: Params, site: Site) -> Tensor:
        """x ΔWᵀ, [..., in] → [..., out], without ΔW."""
        raise NotImplementedError

    def delta(self, x: Tensor, p: Params, site: Site) -> Tensor:
        return self.product(x, p, site) if self.thin(site) else linear(x, self.change(p, site).to(x.dtype))

    def adds(self, site: Site) -> bool:
        return site.kind == "linear"

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        if site.kind == "linear" and self.thin(site):
            return call(x) + self.product(x, p, site)
        return WeightMethod.forward(self, call, x, p, site)
