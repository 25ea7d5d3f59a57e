"""Dropout of a weight change's output rows, or of all of it: how LyCORIS's methods regularise (arXiv:2309.14859)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.method import AdditiveMethod, Call, Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True, kw_only=True)
class RowDropped(AdditiveMethod):
    """W_eff = W + diag(m) ΔW(p): m [out] is drawn in every training pass, and 1 everywhere else.

    Args:
        rescales: divide the rows that are kept by the share of them, as ordinary dropout does.
    """

    rank_dropout: float = option(0.0, "share of ΔW's output rows that training drops", ge=0, lt=1)
    module_dropout: float = option(0.0, "probability that training leaves the whole ΔW out", ge=0, lt=1)

    @property
    def rescales(self) -> bool:
        return True

    def adds(self, site: Site) -> bool:
        return site.kind == "linear" and not (self.rank_dropout or self.module_dropout)

    def rows_kept(self, call: Call, p: Params, site: Site) -> Tensor | None:
        """m [out] of this pass, or None where it is 1. Drawn outside of what backward runs again."""
        if not call.training or not (self.rank_dropout or self.module_dropout):
            return None
        like = next(iter(p.values()))
        m = like.new_ones(site.out_features)
        if self.rank_dropout:
            m = (torch.rand_like(m) >= self.rank_dropout).to(m.dtype)
            m = m / m.mean().clamp_min(1 / len(m)) if self.rescales else m
        return m * (torch.rand_like(m[:1]) >= self.module_dropout) if self.module_dropout else m

    def with_factors(self, call: Call, x: Tensor, L: Tensor, R: Tensor, m: Tensor | None) -> Tensor:
        """The layer with ΔW = L R, L [out, k], R [k, in]."""
        return call.add_low_rank(x, L if m is None else m[:, None] * L, R)

    def with_dense(self, call: Call, x: Tensor, p: Params, site: Site, m: Tensor | None) -> Tensor:
        """The layer with ΔW built dense, and built again in backward."""

        def build(W: Tensor, p: Params) -> Tensor:
            change = self.change(p, site).reshape(W.shape)
            return W + (change if m is None else m.reshape(-1, *(1,) * (W.ndim - 1)) * change)

        return call.rebuild(x, build, p)
