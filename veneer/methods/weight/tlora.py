"""TLoRA: a dense transform of the frozen weight as a ring of small tensors, and a small residual (2025, arXiv:2501.08727)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import linear

from veneer.calls import rebuilds
from veneer.errors import BadValue
from veneer.init import Shape, kaiming_uniform, normal, zeros
from veneer.kernels.rebuilt import rebuilt_linear
from veneer.maths.factor import balanced
from veneer.maths.tensor_ring import along, closed, cores_of, dense, identity, less_identity, product
from veneer.method import Call, Params, WeightMethod
from veneer.option import option
from veneer.site import Site
from veneer.strategies.ring_penalty import RingPenalty


@dataclass(frozen=True)
class TLoRA(WeightMethod):
    """W_eff = W T + Δ, T[i, j] = tr ∏ A_d[i_d, j_d], Δ[o, i] = tr ∏ B_d[o_d] ∏ C_d[i_d] or up · down; y = x W_effᵀ + b

    Pick it where a change of low rank does not reach, as for images, with fewer numbers than LoRA of rank 1. It costs
    one product [in, in] more per layer in training, nothing once merged. Not for embedding tables, whose T is vocabulary².

    Tensors: A1 … AD [I_d, I_d, R_T, R_T], identities / R_T plus noise that cancels out in T; B1 [O_1, R_res, R_res],
    zeros: starts as the base; B2 … [O_d, R_res, R_res], C1 … [I_d, R_res, R_res], Gaussian, so that their product has
    entries near 1/√in. With residual="lora": up [out, R_res], zeros; down [R_res, in], Kaiming-uniform(√5).

    Args:
        in_dims, out_dims: I_1 … with Π I_d = in and O_1 … with Π O_d = out; None: D near-equal factors, as in the paper's counts.
        noise: what breaks the tie between the slices of a core, which would else train alike: "silent" leaves T = Id;
            "gaussian" adds N(0, 0.001²) to all cores.
        share: "type": one set of tensors for all layers of a role.
    """

    R_res: int = option(6, "rank of the residual; the paper uses 4 with residual='lora'", ge=1)
    R_T: int = option(2, "rank of the transform's ring", ge=1)
    residual: str = option("tr", "a tensor ring or a low-rank product", choices=("tr", "lora"))
    D: int = option(3, "number of factors of each size", ge=1)
    in_dims: tuple[int, ...] | None = option(None, "factors of the inputs; None: D near-equal ones")
    out_dims: tuple[int, ...] | None = option(None, "factors of the outputs; None: D near-equal ones")
    noise: str = option("silent", "what tells the slices of a core apart", choices=("silent", "gaussian"))
    share: str = option("none", "tensors for each layer, or one set for all layers of a role", choices=("none", "type"))
    penalty: str = option("identity", "what T is kept near, if penalty_weight is not 0", choices=("identity", "orthogonal"))
    penalty_weight: float = option(0.0, "factor of the penalty ‖T − Id‖² or ‖TᵀT − Id‖² in the loss", ge=0)

    sizes = ("R_res", "R_T")
    default_targets = "attn.q attn.k attn.v attn.o attn.qkv cross.q cross.k cross.v cross.o"
    default_lr = 5e-4
    aliases = {"r": "R_res", "rank": "R_res", "lambda_T": "penalty_weight"}

    @property
    def limits(self) -> Mapping[str, str]:  # type: ignore[override]
        return {} if self.noise == "silent" else {"identity": "noise='gaussian' moves the transform a little off the identity"}

    def dims(self, site: Site) -> tuple[Shape, Shape]:
        """I_1 … and O_1 …"""
        return self.in_dims or balanced(site.in_features, self.D), self.out_dims or balanced(site.out_features, self.D)

    def check(self, site: Site) -> None:
        given = [("in_dims", self.in_dims, site.in_features), ("out_dims", self.out_dims, site.out_features)]
        for (name, own, size), dims in zip(given if self.residual == "tr" else given[:1], self.dims(site)):
            even = balanced(size, len(dims))
            if math.prod(dims) != size or not all(type(n) is int and n > 0 for n in dims):
                raise self.refuse(f"{name}={dims} does not multiply to {size} {{at}}; choose {name}={even}.", site)
            if own is None and max(even) > 8 * size ** (1 / self.D):  # one core would be nearly as large as T
                what = f"{size} features {{at}} have no {self.D} factors of similar size, only {even}"
                raise self.refuse(f"{what}; choose other targets, or {name}={even} if that is meant.", site)

    def tie(self, site: Site) -> str | None:
        return None if self.share == "none" else site.role if site.role != "other" else f"other.{site.name.rsplit('.', 1)[-1]}"

    def init(self, site: Site, generator: Generator) -> Params:
        return self.init_shared([site], generator) if self.share == "none" else {}

    def init_shared(self, sites: Sequence[Site], generator: Generator) -> Params:
        (name, out, into), *rest = [(s.name, s.out_features, s.in_features) for s in sites]
        for other, *size in (s for s in rest if s[1:] != (out, into)):
            what = f"{name} and {other} share tensors but are {[out, into]} and {size}"
            raise BadValue(f"TLoRA: {what}; choose share='none' or other targets.")
        (I, O), R = self.dims(sites[0]), self.R_res
        p = {f"A{d}": core for d, core in enumerate(identity(I, self.R_T, self.noise, generator), 1)}
        if self.residual == "lora":
            return {**p, "up": zeros((out, R)), "down": kaiming_uniform((R, into), generator)}
        std = into ** (-0.5 / (len(O) + len(I) - 1)) / R**0.5
        p.update({f"B{d}": normal((n, R, R), generator, std) if d > 1 else zeros((n, R, R)) for d, n in enumerate(O, 1)})
        return {**p, **{f"C{d}": normal((n, R, R), generator, std) for d, n in enumerate(I, 1)}}

    def factors(self, p: Params) -> tuple[Tensor, Tensor]:
        """L [out, k] and R [k, in] with L R = Δ; k is R_res² for a ring."""
        return (p["up"], p["down"]) if "up" in p else closed(product(cores_of(p, "B")), product(cores_of(p, "C")))

    def weight(self, W: Tensor, p: Params, site: Site | None = None) -> Tensor:
        L, R = self.factors(p)
        return torch.addmm(L @ R, W.flatten(1).to(L.dtype), dense(cores_of(p, "A"))).reshape(W.shape)

    def turn(self, x: Tensor, p: Params) -> Tensor:
        """x Tᵀ [..., in]: core by core for a few tokens, else by T − Id, which is made again in backward instead of kept."""
        A = cores_of(p, "A")
        if x.numel() // x.shape[-1] * len(A) * self.R_T**2 < x.shape[-1]:  # what the cores' way keeps, against T's [in, in]
            return along(x.to(torch.promote_types(x.dtype, A[0].dtype)), A).to(x.dtype)
        if not rebuilds(x):
            return x + linear(x, less_identity(A).to(x.dtype))
        trained = {f"A{d}": core for d, core in enumerate(A, 1)}
        return x + rebuilt_linear(x, lambda: torch.empty(0), None, lambda _, p: less_identity(cores_of(p, "A")), trained)

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        return call.add_low_rank(self.turn(x, p), *self.factors(p), x) if site.kind == "linear" else super().forward(call, x, p, site)

    def strategy(self) -> RingPenalty | None:
        return RingPenalty(self.slug, self.penalty, self.penalty_weight) if self.penalty_weight else None
