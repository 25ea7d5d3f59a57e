"""Methods that turn what a layer reads by a matrix made of small pieces, and the algebra of such matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.method import Call, InputMethod, Params
from veneer.site import Site


@dataclass(frozen=True)
class Rotation(InputMethod):
    """W_eff = W Mᵀ; y = (x M) Wᵀ + b. Give `pieces` and `turned`: M itself is never formed.

    Of an embedding table the vectors are turned: e becomes e M with M [dim, dim].
    """

    def pieces(self, p: Params, site: Site, training: bool = False) -> Params:
        """The small tensors that M is made of, in the tensors' own dtype."""
        raise NotImplementedError

    def turned(self, x: Tensor, pieces: Params, back: bool = False) -> Tensor:
        """x M [..., width] in x's dtype; x Mᵀ if `back`."""
        raise NotImplementedError

    def _exact(self, p: Params, site: Site, training: bool = False) -> Params:
        with torch.autocast(next(iter(p.values())).device.type, enabled=False):  # small matrices that are rounded rotate no more
            return self.pieces(p, site, training)

    def turn(self, x: Tensor, p: Params, site: Site) -> Tensor:
        return self.turned(x, self._exact(p, site))

    def weight(self, W: Tensor, p: Params, site: Site | None = None) -> Tensor:
        site = site or Site.bare(W)
        return self.rebuilt(W, self._exact(p, site), site)

    def rebuilt(self, W: Tensor, pieces: Params, site: Site) -> Tensor:
        """The weight, with the pieces at hand."""
        if site.kind == "embedding":
            return self.turned(W.T, pieces).T
        return self.turned(W.flatten(1), pieces, back=True).reshape(W.shape)

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        if site.kind == "linear" and self.recomputes:
            return call(self.again(lambda x, p: self.turn(x, p, site), x, p))
        pieces = self._exact(p, site, call.training)
        if site.kind == "linear":
            return call(self.turned(x, pieces))
        if site.kind == "embedding":
            return self.turned(call(x), pieces)
        return call.rebuild(x, lambda W, pieces: self.rebuilt(W, pieces, site), pieces)


def width(site: Site) -> int:
    """The number of features that are turned: those the layer reads, or the length of an embedding table's vectors."""
    return site.out_features if site.kind == "embedding" else site.in_features


def identity(like: Tensor) -> Tensor:
    """I of the size, dtype and device of square matrices."""
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def cayley(A: Tensor) -> Tensor:
    """(I − A)(I + A)⁻¹ − I = −2 (I + A)⁻¹ A for skew matrices A [..., k, k]: exact where A is small."""
    return torch.linalg.solve(identity(A) + A, -2 * A)


def neumann(A: Tensor, terms: int) -> Tensor:
    """(I + A)(I − A)⁻¹ − I cut to 2A + 2A² + … + 2A^(terms−2) + A^(terms−1); two terms give 2A, three count as four."""
    if terms == 2:
        return 2 * A
    two = 2 * identity(A)
    S = two + A
    for _ in range(max(terms, 4) - 3):
        S = two + A @ S
    return A @ S
