"""QWHA: a quantised weight plus sparse coefficients of a Walsh–Hadamard transform that first repair its error (2025, arXiv:2509.17428)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from veneer.errors import BadValue
from veneer.init import zeros
from veneer.kernels.sparse import denser, placed, sparse_linear
from veneer.maths.grids import damped
from veneer.maths.hadamard import core, core_order, transform
from veneer.maths.quantised_start import GridStart
from veneer.maths.sparse_repair import check_places, repair
from veneer.method import Call, Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class QWHA(GridStart):
    """W_eff = W_Q + scale / (n √out) · F H, F [out, in] zero but F[E] = c, H Hᵀ = n I; y = x W_effᵀ + b

    Pick it at 2 or 3 bits: p = r (in + out) coefficients first take away as much of the quantiser's error as they can, and
    are then trained; of full rank at LoRA's count. Not where the weight is quantised well enough; not to merge into a grid.

    Tensors: c [p] and E [p, 2] (row, column), fixed, from weight and inputs; W_Q = (codes − zero) · step: codes [out, in],
    zero [out, in/group] in uint8, step [out, in/group], frozen; core [K, K], if in = K · 2^m with K > 1. H is Sylvester's
    matrix, or a Paley matrix ⊗ Sylvester's.

    Args:
        start: "data" is the paper's; "weight" takes all inputs alike; "random" repairs nothing: E from `seed`, c zeros.
        quantiser: "base" leaves the layer as it is, in 4 bits too, and starts there; needs start="random".
        scale: c is √out / scale times the repair's: with AdamW it multiplies the rate.
        kernel: "blocks" (ours): Sylvester's matrix over blocks of the largest power of two that divides in.
        rule: rows share by their output's error, as in the paper, or by their own ("weight"), coefficients then chosen by
            their output, as in the authors' code.
    """

    r: int = option(64, "a LoRA of this rank has as many coefficients", ge=1)
    scale: float = option(4000.0, "of the coefficients", gt=0)
    t: float = option(1.0, "temperature of the rows' shares; 0: all alike", ge=0)
    rule: str = option("output", "what decides a row's share and a coefficient's place", choices=("output", "weight"))
    start: str = option("weight", "what places and values come from", choices=("weight", "data", "random"))
    kernel: str = option("hadamard", "H over all inputs, or over blocks of them", choices=("hadamard", "blocks"))
    damp: float = option(1e-4, "share of its mean added to the diagonal of inputs' products", ge=0)
    seed: int = option(0, "of random places", ge=0)

    frozen = ("E", "codes", "step", "zero", "core")
    default_lr = 2e-4
    aliases = {"rank": "r", "group_size": "group", "wbits": "bits", "temperature": "t"}

    @property
    def fixed(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("E", "core") if self.start == "random" else ("core",)

    def validate(self) -> None:
        if self.quantiser == "base" and self.start != "random":
            raise BadValue(f"QWHA: quantiser='base' leaves no error to repair, so start={self.start!r} must be 'random'.")

    def count(self, site: Site) -> int:
        return self.r * (site.in_features + site.out_features)

    def check(self, site: Site) -> None:
        super().check(site)
        out, inside = site.out_features, site.in_features
        if self.count(site) > out * inside:
            what = f"r={self.r} asks for {self.count(site)} of the {out * inside} entries"
            raise self.refuse(f"{what} {{at}}; choose r ≤ {out * inside // (out + inside)} or other targets.", site)
        if self.kernel == "hadamard" and core_order(inside) is None:
            raise self.refuse(f"no Hadamard matrix of order in={inside} is known here {{at}}; choose kernel='blocks'.", site)

    def check_tensors(self, p: Params, site: Site) -> None:
        check_places(self, p["E"], len(p["c"]), site)
        super().check_tensors(p, site)

    def init(self, site: Site, generator: Generator) -> Params:
        out, inside, p = site.out_features, site.in_features, self.count(site)
        at = torch.arange(p)
        if self.start == "random":
            at = torch.randperm(out * inside, generator=Generator().manual_seed(self.seed))[:p].sort().values
        own = {"c": zeros((p,)), "E": torch.stack([at // inside, at % inside], 1), **super().init(site, generator)}
        K = 1 if self.kernel == "blocks" else core_order(inside) or 1
        return own | ({"core": core(K)} if K > 1 else {})

    def made(self, W: Tensor, S: Tensor | None, p: Params, site: Site) -> Params:
        p = super().made(W, S, p, site)
        if self.start == "random":
            return p
        S = None if S is None else damped(S, self.damp)
        turn = lambda x: self.turn(x, p.get("core"))  # noqa: E731
        E, c = repair(W - self.stand_in(W, p), S, len(p["c"]), self.width(W.shape[1]), turn, self.t, self.rule)
        return {**p, "E": E, "c": c * (len(W) ** 0.5 / self.scale)}

    def width(self, inside: int) -> int:
        """n of H Hᵀ = n I."""
        return inside & -inside if self.kernel == "blocks" else inside

    def turn(self, x: Tensor, H: Tensor | None) -> Tensor:
        """H x for every row of x, H given by its core."""
        return transform(x, H, self.width(x.shape[-1]) if self.kernel == "blocks" else 0)

    def change(self, p: Params, site: Site) -> Tensor:
        """scale / (n √out) · F H [out, in]."""
        out, inside, H = site.out_features, site.in_features, p.get("core")
        F = placed(p["c"], p["E"].t(), out, inside)
        return self.scale / (self.width(inside) * out**0.5) * self.turn(F, None if H is None else H.t())

    def delta(self, x: Tensor, p: Params, site: Site) -> Tensor:
        """x ΔWᵀ: the transform of x, then a sparse product."""
        n, out = self.width(site.in_features), site.out_features
        z = self.turn(x.to(torch.promote_types(x.dtype, torch.float32)), p.get("core")) / n**0.5  # of x's own length
        return sparse_linear(z.to(x.dtype), self.scale / (n * out) ** 0.5 * p["c"], p["E"].t(), out)

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        if denser(p["c"].numel(), site.out_features, site.in_features):
            return super().forward(call, x, p, site)
        return self.below(call, x, p) + self.delta(x, p, site)
