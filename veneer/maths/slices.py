"""Slices of a weight: some of its columns or rows are trained, the rest is left alone; a seed or a score says which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor
from torch.nn.functional import linear

from veneer.kernels.columns import add_columns, add_rows, columns_linear, in_columns, in_rows
from veneer.method import AdditiveMethod, Call, Method, Params, WeightMethod
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True, kw_only=True)
class Slices(AdditiveMethod):
    """W_eff[:, I] = W[:, I] + ΔV, or with rows W_eff[I, :] = W[I, :] + ΔV, and W elsewhere; I [s] are the features of chosen units

    Give `values`, `wanted` and `drawn`; `rows`, `width` and `heard` where they are not those of single columns.
    A unit is a run of `width` features of the weight's inputs (columns) or outputs (rows). Scores of a unit: the norm of
    its part of the weight, the mean magnitude of what flows through it on some data, the product of both, or the norm of
    its part of the weight's gradients, over all batches of some data.
    """

    selection: str = option(
        "random", "how units are chosen: at random or by a score", choices=("random", "weight", "activation", "product", "gradient")
    )
    smallest: bool = option(False, "take the smallest scores instead of the largest")
    seed: int = option(0, "of a random choice", ge=0)

    kinds = ("linear", "parameter")
    frozen: ClassVar[tuple[str, ...]] = ("I",)

    @property
    def fixed(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("I",) if self.selection == "random" else ()

    @property
    def reads_weight(self) -> bool:
        return self.selection in ("weight", "product")

    @property  # type: ignore[misc]
    def calibrates(self) -> bool:  # type: ignore[override]
        return self.selection in ("activation", "product")

    @property  # type: ignore[misc]
    def reads_gradients(self) -> bool:  # type: ignore[override]
        return self.selection == "gradient"

    @property
    def limits(self) -> Mapping[str, str]:  # type: ignore[override]
        packed = {"bnb4": "starts from gradients of the base, and its weight is stored quantised"}
        return packed if self.reads_gradients else {}

    # -- what a method says -------------------------------------------------------------------------------------

    def values(self, p: Params) -> Tensor:
        """ΔV: [out, s] in columns, [s, in] in rows."""
        raise NotImplementedError

    def wanted(self, site: Site) -> int:
        """How many units of this site are chosen."""
        raise NotImplementedError

    def drawn(self, site: Site) -> Tensor:
        """The units of a random choice."""
        raise NotImplementedError

    def rows(self, site: Site) -> bool:
        """Whether units are outputs, rows of the weight."""
        return False

    def width(self, site: Site) -> int:
        """Features of a unit."""
        return 1

    def heard(self, site: Site, sites: Sequence[Site]) -> Site | None:
        """The site whose input is what flows through this one's units."""
        return site

    # -- which ones ---------------------------------------------------------------------------------------------

    def check(self, site: Site) -> None:
        if self.calibrates and site.kind != "linear":
            raise self.refuse(f"selection={self.selection!r} needs the inputs of a linear layer, not of the {site.kind} {{at}}.", site)

    def indices(self, units: Tensor, site: Site) -> Tensor:
        """The features I [s] of these units."""
        width = self.width(site)
        return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()

    def first(self, site: Site) -> Tensor:
        """I at the start: as drawn, or room for those that a score will name."""
        return self.indices(self.drawn(site) if self.selection == "random" else torch.arange(self.wanted(site)), site)

    def best(self, score: Tensor, site: Site) -> Tensor:
        """I of the units with the largest (smallest) scores, ascending; of equal scores the first."""
        order = score.argsort(descending=not self.smallest, stable=True)
        return self.indices(order[: self.wanted(site)].sort().values, site)

    def observe(self, state: Any, x: Tensor, site: Site) -> Any:
        if self.rows(site):
            return None  # its units are heard where they enter the next layer
        x = x.flatten(0, -2).abs()
        total, count = state or (0, 0)
        return total + x.sum(0, dtype=torch.promote_types(x.dtype, torch.float32)), count + len(x)

    def observe_gradient(self, state: Any, name: str, grad: Tensor, site: Site) -> Any:
        if name != "weight":
            return state
        grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
        squares = grad.square().sum(-1 if self.rows(site) else -2)  # [features], of stacked matrices [count, features]
        return squares if state is None else state + squares

    def settle(self, states: Mapping[str, Any], sites: Sequence[Site]) -> dict[str, tuple[Method, Params] | None]:
        found: dict[str, tuple[Method, Params] | None] = {}
        for site in sites:
            source = site if self.reads_gradients else self.heard(site, sites)
            state = states.get(source.name) if source else None
            if state is None:
                what = "no gradient of" if self.reads_gradients else "nothing of what flows through"
                raise self.refuse(f"selection={self.selection!r} saw {what} the units {{at}}; choose 'weight'.", site)
            if self.reads_gradients:
                squares = state.reshape(site.count or 1, -1, self.width(site)).sum(-1)
                best = torch.stack([self.best(one, site) for one in squares])
                found[site.name] = (self, {"I": best if site.count else best[0]})
                continue
            features = site.out_features if self.rows(site) else site.in_features
            flow = (state[0] / state[1]).reshape(features // self.width(site), -1).mean(1)
            found[site.name] = (self, {"I": self.best(flow, site)} if self.selection == "activation" else {"flow": flow})
        return found

    def init_from_weight(self, W: Tensor, b: Tensor | None, p: Params, site: Site, generator: Generator) -> Params:
        if self.selection not in ("weight", "product"):
            return p
        norms = torch.linalg.vector_norm(W, dim=1 if self.rows(site) else 0).reshape(-1, self.width(site)).norm(dim=1)
        return {**{k: t for k, t in p.items() if k != "flow"}, "I": self.best(norms * p.get("flow", 1), site)}

    def check_tensors(self, p: Params, site: Site) -> None:
        V, at, rows = self.values(p), p["I"], self.rows(site)
        features, other = (site.out_features, site.in_features) if rows else (site.in_features, site.out_features)
        whole = at.dtype == torch.int64 and at.ndim == (2 if site.count else 1)
        if not whole or list(V.shape[-2:]) != ([at.shape[-1], other] if rows else [other, at.shape[-1]]):
            raise self.refuse(f"positions {list(at.shape)} of {at.dtype} do not fit a slice {list(V.shape)} {{at}}.", site)
        if bool((at < 0).any() or (at >= features).any()) or not bool((at.sort(-1).values.diff() > 0).all()):
            raise self.refuse(f"positions must lie in 0 … {features - 1}, each once, {{at}}.", site)

    # -- what they change ---------------------------------------------------------------------------------------

    def change(self, p: Params, site: Site) -> Tensor:
        V, I = self.values(p), p["I"]
        return in_rows(V, I, site.out_features) if self.rows(site) else in_columns(V, I, site.in_features)

    def delta(self, x: Tensor, p: Params, site: Site) -> Tensor:
        V, I = self.values(p).to(x.dtype), p["I"]
        if self.rows(site):
            return add_rows(x.new_zeros(*x.shape[:-1], site.out_features), x, V, I)
        return linear(x.index_select(-1, I), V)

    def low_rank(self, W: Tensor, p: Params, site: Site) -> tuple[Tensor, Tensor] | None:
        if site.count:
            return None
        V, I = self.values(p), p["I"]
        one = torch.eye(len(I)).to(V)
        return (in_rows(one, I, site.out_features), V) if self.rows(site) else (V, in_columns(one, I, site.in_features))

    def adds(self, site: Site) -> bool:
        return site.kind == "linear"

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        if site.kind != "linear":
            return WeightMethod.forward(self, call, x, p, site)
        W = None if self.rows(site) else call.matrix(x)
        if W is not None:
            b = call.bias()
            return columns_linear(x, W, None if b is None else b.to(x.dtype), self.values(p), p["I"])
        return (add_rows if self.rows(site) else add_columns)(call(x), x, self.values(p), p["I"])
