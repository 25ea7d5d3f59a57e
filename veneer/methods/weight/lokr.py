"""LoKr: the Kronecker product of two small matrices, the larger of them of low rank (2022, arXiv:2212.10650)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import linear

from veneer.errors import BadValue
from veneer.init import kaiming_uniform, zeros
from veneer.maths.factor import divisors
from veneer.maths.row_dropout import RowDropped
from veneer.method import Call, Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class LoKr(RowDropped):
    """W_eff = W + s · w1 ⊗ w2, s = alpha / r, out = o1 · o2, in = i1 · i2; y = x W_effᵀ + b

    Pick it for few parameters with a change that need not be of low rank: a 4096 × 4096 layer takes 5,120 numbers at
    r = 8, LoRA 65,536. Not where a weight's change has no block structure to share. The form for image generation is
    LyCORIS's (arXiv:2309.14859).

    Tensors: w1 [o1, i1], zeros, so training starts from the base; w2 [o2, i2], Kaiming-uniform(√5), or w2 = w2_a w2_b
    with w2_a [o2, r], w2_b [r, i2] where r < max(o2, i2) / 2. With decompose_both, w1 = w1_a w1_b likewise, w1_a zeros.
    Convolutions: i1 divides the channels, i2 counts the kernel. start="lycoris": w2 or w2_b is zeros, w1 is not.

    Args:
        decompose_factor: o1 and i1: this number where it divides the size, else the largest divisor up to it and to
            the root of the size; -1: the divisor next to the root.
    """

    r: int = option(8, "rank of the large factor, and in the scale whatever the factors", ge=1)
    alpha: float | None = option(None, "scale numerator; None means r", gt=0)
    decompose_both: bool = option(False, "give the small factor a rank, too")
    decompose_factor: int = option(-1, "size of the small factor; -1: as square as possible", ge=-1)
    rank_dropout_scale: bool = option(False, "divide rows that rank_dropout keeps by their share")
    start: str = option("zero_w1", "which factor starts at zero", choices=("zero_w1", "lycoris"))

    sizes = ("r", "decompose_factor")
    recomputes = True
    default_targets = "attn.q attn.v attn.qkv cross.q cross.v"
    aliases = {"rank": "r", "factor": "decompose_factor", "init_weights": "start"}

    def validate(self) -> None:
        if self.decompose_factor == 0:
            raise BadValue("LoKr: decompose_factor=0 divides nothing; choose 1 or more, or -1 for factors as square as possible.")

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.r

    @property
    def rescales(self) -> bool:
        return self.rank_dropout_scale

    def split(self, size: int) -> tuple[int, int]:
        """Two whole factors of a size, that of w1 first."""
        f = self.decompose_factor
        if f > 0 and size % f == 0:
            return f, size // f
        small = max(d for d in divisors(size) if d * d <= size and (f < 0 or d <= f))
        return small, size // small

    def init(self, site: Site, generator: Generator) -> Params:
        kernel = math.prod(site.kernel)
        (o1, o2), (i1, i2) = self.split(site.out_features), self.split(site.in_features // kernel)
        p: Params = {}
        for name, o, i, extra, thin in (("w1", o1, i1, 1, self.decompose_both), ("w2", o2, i2, kernel, True)):
            zero = {("w1", "zero_w1"): f"{name}_a", ("w2", "lycoris"): f"{name}_b"}.get((name, self.start))
            shapes = {f"{name}_a": (o, self.r), f"{name}_b": (self.r, i * extra)}
            if not (thin and 2 * self.r < max(o, i)):
                zero, shapes = zero and name, {name: (o, i * extra)}
            p.update({k: zeros(shape) if k == zero else kaiming_uniform(shape, generator) for k, shape in shapes.items()})
        return p

    def change(self, p: Params, site: Site) -> Tensor:
        w1, w2 = (p[w] if w in p else p[f"{w}_a"] @ p[f"{w}_b"] for w in ("w1", "w2"))
        blocks = (self.scale * w1)[:, None, :, None] * w2[:, None, :]  # [o1, o2, i1, i2]
        return blocks.flatten(2).flatten(0, 1)

    def delta(self, x: Tensor, p: Params, site: Site) -> Tensor:
        w1 = self.scale * (p["w1"] if "w1" in p else p["w1_a"] @ p["w1_b"])
        t = x.unflatten(-1, (w1.shape[1], -1))  # [..., i1, i2]: saved as a view of x
        for name in ("w2",) if "w2" in p else ("w2_b", "w2_a"):
            t = linear(t, p[name].to(x.dtype))
        return linear(t.mT, w1.to(x.dtype)).mT.flatten(-2)  # [..., o1, o2]

    def factors(self, p: Params, site: Site) -> tuple[Tensor, Tensor] | None:
        """(L1 ⊗ L2) (R1 ⊗ R2) from w1 = L1 R1 and w2 = L2 R2, where it is smaller than the dense change."""
        pairs = []
        for name in ("w1", "w2"):
            w = p.get(name)
            if w is None:
                pairs.append((p[f"{name}_a"], p[f"{name}_b"]))
            else:
                pairs.append((w, torch.eye(w.shape[1]).to(w)) if w.shape[0] > w.shape[1] else (torch.eye(w.shape[0]).to(w), w))
        (L1, R1), (L2, R2) = pairs
        rank = L1.shape[1] * L2.shape[1]
        if rank * (site.in_features + site.out_features) >= site.in_features * site.out_features:
            return None
        return torch.kron(self.scale * L1, L2), torch.kron(R1, R2)

    def low_rank(self, W: Tensor, p: Params, site: Site) -> tuple[Tensor, Tensor] | None:
        return self.factors(p, site)

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        m = self.rows_kept(call, p, site)
        if site.kind == "linear":
            y = self.again(lambda x, p: self.delta(x, p, site), x, p)
            return call(x) + (y if m is None else y * m.to(y.dtype))
        factors = self.factors(p, site) if site.kind == "embedding" else None  # a table's change would be as large as the table
        return self.with_dense(call, x, p, site, m) if factors is None else self.with_factors(call, x, *factors, m)
