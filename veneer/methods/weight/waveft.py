"""WaveFT: a few trained wavelet coefficients of the weight's change (2025, arXiv:2505.12532)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from veneer.kernels.sparse import placed, sparse_linear
from veneer.maths.scattered import Scattered
from veneer.maths.wavelet import analysed_padded, filters, padded, spread, synthesised_padded
from veneer.method import Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class WaveFT(Scattered):
    """W_eff = W + alpha · T_out C T_inᵀ, T the one-level inverse wavelet transform cut to the layer's sizes; y = x W_effᵀ + b

    Pick it for a fine-grained budget (any n) with local changes of full rank: with Haar each coefficient moves a 2×2 patch of
    the weight by ½. Not where learning rates cannot be lowered: alpha makes one step count as 25 of LoRA's.

    Tensors: c [n], zeros: starts as the base; indices [2, n] (row, column), fixed: the first n of a random permutation of
    all out · in positions of C, which is then framed by zeros to even sizes. Its quadrants: the right one is high-pass
    along rows, the lower one along columns.

    Args:
        density: n = density · out · in coefficients at each layer instead of n. Other libraries' proportional_parameters is
            density = n · layers / (out · in summed over all layers).
        use_idwt: False: the coefficients are entries of ΔW themselves, no wavelets.
    """

    n: int = option(2592, "trained coefficients of each layer", ge=1)
    alpha: float = option(25.0, "scale", gt=0)
    wavelet: str = option("db1", "Daubechies family; db1 is Haar", choices=("db1", "db2", "db3", "db4"))
    density: float | None = option(None, "share of a layer's entries, in place of n", gt=0, le=1)
    use_idwt: bool = option(True, "transform the coefficients")

    default_lr = 1e-4
    default_targets = "attn.q attn.v attn.qkv cross.q cross.v"
    aliases = {"n_frequency": "n", "scaling": "alpha", "random_loc_seed": "seed", "wavelet_family": "wavelet"}

    def count(self, site: Site) -> int:
        return self.n if self.density is None else max(1, round(self.density * site.out_features * site.in_features))

    def framed(self, site: Site) -> tuple[int, int]:
        """Rows and columns of the coefficients with their frame of zeros."""
        return padded(site.out_features, self.wavelet), padded(site.in_features, self.wavelet)

    def places(self, indices: Tensor, site: Site) -> Tensor:
        """indices as rows and columns of the frame, low half before high half on both axes [2, n]."""
        (P, Q), (row, column) = self.framed(site), indices
        row, column = row + (P - site.out_features) // 2, column + (Q - site.in_features) // 2
        below, right = row >= P // 2, column >= Q // 2
        return torch.stack([row + (right.long() - below.long()) * (P // 2), column + (below.long() - right.long()) * (Q // 2)])

    def change(self, p: Params, site: Site) -> Tensor:
        out, inside, c = site.out_features, site.in_features, self.alpha * p["c"]
        if not self.use_idwt:
            return placed(c, p["indices"], out, inside)
        rows, columns = self.places(p["indices"], site)
        if len(c) * len(filters(self.wavelet)[0]) ** 2 > out * inside:  # too many for a patch each
            C = placed(c, torch.stack([rows, columns]), *self.framed(site))
            return synthesised_padded(synthesised_padded(C, inside, self.wavelet).T, out, self.wavelet).T
        (i, a), (j, b) = spread(rows, out, self.wavelet, c), spread(columns, inside, self.wavelet, c)
        at, patches = i.unsqueeze(-1) * inside + j.unsqueeze(-2), c[:, None, None] * a.unsqueeze(-1) * b.unsqueeze(-2)
        return c.new_zeros(out * inside).scatter_add(0, at.flatten(), patches.flatten()).view(out, inside)

    def thin(self, site: Site) -> bool:
        """A sparse product runs at some hundredth of the rate of the dense gradient that it saves."""
        return 500 * self.count(site) <= site.out_features * site.in_features

    def product(self, x: Tensor, p: Params, site: Site) -> Tensor:
        indices = self.places(p["indices"], site) if self.use_idwt else p["indices"]
        out, inside = self.framed(site) if self.use_idwt else (site.out_features, site.in_features)
        order = (indices[0] * inside + indices[1]).argsort()  # the product wants them row by row
        indices = indices[:, order]

        def run(x: Tensor, c: Tensor) -> Tensor:
            if not self.use_idwt:
                return sparse_linear(x, c, indices, out)
            y = sparse_linear(analysed_padded(x, self.wavelet), c, indices, out)
            return synthesised_padded(y, site.out_features, self.wavelet)

        return checkpoint(run, x, self.alpha * p["c"][order], use_reentrant=False)  # keeps x alone, which other layers share
