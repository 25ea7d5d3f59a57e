"""NeRA: a bottleneck beside a layer whose every input feature passes through a learned spline (2024, arXiv:2411.13901)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from veneer.init import kaiming_uniform, normal, ones, zeros
from veneer.kernels.hats import hat_features
from veneer.maths.spline import kan
from veneer.method import Call, Method, Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class NeRA(Method):
    """y = x Wᵀ + b + alpha · B z,  z = Σ_d Σ_k max(0, 1 − |in_scale_d x_d − knots_dk|) · C_dk

    Pick it where a layer's change is a nonlinear function of its input that no low-rank product fits; it costs about K times
    LoRA's numbers on the input side. Not where inference must be free, nor where inputs are far from ±4, outside every hat:
    fit_scale or form="bspline" help.

    Tensors: knots [in, K], from −3 to 3 evenly; C [in, K, r], zeros, so that training starts from the base, or N(0, 0.001²);
    in_scale [in], ones; B [out, r], U(±1/√r); alpha []; all trained. "bspline": down_base, down_scale [r, in], down_coef
    [r, in, G + order] and up_base, up_scale [out, r], up_coef [out, r, G + order]; up_base and up_coef start at zero.

    Args:
        form: "code", as the authors' code and above; "bspline": y = x Wᵀ + b + alpha · KAN_up(KAN_down(x)), two layers
            KAN(v)_j = Σ_i base_ji SiLU(v_i) + scale_ji Σ_g coef_jig B_g(v_i) of B-splines on ±span, alpha not trained.
        alpha: a plain factor. The authors' class has 0.001, their runs have 64 (with a learning rate of 1e-5).
    """

    form: str = option("code", "hats with free knots, or two layers of B-splines", choices=("code", "bspline"))
    r: int = option(16, "features of the bottleneck", ge=1)
    K: int = option(8, "code: hat functions of each input feature; with 7 they sum to one at the start", ge=2)
    alpha: float = option(1.0, "first scale of the change", gt=0)
    exact_identity: bool = option(True, "code: start with C = 0, exactly the base; False: near it, as the authors' code")
    fit_scale: bool = option(False, "code: take in_scale from data, so that inputs seen lie between the knots; attach needs batches")
    G: int = option(5, "bspline: intervals of the grid", ge=1)
    order: int = option(3, "bspline: degree of the splines", ge=1)
    span: float = option(3.0, "bspline: the grid reaches from −span to span", gt=0)

    kinds = ("linear",)
    sizes = ("r", "K", "G")
    default_lr = 1e-4
    default_targets = "attn.q attn.k attn.v attn.o attn.qkv cross.q cross.k cross.v cross.o"
    aliases = {"num_knots": "K", "rank": "r"}

    @property
    def limits(self) -> Mapping[str, str]:  # type: ignore[override]
        near = (
            {}
            if self.exact_identity or self.form == "bspline"
            else {"identity": "C starts at small random numbers, as in the authors' code"}
        )
        return {"merge": "it is nonlinear in its input", **near}

    @property  # type: ignore[misc]
    def calibrates(self) -> bool:  # type: ignore[override]
        return self.fit_scale and self.form == "code"

    def observe(self, state: Any, x: Tensor, site: Site) -> Any:
        peak = x.flatten(0, -2).abs().amax(0).float()
        return peak if state is None else torch.maximum(state, peak)

    def settle(self, states: Mapping[str, Any], sites: Sequence[Site]) -> dict[str, tuple[Method, Params] | None]:
        found: dict[str, tuple[Method, Params] | None] = {}
        for site in sites:
            peak = states[site.name].cpu()
            found[site.name] = self, {"in_scale": torch.where(peak > 0, 3 / peak.clamp_min(1e-6), 1)}
        return found

    def init(self, site: Site, generator: Generator) -> Params:
        r, K, out, inside, n = self.r, self.K, site.out_features, site.in_features, self.G + self.order
        if self.form == "bspline":
            down, coef = kaiming_uniform((r, inside), generator), normal((r, inside, n), generator, 0.1 / inside**0.5)
            p = {"down_base": down, "down_scale": ones((r, inside)), "down_coef": coef}
            return {**p, "up_base": zeros((out, r)), "up_scale": ones((out, r)), "up_coef": zeros((out, r, n))}
        C = zeros((inside, K, r)) if self.exact_identity else normal((inside, K, r), generator, 1e-3)
        knots, alpha = torch.linspace(-3, 3, K).repeat(inside, 1), torch.tensor(float(self.alpha))
        return {"knots": knots, "C": C, "in_scale": ones((inside,)), "B": kaiming_uniform((out, r), generator), "alpha": alpha}

    def features(self, x: Tensor, p: Params) -> Tensor:
        """z [..., r] of the inputs x [..., in], in the tensors' dtype."""
        return hat_features(x, p["knots"], p["in_scale"], p["C"])

    def delta(self, x: Tensor, p: Params, site: Site) -> Tensor:
        if self.form == "code":
            return F.linear(self.features(x, p).to(x.dtype), (p["alpha"] * p["B"]).to(x.dtype))
        down, up = ((p[f"{way}_base"], p[f"{way}_scale"], p[f"{way}_coef"]) for way in ("down", "up"))
        return (self.alpha * kan(kan(x, *down, self.span, self.order), *up, self.span, self.order)).to(x.dtype)

    def adds(self, site: Site) -> bool:
        return True

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        return call(x) + self.delta(x, p, site)
