"""SHiRA: a few entries of the weight trained, one or two in a hundred, the rest left alone (2024, arXiv:2406.13175)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from veneer.init import zeros
from veneer.kernels.sparse import denser, placed, sparse_linear
from veneer.method import AdditiveMethod, Call, Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class SHiRA(AdditiveMethod):
    """W_eff = W + ΔW, ΔW[rows, columns] = v at n = r (in + out) fixed positions, 0 elsewhere; y = x W_effᵀ + b

    Pick it where adapters are to be switched or combined on a device: merged, it changes few entries, and two adapters
    hardly meet. Full rank at LoRA's count. Not where training speed comes first: a sparse product runs below a dense
    one's rate.

    Tensors: v [n], zeros: starts as the base, ordered by position, row by row; indices [2, n] (row, column), fixed.

    Args:
        mask: "random" positions, a permutation's first; "magnitude", the largest entries of |W|, kept in files; "band",
            those nearest to the line from the first entry to the last.
    """

    r: int = option(32, "a LoRA of this rank has as many numbers", ge=1)
    mask: str = option("random", "which positions", choices=("random", "magnitude", "band"))
    seed: int = option(0, "of the random positions", ge=0)

    default_lr = 5e-4
    default_targets = "attn.q attn.v attn.qkv cross.q cross.v"
    aliases = {"mask_type": "mask", "random_seed": "seed"}

    frozen = ("indices",)

    @property
    def fixed(self) -> tuple[str, ...]:  # type: ignore[override]
        return () if self.mask == "magnitude" else ("indices",)

    @property
    def reads_weight(self) -> bool:
        return self.mask == "magnitude"

    def check(self, site: Site) -> None:
        out, inside = site.out_features, site.in_features
        if self.r * (inside + out) > inside * out:
            most = inside * out // (inside + out)
            choose = f"choose r ≤ {most}" if most else "choose other targets"
            raise self.refuse(f"r={self.r} asks for {self.r * (inside + out)} of the {inside * out} entries {{at}}; {choose}.", site)

    def check_tensors(self, p: Params, site: Site) -> None:
        at = p["indices"]
        whole = at.dtype == torch.int64 and at.shape == (2, p["v"].numel())
        flat = at[0] * site.in_features + at[1] if whole else at.flatten()
        inside = whole and bool((at >= 0).all() and (at[0] < site.out_features).all() and (at[1] < site.in_features).all())
        if not inside or not bool((flat.diff() > 0).all()):
            raise self.refuse(f"positions must lie in [{site.out_features}, {site.in_features}], row by row, each once {{at}}.", site)

    def init(self, site: Site, generator: Generator) -> Params:
        out, inside = site.out_features, site.in_features
        n = self.r * (inside + out)
        if self.mask == "band":  # nearness in whole numbers, ties row by row: the same everywhere
            far = (torch.arange(out)[:, None] * 2 + 1) * inside - (torch.arange(inside) * 2 + 1) * out
            at = far.abs().flatten().argsort(stable=True)[:n]
        else:
            at = torch.randperm(inside * out, generator=Generator().manual_seed(self.seed))[:n]
        return {"v": zeros((n,)), "indices": self.row_by_row(at, inside)}

    def init_from_weight(self, W: Tensor, b: Tensor | None, p: Params, site: Site, generator: Generator) -> Params:
        largest = W.flatten().abs().topk(len(p["v"])).indices
        return {**p, "indices": self.row_by_row(largest, site.in_features)}

    @staticmethod
    def row_by_row(at: Tensor, inside: int) -> Tensor:
        """Rows and columns [2, n] of flat positions, row by row."""
        at = at.sort().values
        return torch.stack([at // inside, at % inside])

    def adds(self, site: Site) -> bool:
        return site.kind == "linear"

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        if denser(p["v"].numel(), site.out_features, site.in_features):
            return call.rebuild(x, lambda W, p: self.weight(W, p, site), p)
        return super().forward(call, x, p, site)

    def change(self, p: Params, site: Site) -> Tensor:
        return placed(p["v"], p["indices"], site.out_features, site.in_features)

    def weight(self, W: Tensor, p: Params, site: Site | None = None) -> Tensor:
        flat, v, at = W.flatten(1), p["v"], p["indices"]
        return flat.flatten().index_add(0, at[0] * flat.shape[1] + at[1], v.to(W.dtype)).view(W.shape)

    def delta(self, x: Tensor, p: Params, site: Site) -> Tensor:
        return sparse_linear(x, p["v"], p["indices"], site.out_features)
