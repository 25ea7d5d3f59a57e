"""BOFT: a layer's input turned by a butterfly of block rotations, its output rescaled (2023, arXiv:2311.06243)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from veneer.init import ones, zeros
from veneer.kernels.blocks import turned_by_blocks
from veneer.kernels.scale_rotate import scale
from veneer.maths.factor import divisors
from veneer.maths.rotation import Rotation, cayley, width
from veneer.method import Call, Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class BOFT(Rotation):
    """W_eff = diag(s) W Rotᵀ, Rot = B_(m−1) … B_0, B_f = P_f blockdiag((I − A)(I + A)⁻¹) P_fᵀ; y = s ⊙ ((x Rot) Wᵀ) + b

    Pick it instead of OFT where every input should be able to reach every other: m factors of small blocks join
    k · 2^(m−1) features at the price of m thin products. Each factor runs again in backward.
    On embedding tables it turns and rescales the vectors.

    Tensors: R [m, N, k, k], zeros, of which the skew halves A = (R − Rᵀ)/2 act; s [out, 1], ones: starts as the base.
    N = in / k. P_f reorders, in every run of k · 2^f features, the chunks of k/2: the even ones, then the odd ones.
    """

    k: int = option(4, "block size; k · 2^(m−1) must divide what is turned", ge=2)
    m: int = option(1, "number of butterfly factors", ge=1)

    sizes = ("k", "m")
    recomputes = True
    default_targets = "attn.q attn.v attn.qkv cross.q cross.v"
    aliases = {
        "block_size": "k",
        "boft_block_size": "k",
        "n_butterfly_factors": "m",
        "boft_n_butterfly_factor": "m",
    }

    def check(self, site: Site) -> None:
        size = width(site)
        if self.fits(self.k, self.m, size):
            return
        legal = [(k, m) for m in range(self.m, 0, -1) for k in divisors(size)[1:] if self.fits(k, m, size)]
        near = sorted(legal, key=lambda fit: (self.m - fit[1], abs(fit[0] - self.k)))[:2]  # as many factors, then as near a size
        choose = "choose " + " or ".join(f"k={k}, m={m}" for k, m in near) if near else "choose other targets"
        rule = "k · 2^(m−1) must divide them, and k be even where m > 1"
        raise self.refuse(f"k={self.k}, m={self.m} do not fit the {size} features {{at}}: {rule}; {choose}.", site)

    @staticmethod
    def fits(k: int, m: int, size: int) -> bool:
        """Whether m factors of blocks of k cut this many features."""
        return size % (k * 2 ** (m - 1)) == 0 and (m == 1 or k % 2 == 0)

    def init(self, site: Site, generator: Generator) -> Params:
        return {"R": zeros((self.m, width(site) // self.k, self.k, self.k)), "s": ones((site.out_features, 1))}

    def pieces(self, p: Params, site: Site, training: bool = False) -> Params:
        return {"C": cayley((p["R"] - p["R"].mT) / 2), "s": p["s"]}  # blocks of every factor, less I

    def turned(self, x: Tensor, pieces: Params, back: bool = False) -> Tensor:
        C = pieces["C"].to(x.dtype)
        for f in range(self.m) if back else reversed(range(self.m)):
            block = C[f].mT if back else C[f]
            x = _dealt(turned_by_blocks(_dealt(x, 2, 2**f, self.k // 2), block), 2**f, 2, self.k // 2)
        return x

    def rebuilt(self, W: Tensor, pieces: Params, site: Site) -> Tensor:
        turned = super().rebuilt(W, pieces, site)
        return pieces["s"].reshape(-1, *(1,) * (W.ndim - 1)) * turned

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        y = super().forward(call, x, p, site)
        if site.kind not in ("linear", "embedding"):
            return y
        b = call.bias() if site.kind == "linear" else None
        h = y if b is None else y - b.to(y.dtype)
        s = p["s"].squeeze(1)
        if s.dtype == h.dtype:
            return scale(h, s, None if b is None else b.to(h.dtype))
        return torch.addcmul(y, h, (s - 1).to(y.dtype))  # s h + b; in half precision 1 + a small step is 1


def _dealt(x: Tensor, rows: int, columns: int, size: int) -> Tensor:
    """In every run of rows · columns chunks of `size` features: column by column instead of row by row."""
    return x if min(rows, columns) == 1 else x.unflatten(-1, (-1, rows, columns, size)).transpose(-3, -2).flatten(-4)
