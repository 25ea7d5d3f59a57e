"""LoRETTA: LoRA, or bottleneck adapters, whose thin matrices are tensor trains (2024, arXiv:2402.11417)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from veneer.errors import Unsupported
from veneer.init import Shape, ones, uniform
from veneer.maths.tensor_train import bonds, cores_of, loose_shape, matrix, random_cores, through, usual_shape
from veneer.method import WEIGHTS, Call, LowRankMethod, Params
from veneer.option import option
from veneer.site import Site, choose


@dataclass(frozen=True)
class LoRETTA(LowRankMethod):
    """rep: W_eff = W + s (M_A M_B)ᵀ, s = alpha / r; adp: y + Ad(y), Ad(z) = gamma (act(z M_down + b_down) M_up + b_up); M are trains

    Pick "rep" for LoRA with ten times fewer numbers, "adp" for the stronger, nonlinear one, which no weight can absorb.
    The authors train all norms beside it: "loretta + ln-tuning". Not where a start away from the base hurts (images).

    Tensors: cores GA0, GA1 … [ρ, n, ρ′] of M_A [in, r] and GB… of M_B [r, out]; or G_down… of M_down [h, β], G_up… of M_up
    [β, h], b_down [β], b_up [h], uniform ±1/√size, and gamma [1] if learned. Cores are Gaussian, entries of M then have
    variance 1 / (rows + columns): the start is *not* the base, except with start="zero_last", where M_B or M_up is zero.

    Args:
        placement: for a layer or sub-layer y(x): "output", y + Ad(y); "parallel", y + Ad(x); "input", y(x + Ad(x)).
        shape_A, shape_B: sizes n of the cores, Π n = rows · columns; by default the authors' or, for other sizes, even ones.
    """

    variant: str = option("rep", "LoRA of tensor trains, or adapters of them", choices=("rep", "adp"))
    tt_rank: int = option(5, "width of the bonds between cores, ρ", ge=1)
    r: int = option(8, "rep: rank of the change", ge=1)
    alpha: float | None = option(None, "rep: scale numerator; None means 2 r", gt=0)
    dropout: float = option(0.0, "dropout on what the trains read, in training; the authors' rep has 0.05", ge=0, lt=1)
    bottleneck: int = option(64, "adp: width of the bottleneck, β", ge=1)
    act: str = option("relu", "adp: nonlinearity", choices=("relu", "gelu", "silu", "tanh"))
    placement: str = option("output", "adp: where the adapter stands", choices=("output", "input", "parallel"))
    gamma: float = option(1.0, "adp: scale of the adapter, if it is not learned")
    learned_gamma: bool = option(False, "adp: train the scale, from 1")
    start: str = option("random", "first values; zero_last: the last core of M_B or M_up zero", choices=("random", "zero_last"))
    clip: bool = option(False, "no bond wider than the tensor on either side can use: fewer numbers, the same matrices")
    shape_A: tuple[int, ...] | None = option(None, "sizes of the cores of M_A or M_down")
    shape_B: tuple[int, ...] | None = option(None, "sizes of the cores of M_B or M_up")

    kinds = (*WEIGHTS, "branch")
    sizes = ("tt_rank", "r", "bottleneck")
    default_targets = "attn.q attn.v attn.qkv cross.q cross.v"
    aliases = {"tensor_rank": "tt_rank", "lora_alpha": "alpha", "activation": "act", "shape_down": "shape_A", "shape_up": "shape_B"}

    @property
    def limits(self) -> Mapping[str, str]:  # type: ignore[override]
        away = {"identity": "all cores start random, as in the paper, unless start='zero_last'"} if self.start == "random" else {}
        adp = {"merge": "the bottleneck is nonlinear", **dict.fromkeys(("embedding", "conv2d"), "the adapter reads tokens' features")}
        return away if self.variant == "rep" else {**away, **adp}

    def select(self, sites: Sequence[Site]) -> list[Site]:
        kinds, own = (WEIGHTS, self.default_targets) if self.variant == "rep" else (("linear", "branch"), "attn mlp")
        found = choose(sites, self.targets or own, kinds=kinds, who=self.label, allow_unmatched=self.targets is None)
        return [s for s in found if s.depth is None or s.depth not in self.leave_out]

    def trains(self, site: Site) -> dict[str, tuple[int, int, Shape | None]]:
        """Cores' name → rows, columns and core sizes of their matrix."""
        rep, out, into = self.variant == "rep", site.out_features, site.in_features
        first, last = (into if rep or self.placement != "output" else out), (out if rep or self.placement != "input" else into)
        names, width = (("GA", "GB"), self.r) if rep else (("G_down", "G_up"), self.bottleneck)
        shapes = self.shape_A or usual_shape(first, width), self.shape_B or usual_shape(width, last)
        return {names[0]: (first, width, shapes[0]), names[1]: (width, last, shapes[1])}

    def check(self, site: Site) -> None:
        if self.variant == "adp" and (site.kind not in ("linear", "branch") or (site.kind == "branch" and self.placement == "input")):
            raise self.refuse(f"an adapter at the {self.placement} of a {site.kind} {{at}} is not defined; choose linear layers.", site)
        for what, (n, m, shape) in zip(("shape_A", "shape_B"), self.trains(site).values()):
            even = loose_shape(n * m)
            if shape is None:
                raise self.refuse(f"{n}·{m} {{at}} has no factors from 4 to 16; choose {what}={even} there, or another width.", site)
            if math.prod(shape) != n * m or not all(type(k) is int and k > 0 for k in shape):
                raise self.refuse(f"{what}={shape} does not multiply to {n}·{m} {{at}}; choose {what}={even}.", site)

    def init(self, site: Site, generator: Generator) -> Params:
        p: Params = {}
        for name, (n, m, shape) in self.trains(site).items():
            zero = self.start == "zero_last" and name in ("GB", "G_up")
            links = bonds(shape := shape or (), self.tt_rank, self.clip)
            p.update({f"{name}{d}": G for d, G in enumerate(random_cores(shape, links, (n + m) ** -0.5, generator, zero))})
            if self.variant == "adp":
                p[name.replace("G", "b")] = uniform((m,), generator, 0.0 if zero else m**-0.5)
        return {**p, "gamma": ones((1,))} if self.variant == "adp" and self.learned_gamma else p

    def factors(self, p: Params, site: Site | None = None) -> tuple[Tensor, Tensor]:
        if self.variant == "adp":
            raise Unsupported(f"{self.label} cannot be folded into a weight: {self.limits['merge']}.")
        s = 2.0 if self.alpha is None else self.alpha / self.r
        return s * matrix(cores_of(p, "GB"), self.r, -1).T, matrix(cores_of(p, "GA"), -1, self.r).T

    def low_rank(self, W: Tensor, p: Params, site: Site) -> tuple[Tensor, Tensor] | None:
        return self.factors(p, site) if self.variant == "rep" else None

    def adds(self, site: Site) -> bool:
        return self.variant == "rep" and site.kind == "linear" and not self.dropout

    def f(self, z: Tensor, p: Params, training: bool) -> Tensor:
        """gamma · (act(z M_down + b_down) M_up + b_up), in the tensors' dtype: products of many small cores need it."""
        z = F.dropout(z.to(torch.promote_types(z.dtype, p["b_down"].dtype)), self.dropout, training)
        u = getattr(F, self.act)(through(z, cores_of(p, "G_down"), z.shape[-1]) + p["b_down"])
        return p.get("gamma", self.gamma) * (through(u, cores_of(p, "G_up"), len(p["b_down"])) + p["b_up"])

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        if self.variant == "rep":
            return super().forward(call, x, p, site)
        if self.placement == "input":
            return call((x + self.f(x, p, call.training)).to(x.dtype))
        y = call(x)
        return y + self.f(y if self.placement == "output" else x, p, call.training)
