"""QuIC: the output turned by orthogonal blocks, each grown from one small matrix and its minors (2025, arXiv:2502.06916)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from math import comb

import torch
from torch import Generator, Tensor

from veneer.errors import BadValue
from veneer.init import ones, uniform, zeros
from veneer.maths.compound import by_compounds, compounds
from veneer.maths.rotation import cayley
from veneer.method import Call, OutputMethod, Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class QuantumAdapter(OutputMethod):
    """W_eff = Qᵀ W, Q = blockdiag(A_i^(k) for k in orders, I) over N blocks, A_i = (I − K)(I + K)⁻¹; y = (x Wᵀ) Q + b

    A^(k) is the k-th compound of A, the matrix of all its k×k minors: orthogonal where A is. Pick it for budgets some 40
    times below LoRA's when lengths and angles of features are to be kept: order 1 alone is OFT on the output side, higher
    orders make the blocks much larger for the same numbers. Not where quality comes before size,
    nor for memory: the output that is turned is kept for every layer.

    Tensors: Theta [P, N, n, n] (N = 1 with block_share), zeros: starts as the base. Only the skew part K = (Θ − Θᵀ)/2 has an
    effect: P·N·n² numbers are stored and P·N·n(n − 1)/2 of them count. n is the largest with Σ_k C(n, k) ≤ out / N; what a
    block or the layer has beyond that is left as it is. With scaling: s [out], ones.

    Args:
        P: Q = Q₁ Q₂ … Q_P; by Cauchy–Binet the chain is that of the product of the small matrices, so it costs no more.
        orthogonal: False takes A = Theta, which starts at I; much worse, for study.
        minors: "perm", "max", "avg" take the permanent, the largest or the mean entry in place of determinants; for study.
        offset: Q_i acts on the outputs shifted in a circle by i · out / P, so that the product has no blocks.
    """

    N: int = option(3, "blocks of the output (of each group of a convolution), a count and no rank", ge=1)
    orders: tuple[int, ...] = option((1, 2), "which compounds a block is made of", ge=1)
    P: int = option(1, "turns one after another", ge=1)
    block_share: bool = option(False, "one small matrix for all blocks of a layer")
    orthogonal: bool = option(True, "turn the small matrix into an orthogonal one (Cayley)")
    start: str = option("zeros", "first Theta; xavier: uniform in ±√(3/n)", choices=("zeros", "xavier"))
    minors: str = option("det", "what stands for a submatrix", choices=("det", "perm", "max", "avg"))
    scaling: bool = option(False, "train a scale of every output after the turn")
    offset: bool = option(False, "shift the outputs between turns")
    module_dropout: float = option(0.0, "chance of leaving a whole layer as it is, in a training step", ge=0, lt=1)

    recomputes = True
    sizes = ("P", "N")
    default_targets = "attn.q attn.v attn.qkv cross.q cross.v"
    aliases = {"r": "N", "n_blocks": "N", "num_adapters": "P", "use_scaling": "scaling", "use_offset_blocks": "offset"}

    def validate(self) -> None:
        if not isinstance(self.orders, tuple) or len(set(self.orders)) < len(self.orders):
            raise BadValue(f"QuantumAdapter: orders={self.orders!r} must be different whole numbers from 1 on, such as (1, 2).")
        if 1 not in self.orders:
            warnings.warn("QuantumAdapter: without order 1 gradients through the minors are weak; add it to orders.", stacklevel=4)

    @property
    def limits(self) -> Mapping[str, str]:  # type: ignore[override]
        if self.minors in ("max", "avg"):
            return {"identity": f"the {self.minors} entries of the identity's submatrices are no identity"}
        return {"identity": "Theta starts random"} if self.start == "xavier" else {}

    def base(self, site: Site) -> tuple[int, int]:
        """Size b of a block, and the largest n whose compounds fit into it."""
        b, n = site.out_features // site.groups // self.N, 0
        while sum(comb(n + 1, k) for k in self.orders) <= b and n < b:
            n += 1
        return b, n

    def check(self, site: Site) -> None:
        least, size = sum(comb(max(self.orders), k) for k in self.orders), site.out_features // site.groups
        if self.base(site)[1] < max(self.orders):
            choose = f"choose N ≤ {size // least}" if size >= least else "choose lower orders"
            what = f"orders={self.orders!r} need blocks of {least} outputs or more, and N={self.N} blocks of the {size} {{at}}"
            raise self.refuse(f"{what} have {self.base(site)[0]}; {choose}.", site)
        if self.offset and site.groups > 1:
            raise self.refuse("offset=True would mix the groups of the convolution {at}; choose offset=False.", site)

    def init(self, site: Site, generator: Generator) -> Params:
        n = self.base(site)[1]
        shape = (self.P, 1 if self.block_share else self.N * site.groups, n, n)
        Theta = zeros(shape) if self.orthogonal else torch.eye(n).expand(shape).clone()
        if self.start == "xavier":
            Theta = uniform(shape, generator, (3 / n) ** 0.5)
        return {"Theta": Theta, **({"s": ones((site.out_features,))} if self.scaling else {})}

    def small(self, Theta: Tensor) -> Tensor:
        """The small matrices A of the turns that have to be made, [turns, N or 1, n, n]."""
        A = torch.eye(Theta.shape[-1]).to(Theta) + cayley((Theta - Theta.mT) / 2) if self.orthogonal else Theta
        return A if self.offset or self.minors != "det" else reduce(torch.matmul, A).unsqueeze(0)

    def turn(self, h: Tensor, p: Params, site: Site) -> Tensor:
        with torch.autocast(h.device.type, enabled=False):
            A = self.small(p["Theta"])
        made = compounds(A, self.orders, self.minors)
        for i in range(len(A)):
            shift = i * site.out_features // self.P if self.offset else 0
            shifted = h.roll(-shift, -1) if shift else h
            change = by_compounds(shifted, [M[i] for M in made], self.N, site.groups)
            h = h + (change.roll(shift, -1) if shift else change)
        return h * p["s"] if self.scaling else h

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        if self.module_dropout and call.training:
            keep = (torch.rand((), device=x.device) >= self.module_dropout).to(p["Theta"].dtype)
            still = {"Theta": 0.0 if self.orthogonal else torch.eye(p["Theta"].shape[-1]).to(p["Theta"]), "s": 1.0}
            p = {name: still[name] + keep * (t - still[name]) for name, t in p.items()}  # where the turn is none
        return super().forward(call, x, p, site)
