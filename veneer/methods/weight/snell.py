"""SNELL: sparse tuning whose changed entries compete, grown by a kernel from two thin matrices (2024, arXiv:2411.01800)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from veneer.errors import BadValue
from veneer.init import ones
from veneer.kernels.kernelised import Rule
from veneer.maths.competition import Competing, piecewise, squared, squares
from veneer.maths.order_statistics import Pieces, order_statistics, quantile
from veneer.method import Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class SNELL(Competing):
    """W_eff = W + gate(K), K[o, i] = Σ_p ±alpha · ‖B_p[o] − A_p[i]‖, gate: K |K| where |K| > its s-quantile, else 0

    Pick it where few entries of the weight should move, anywhere in it, and only LoRA's memory is there: K has full
    rank, neither mask nor change is kept, and entries that grow push others below the threshold. Strong on fine-grained
    vision. Not for speed: K is built three times a step. s wants a search per task; SNELLA sets it by itself.

    Tensors: A [in, r] and B [out, r], uniform in ±1/√(n r / P), n = in and out: a start close to the base but not at it.
    With train_alpha: alpha [P], ±alpha in turn. Kernels sigmoid and rbf: a, b, g [1], 1, 1 and −½ or −1, so that K ≈ 0.

    Args:
        kernel: "piecewise" as above; "linear": B Aᵀ (LoRA's); "sigmoid": a / (1 + exp(−b · B Aᵀ)) + g; "rbf":
            a exp(−b ‖B[o] − A[i]‖²) + g.
        s: 0 is no gate at all, ΔW = K.
        gate: "code" as above, as the authors' code has it; "paper": K · max(|K| − t, 0), t the ⌈s · entries⌉-th |K|.
        dropout, drop_path: 0.1 in the authors' runs; 0 here, so that training is exact unless asked.
    """

    r: int = option(8, "columns of A and B, over all pieces", ge=1)
    s: float = option(0.9, "share of the entries that stay unchanged", ge=0, lt=1)
    P: int = option(2, "pieces of the kernel", ge=1)
    alpha: float = option(0.1, "size of the pieces' weights; their signs alternate", gt=0)
    kernel: str = option("piecewise", "what makes K of A and B", choices=("piecewise", "linear", "sigmoid", "rbf"))
    gate: str = option("code", "what the entries above the threshold become", choices=("code", "paper"))
    train_alpha: bool = option(False, "train the pieces' weights")

    default_targets = "attn.q attn.k attn.v attn.o attn.qkv cross.q cross.k cross.v cross.o mlp.up mlp.gate mlp.down"
    aliases = {"rank": "r", "low_rank_dim": "r", "sparsity": "s", "thres": "s", "pieces": "P"}

    @property
    def limits(self) -> Mapping[str, str]:  # type: ignore[override]
        start = {"identity": "the kernel of its random first matrices is small but not zero"}
        return {**start, "gradients": "threshold and gate count as constants"} if self.s else start

    def validate(self) -> None:
        if self.kernel == "piecewise" and self.r % self.P:
            raise BadValue(f"SNELL: P={self.P} does not divide r={self.r}; choose r = {self.P * max(1, self.r // self.P)}.")
        if self.train_alpha and self.kernel != "piecewise":
            raise BadValue(f"SNELL: train_alpha is for kernel='piecewise'; the {self.kernel} kernel has no alphas.")

    def check(self, site: Site) -> None:
        n = site.out_features * site.in_features
        if self.s and n - 1 <= self.rank(n):
            raise self.refuse(f"s={self.s} leaves none of the {n} entries {{at}}; choose s of at most 1 − 1/{n}.", site)

    def rank(self, n: int) -> int:
        """How many of n entries lie below the one the threshold is at, or begins at."""
        return math.ceil(round(self.s * n, 6)) - 1 if self.gate == "paper" else math.floor(self.s * (n - 1))

    def init(self, site: Site, generator: Generator) -> Params:
        p = self.thin(site, generator, self.r, self.P if self.kernel == "piecewise" else 1)
        if self.train_alpha:
            p["alpha"] = torch.tensor(self.alphas)
        if self.kernel in ("sigmoid", "rbf"):
            p |= {"a": ones((1,)), "b": ones((1,)), "g": -ones((1,)) / (2 if self.kernel == "sigmoid" else 1)}
        return p

    @property
    def alphas(self) -> list[float]:
        return [self.alpha * (-1) ** i for i in range(self.P)]

    def matrix(self, p: Params) -> Tensor:
        """K [out, in]."""
        A, B = p["A"], p["B"]
        if self.kernel == "piecewise":
            return piecewise(B, A, p.get("alpha", self.alphas))
        if self.kernel == "rbf":
            return p["a"] * torch.exp(-p["b"] * squares(B, A).to(B.dtype)) + p["g"]
        return B @ A.T if self.kernel == "linear" else p["a"] * torch.sigmoid(p["b"] * (B @ A.T)) + p["g"]

    def threshold(self, pieces: Pieces, n: int, like: Tensor) -> Tensor | None:
        if not self.s:
            return None

        def sizes() -> Iterable[Tensor]:
            return (K.abs() for K in pieces())

        if self.gate == "code":
            return quantile(sizes, n, self.s, like)
        return order_statistics(sizes, [torch.tensor(self.rank(n), device=like.device)], like.dtype)[0]

    def gated(self, K: Tensor, t: Tensor | None) -> Tensor:
        if t is None:
            return K
        return squared(K, t) if self.gate == "code" else K * (K.abs() - t).relu()

    def rule(self, p: Params) -> Rule:
        return Rule(self.matrix, self.threshold, self.gated)
