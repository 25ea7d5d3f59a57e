"""FourierFT: a few trained frequencies of the weight's change, the same ones in all layers of a shape (2024, arXiv:2405.03003)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from veneer.maths.scattered import Scattered
from veneer.method import Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class FourierFT(Scattered):
    """W_eff = W + alpha · Re ifft2(C), ΔW[i, j] = alpha / (out · in) · Σ_k c_k cos 2π(i u_k / out + j v_k / in); y = x W_effᵀ + b

    Pick it for very small files: n numbers a layer, whatever its width. Not for speed on wide layers: with the usual n the dense
    change is rebuilt in every step. It wants learning rates 10 to 100 times LoRA's, since one coefficient spreads over all entries.

    Tensors: c [n], zeros: starts as the base; indices [2, n], the (u_k, v_k), fixed: the first n of a random permutation
    of all out · in positions. start="normal", c ~ N(0, 1), is the start of the authors and of other libraries.
    """

    n: int = option(1000, "trained frequencies of each layer", ge=1)
    alpha: float = option(150.0, "scale", gt=0)

    default_lr = 1e-2
    default_targets = "attn.q attn.v attn.qkv cross.q cross.v"
    aliases = {"n_frequency": "n", "scaling": "alpha", "random_loc_seed": "seed"}

    def change(self, p: Params, site: Site) -> Tensor:
        """By the half of the spectrum that a real matrix needs: the wave (u, v) is the wave (−u, −v), and c / 2 of both together."""
        out, inside, (u, v) = site.out_features, site.in_features, p["indices"]
        width = inside // 2 + 1
        u, v = torch.where(v < width, u, -u) % out, torch.where(v < width, v, inside - v)
        mirrored = (-u % out) * width + v  # counts only in the columns that are their own mirror
        both = torch.cat([p["c"], p["c"] * (2 * v % inside == 0)]) / 2
        X = p["c"].new_zeros(out * width).scatter_add(0, torch.cat([u * width + v, mirrored]), both)
        return self.alpha * torch.fft.irfft2(torch.complex(X, torch.zeros_like(X)).view(out, width), s=(out, inside))

    def thin(self, site: Site) -> bool:
        """Against the dense gradient's in · out per token: three thin products of width 2n, there and back."""
        return 6 * self.n * (site.in_features + site.out_features) <= site.in_features * site.out_features

    def factors(self, p: Params, site: Site) -> tuple[Tensor, Tensor]:
        """L [out, 2n] and R [2n, in]: cos(a + b) = cos a cos b − sin a sin b."""
        c, (u, v) = self.alpha / (site.out_features * site.in_features) * p["c"], p["indices"]
        a, b = self.angles(u, site.out_features, c), self.angles(v, site.in_features, c)
        return torch.cat([a.cos() * c, -a.sin() * c], 1), torch.cat([b.cos(), b.sin()], 1).T

    @staticmethod
    def angles(frequency: Tensor, size: int, like: Tensor) -> Tensor:
        """2π i u / size as [size, n]; i u is taken modulo size in whole numbers, so that single precision is enough."""
        turns = torch.arange(size, device=frequency.device)[:, None] * frequency % size
        return turns.to(like.dtype) * (2 * math.pi / size)

    def product(self, x: Tensor, p: Params, site: Site) -> Tensor:
        L, R = self.factors(p, site)
        return linear(linear(x, R.to(x.dtype)), L.to(x.dtype))

    def low_rank(self, W: Tensor, p: Params, site: Site) -> tuple[Tensor, Tensor] | None:
        return self.factors(p, site) if 2 * self.n <= min(site.out_features, site.in_features) else None
