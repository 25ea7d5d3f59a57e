"""L4Q: LoRA's product added to the weight before it is quantised with learned steps: training gives integers (2024, arXiv:2402.04902)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from veneer.init import kaiming_uniform, ones, zeros
from veneer.maths.factor import nearest_divisors
from veneer.maths.grids import codes_of, first_steps, on_learned_grid
from veneer.maths.quantised_start import refuse_twice
from veneer.method import Params, WeightMethod
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class L4Q(WeightMethod):
    """W_eff = s · round(clamp((W + alpha/r · B A − beta) / s, −2^(bits−1), 2^(bits−1) − 1)) + beta; y = x W_effᵀ + b

    Pick it where a model of 4 bits or fewer is to come out and the base fits in 16 bits while it is trained: nothing is
    left beside the integers (`veneer.tools.integers`), and steps learn with the weights. Backward rebuilds one layer's
    weight at a time: memory is LoRA's, time that of training all weights. Not where the base is too large for 16 bits.

    Tensors: A [r, in], Kaiming-uniform(√5); B [out, r], zeros; s [out, in/group], by `start`; beta [out, in/group], zeros
    (asymmetric: of the grid). Starts as the base rounded to its grid. A step counts by its magnitude.

    Args:
        start: of the steps. "fitted" clips nothing and is the paper's; the others are those it compares with.
        grad_scale: LSQ's factor 1/√(group · (2^(bits−1) − 1)) on the gradients of steps and offsets (arXiv:1902.08153).
    """

    r: int = option(4, "rank of the update", ge=1)
    bits: int = option(4, "bits of the codes", ge=2, le=8)
    group: int = option(128, "columns that share a step", ge=1)
    alpha: float | None = option(None, "scale numerator; None means r", gt=0)
    start: str = option("fitted", "first steps", choices=("fitted", "symmetric", "asymmetric", "lsq+"))
    train_offset: bool = option(True, "train beta too")
    grad_scale: bool = option(False, "scale down the gradients of steps and offsets")

    kinds = ("linear", "parameter")
    sizes = ("r", "group")
    default_lr = 2e-4
    default_targets = "attn.q attn.k attn.v attn.o attn.qkv cross.q cross.k cross.v cross.o mlp.up mlp.gate mlp.down mixer.in mixer.out"
    aliases = {"rank": "r", "lora_alpha": "alpha", "group_size": "group", "wbits": "bits"}
    limits = {
        "identity": "a quantised copy stands for the weight",
        "bnb4": "it quantises the weight itself, and this one is quantised already; load the base in 16 or 32 bit",
        "gradients": "rounding has no derivative; gradients pass through it as if it were not there",
    }

    @property
    def frozen(self) -> tuple[str, ...]:  # type: ignore[override]
        return () if self.train_offset else ("beta",)

    def check(self, site: Site) -> None:
        if site.in_features % self.group:
            near = nearest_divisors(self.group, site.in_features)
            raise self.refuse(f"group={self.group} does not divide in={site.in_features} {{at}}; choose group = {near}.", site)

    def check_tensors(self, p: Params, site: Site) -> None:
        if not bool((p["s"].isfinite() & (p["s"] != 0)).all()):
            raise self.refuse("steps must be finite and not zero {at}.", site)

    def init(self, site: Site, generator: Generator) -> Params:
        grids = (site.out_features, site.in_features // self.group)
        A, B = kaiming_uniform((self.r, site.in_features), generator), zeros((site.out_features, self.r))
        return {"A": A, "B": B, "s": ones(grids), "beta": zeros(grids)}

    def init_from_weight(self, W: Tensor, b: Tensor | None, p: Params, site: Site, generator: Generator) -> Params:
        refuse_twice(self, W, site)
        s, beta = first_steps(W, self.bits, self.group, self.start)
        return {**p, "s": s, "beta": beta}

    def sums(self, W: Tensor, p: Params) -> tuple[Tensor, Tensor, Tensor]:
        """W + alpha/r · B A [out, in], steps and offsets [out, in/group]."""
        s, beta = p["s"].abs(), p["beta"]
        if self.grad_scale:
            k = (self.group * (2 ** (self.bits - 1) - 1)) ** -0.5
            s, beta = (t.detach() + k * (t - t.detach()) for t in (s, beta))
        scale = 1 if self.alpha is None else self.alpha / self.r
        return torch.addmm(W.flatten(1).to(p["B"].dtype), p["B"], p["A"], alpha=scale), s, beta

    def pieces(self, W: Tensor, p: Params) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [out, in], steps and offsets [out, in/group]: `from_codes` makes W_eff of them, bit for bit."""
        W, s, beta = self.sums(W, p)
        return codes_of(W, s, beta, self.bits), s, beta

    def weight(self, W: Tensor, p: Params, site: Site | None = None) -> Tensor:
        return on_learned_grid(*self.sums(W, p), self.bits).reshape(W.shape)
