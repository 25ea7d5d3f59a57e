"""Compacter: bottleneck adapters made of Kronecker products whose small factors all layers share (2021, arXiv:2106.04647)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Generator, Tensor

from veneer.init import normal, ones, uniform, zeros
from veneer.maths.factor import nearest_divisors
from veneer.maths.hypercomplex import hypercomplex
from veneer.method import Call, Method, Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class Compacter(Method):
    """o + up(gelu(down(o))) after a sub-layer's output o; each layer is x H + b, H = Σ_i A_i ⊗ (L_i R_i) [in, out]

    Pick it for a nonlinear adapter at a tenth of the bottleneck's numbers. targets="mlp" is Compacter++; the authors also
    train the base's norms: "compacter + ln-tuning". Not where inference must be free.

    Tensors: A [n, n, n], shared by all adapters, N(0, rule_std²); per layer L [n, in/n, r], R [n, r, out/n], Glorot-uniform
    with gain √2, and b [out], zeros, as down_L, down_R, down_b and up_L, up_R, up_b. up_R starts at zero, so training starts
    from the base. r=None: the whole blocks down_W, up_W [n, in/n, out/n]. factorised: a [n, n, 1], c [n, 1, n], A_i = a_i c_i.
    Not shared: down_A, up_A (down_a …) at each adapter. norm: ln_in_w, ln_in_b [D], ln_out_w, ln_out_b [D], ones and zeros.

    Args:
        exact_start: False draws up_R like the others, with rule_std 1e-4 as released: near the base, within about rule_std².
    """

    n: int = option(4, "size of the rules; divides D and m", ge=1)
    r: int | None = option(1, "rank of the blocks; None: whole blocks (PHM)", ge=1)
    m: int | None = option(None, "width of the bottleneck; None: D // reduction, at least n", ge=1)
    reduction: float = option(32.0, "D over the width of the bottleneck", gt=0)
    shared_rules: bool = option(True, "one set of rules for all adapters; False: one for each projection")
    factorised: bool = option(False, "rules of rank 1")
    norm: str = option("none", "a norm of its own before, after or around", choices=("none", "in", "out", "both"))
    rule_std: float | None = option(None, "standard deviation of the rules; None: 0.01, or 1e-4 where nothing starts at zero", gt=0)
    exact_start: bool = option(True, "start equal to the base")

    kinds = ("linear", "branch")
    sizes = ("r", "m")
    default_lr = 3e-3
    default_targets = "attn mlp"
    aliases = {"phm_dim": "n", "phm_rank": "r", "bottleneck": "m", "reduction_factor": "reduction", "phm_init_range": "rule_std"}

    @property
    def limits(self) -> dict[str, str]:  # type: ignore[override]
        near = {} if self.exact_start else {"identity": "the released rules start at small random numbers"}
        return {"merge": "it is nonlinear", **near}

    def width(self, site: Site) -> int:
        return max(self.n, int(site.out_features // self.reduction)) if self.m is None else self.m

    def check(self, site: Site) -> None:
        D, m = site.out_features, self.width(site)
        if D % self.n or m % self.n:
            raise self.refuse(
                f"n={self.n} does not divide D={D} and the bottleneck m={m} {{at}}; choose n = {nearest_divisors(self.n, D, m)}, "
                "or another m.", site
            )  # fmt: skip

    def rules(self, generator: Generator) -> dict[str, Tensor]:
        n, std = self.n, self.rule_std or (0.01 if self.exact_start else 1e-4)
        if self.factorised:  # the product of the two has the standard deviation asked for
            return {"a": normal((n, n, 1), generator, std**0.5), "c": normal((n, 1, n), generator, std**0.5)}
        return {"A": normal((n, n, n), generator, std)}

    def init_shared(self, sites: Sequence[Site], generator: Generator) -> Params:
        return self.rules(generator) if self.shared_rules else {}

    def init(self, site: Site, generator: Generator) -> Params:
        n, D, m = self.n, site.out_features, self.width(site)
        p: Params = {}
        for way, inside, out in (("down", D, m), ("up", m, D)):
            shapes = {"L": (n, inside // n, self.r), "R": (n, self.r, out // n)} if self.r else {"W": (n, inside // n, out // n)}
            for name, shape in shapes.items():
                bound = 2**0.5 * (6 / (shape[1] + shape[2])) ** 0.5  # type: ignore[operator]
                p[f"{way}_{name}"] = uniform(shape, generator, bound)  # type: ignore[arg-type]
            p[f"{way}_b"] = zeros((out,))
            p |= {} if self.shared_rules else {f"{way}_{name}": t for name, t in self.rules(generator).items()}
        if self.exact_start:
            last = "up_R" if self.r else "up_W"
            p[last] = zeros(tuple(p[last].shape))
        for place in ("in", "out"):
            if self.norm in (place, "both"):
                p |= {f"ln_{place}_w": ones((D,)), f"ln_{place}_b": zeros((D,))}
        return p

    def project(self, x: Tensor, way: str, q: Params) -> Tensor:
        own = "" if self.shared_rules else f"{way}_"
        A = q[f"{own}a"] @ q[f"{own}c"] if self.factorised else q[f"{own}A"]
        L, R = (q[f"{way}_L"], q[f"{way}_R"]) if self.r else (q[f"{way}_W"], None)
        return hypercomplex(x, A, L, R) + q[f"{way}_b"]

    def f(self, h: Tensor, p: Params) -> Tensor:
        """The adapter's network, [..., D] → [..., D]."""
        q = {name: t.to(h.dtype) for name, t in p.items()}
        h = F.layer_norm(h, h.shape[-1:], q["ln_in_w"], q["ln_in_b"]) if "ln_in_w" in q else h
        u = self.project(F.gelu(self.project(h, "down", q), approximate="tanh"), "up", q)
        return F.layer_norm(u, u.shape[-1:], q["ln_out_w"], q["ln_out_b"]) if "ln_out_w" in q else u

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        o = call(x)
        return o + self.f(o, p)
