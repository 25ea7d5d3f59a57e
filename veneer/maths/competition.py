"""Competing entries: a weight change of full rank from two thin matrices through a kernel, of which the largest entries stay
(2024, arXiv:2411.01800; 2025, arXiv:2510.24037)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import dropout

from veneer.init import kaiming_uniform
from veneer.kernels.kernelised import Rule, dense, kernelised_linear, pieces
from veneer.method import AdditiveMethod, Call, Params
from veneer.option import option
from veneer.site import Site


def squares(B: Tensor, A: Tensor) -> Tensor:
    """‖B[o] − A[i]‖² [out, in] of B [out, k] and A [in, k]; what is 0 but for rounding is 0.

    As ‖b‖² − 2 b·a + ‖a‖² in one product, so that nothing of [out, in, k] is built; in float64, to have digits to lose.
    """
    wide = torch.float32 if B.device.type == "mps" else torch.float64
    B, A = B.to(wide), A.to(wide)
    b, a = B.square().sum(1, keepdim=True), A.square().sum(1, keepdim=True)
    square = torch.cat([-2 * B, b, torch.ones_like(b)], 1) @ torch.cat([A, torch.ones_like(a), a], 1).T
    return square.masked_fill(square <= 64 * torch.finfo(wide).eps * (b.amax() + a.amax()), 0)


class _Distances(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(B: Tensor, A: Tensor) -> Tensor:
        return squares(B, A).to(B.dtype).sqrt_()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        B, A, D = ctx.saved_tensors
        R = (grad / D).masked_fill(D == 0, 0)
        return R.sum(1)[:, None] * B - R @ A, R.sum(0)[:, None] * A - R.T @ B


def distances(B: Tensor, A: Tensor) -> Tensor:
    """‖B[o] − A[i]‖ [out, in]; where it is 0 its gradient is 0."""
    return _Distances.apply(B, A)


def piecewise(B: Tensor, A: Tensor, alphas: Sequence[float] | Tensor) -> Tensor:
    """Σ_p alpha_p · ‖B_p[o] − A_p[i]‖ [out, in]; the columns of B and A fall into as many pieces as there are alphas."""
    first, *rest = [alpha * distances(b, a) for b, a, alpha in zip(B.chunk(len(alphas), 1), A.chunk(len(alphas), 1), alphas)]
    for one in rest:
        first = first + one
    return first


def squared(K: Tensor, t: Tensor) -> Tensor:
    """K · |K| where |K| > t, 0 elsewhere; the factor |K| counts as a constant."""
    size = K.detach().abs()
    return K * size.masked_fill(size <= t, 0)


@dataclass(frozen=True, kw_only=True)
class Competing(AdditiveMethod):
    """W_eff = W + ΔW, ΔW = gate(K), K[o, i] = a kernel of row o of B and row i of A. Give `rule`.

    Tensors: A [in, r] and B [out, r], uniform in ±1/√(n · columns of a piece), n = in for A and out for B.
    """

    dropout: float = option(0.0, "dropout on what ΔW reads, in training, but not at attention's output projection", ge=0, lt=1)
    drop_path: float = option(0.0, "share of the batch's rows that training leaves without ΔW", ge=0, lt=1)

    def rule(self, p: Params) -> Rule:
        """How ΔW comes from A, B and the other trained tensors."""
        raise NotImplementedError

    def thin(self, site: Site, generator: Generator, r: int, P: int) -> Params:
        """First A and B, for P pieces of columns."""
        sides = (("A", site.in_features), ("B", site.out_features))
        return {name: kaiming_uniform((n, r), generator, fan_in=n * (r // P)) for name, n in sides}

    def change(self, p: Params, site: Site) -> Tensor:
        return dense(self.rule(p), p, site.out_features)

    def delta(self, x: Tensor, p: Params, site: Site) -> Tensor:
        return kernelised_linear(x, self.rule(p), p, site.out_features)

    def adds(self, site: Site) -> bool:
        return site.kind == "linear" and not (self.dropout or self.drop_path)

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        drops = (self.dropout or self.drop_path) and call.training and x.is_floating_point()
        if not drops and (site.kind != "linear" or self.added_dense(x, site)):
            return call.rebuild(x, lambda W, p: self.weight(W, p, site), p)
        if not drops:
            return call(x) + self.delta(x, p, site)
        z = x if site.role in ("attn.o", "cross.o") else dropout(x, self.dropout)
        y = self.delta(z, p, site) if site.kind == "linear" else call.apply(z, weight=self.change(p, site), bias=None)
        if self.drop_path:
            y = y * dropout(y.new_ones([n if axis == site.batch_dim else 1 for axis, n in enumerate(y.shape)]), self.drop_path)
        return call(x) + y

    def added_dense(self, x: Tensor, site: Site) -> bool:
        """Whether one product with W + ΔW does: it saves two, but in half precision the sum would lose most of ΔW."""
        exact = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(x.device.type)
        return exact and pieces(site.out_features, site.in_features) == 1
