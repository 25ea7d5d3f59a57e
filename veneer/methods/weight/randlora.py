"""RandLoRA: a sum of shared random bases with trained scales, of full rank (2025, arXiv:2502.00987)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Generator, Tensor

from veneer.init import Shape, ones, uniform, zeros
from veneer.kernels.rebuilt_low_rank import rebuilt_low_rank
from veneer.method import AdditiveMethod, Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class RandLoRA(AdditiveMethod):
    """ΔW = s · Σ_j B_j diag(lambda[:, j]) A diag(gamma[j]), s = alpha / r, transposed where in > out; y = x (W + ΔW)ᵀ + b

    Pick it where the change needs full rank and few trained numbers: n = ⌈min(in, out) / r⌉ bases of rank r, and a
    smaller r means more of them. Not for speed: the sum costs one to two times what the layer itself does.

    Tensors: lambda [r, n], zeros; gamma [n, min(in, out)], 1 / max(n, min(in, out)): starts as the base. Fixed and shared
    by all sites, of the size of the largest ones: A [r, 1, min], B [max, n, r], of variance 1; B_j is B[:, j], and each
    layer reads the first rows, bases and columns.

    Args:
        form: "peft" pairs the rows of A with other scales and bases, as peft 0.21 computes it: with row t = k·n + j
            of all lambda[k, j] A[k] diag(gamma[j]) goes column t % r of base t // r, not column k of base j.
        bases: entries uniform, or −√s, 0, √s with probabilities 1/2s, 1 − 1/s, 1/2s; sparse: s = 3, very_sparse: s = √min.
    """

    r: int = option(32, "rank of every basis", ge=1)
    alpha: float = option(640.0, "scale numerator, s = alpha / r; 20 r is usual", gt=0)
    bases: str = option("uniform", "entries of the random bases", choices=("uniform", "sparse", "very_sparse"))
    form: str = option("paper", "which scales go with which basis", choices=("paper", "peft"))
    dropout: float = option(0.0, "dropout on what the bases read, in training", ge=0, lt=1)
    seed: int = option(0, "of A and B", ge=0)

    fixed = ("A", "B")
    default_targets = "attn.q attn.v attn.qkv cross.q cross.v"
    default_lr = 1e-4
    aliases = {"rank": "r", "randlora_alpha": "alpha", "randlora_dropout": "dropout", "projection_prng_key": "seed"}

    @property
    def scale(self) -> float:
        return self.alpha / self.r

    def init(self, site: Site, generator: Generator) -> Params:
        least = min(site.in_features, site.out_features)
        n = -(-least // self.r)
        return {"lambda": zeros((self.r, n)), "gamma": ones((n, least)) / max(n, least)}

    def init_shared(self, sites: Sequence[Site], generator: Generator) -> Params:
        own = Generator().manual_seed(self.seed)
        least, most = (max(f(s.in_features, s.out_features) for s in sites) for f in (min, max))
        shapes = (self.r, 1, least), (most, -(-least // self.r), self.r)
        return dict(zip("AB", (self.basis(shape, least, own) for shape in shapes)))

    def basis(self, shape: Shape, least: int, generator: Generator) -> Tensor:
        """Random entries of variance 1, by steps that give the same bits on every machine."""
        if self.bases == "uniform":
            return uniform(shape, generator, 3**0.5)
        s = 3.0 if self.bases == "sparse" else least**0.5
        drawn = uniform(shape, generator, 1.0)
        return drawn.sign() * (drawn.abs() < 1 / s) * s**0.5

    def pair(self, p: Params, site: Site) -> tuple[Tensor, Tensor]:
        """L [out, n·r] and R [n·r, in]. All trained numbers are in one of them: only that one's input is kept for backward."""
        scales, gamma = self.scale * p["lambda"], p["gamma"]
        (r, n), most = scales.shape, max(site.in_features, site.out_features)
        A, B = p["A"][:r, :, : gamma.shape[1]], p["B"][:most, :n, :r].flatten(1)  # [r, 1, min], [max, n·r]
        rows = (scales[:, :, None] * gamma) * A  # [r, n, min]; A comes last, so that its large factor is not kept
        if self.form == "paper":
            rows = rows.transpose(0, 1)
        rows = rows.flatten(0, 1)
        return (B, rows) if site.in_features <= site.out_features else (rows.mT, B.mT)

    def change(self, p: Params, site: Site) -> Tensor:
        L, R = self.pair(p, site)
        return L @ R

    def delta(self, x: Tensor, p: Params, site: Site) -> Tensor:
        return rebuilt_low_rank(x, lambda p: self.pair(p, site), p)
