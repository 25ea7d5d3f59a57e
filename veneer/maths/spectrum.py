"""Singular spectra of frozen weights: ranks that hold a share of the sum, leading vectors, a share for a budget (arXiv:2408.03290)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from veneer import anatomy
from veneer.errors import BadValue, Unsupported
from veneer.forms import form_of
from veneer.maths.starts import working
from veneer.method import Method, replaced
from veneer.site import Site

M = TypeVar("M", bound=Method)


def rank_of(S: Tensor, m: float) -> int:
    """The smallest k with S_1 + … + S_k ≥ m · ΣS, from singular values S [q] in descending order; at least 1.

    Sums of values, not of squares. m = 1 gives the numerical rank: values of the size of rounding do not count.
    Raises `BadValue` for an m outside (0, 1] or a spectrum of zeros.
    """
    if not 0 < m <= 1:
        raise BadValue(f"rank_of: m={m!r} must be more than 0 and at most 1.")
    eps = torch.finfo(S.dtype).eps
    S = S.detach().cpu().double()
    if not S[0] > 0:
        raise BadValue("rank_of: all singular values are zero, so no rank holds a share of them.")
    most = int((S / S[0] > len(S) * eps).sum())
    if m == 1:
        return most
    sums = S.cumsum(0)
    return min(int((sums < m * sums[-1] * (1 - 16 * eps)).sum()) + 1, most)  # 16 ε: a sum that is the share but for rounding


def leading(W: Tensor, m: float) -> tuple[Tensor, Tensor]:
    """U [out, k] and Vᵀ [k, in], the leading singular vectors of W [out, in] that hold the share m of its spectrum.

    Signs are fixed: the largest entry by magnitude of every column of U is positive.
    """
    U, S, Vt = torch.linalg.svd(working(W.flatten(1)), full_matrices=False)
    k = rank_of(S, m)
    U, Vt = U[:, :k], Vt[:k]
    sign = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()  # [1, k]
    return U * sign, Vt * sign.T


def readable(method: Method, W: Tensor, site: Site) -> Tensor:
    """W [out, in] in at least float32. Raises where it has no spectrum to read a rank from."""
    if W.is_meta:
        raise Unsupported(
            f"{method.label}: its ranks come from the singular values of the weights, and {site.name} has none here; "
            "load the model with its weights."
        )
    if not W.any():
        raise method.refuse("the weight {at} is zero everywhere, so it gives no rank; choose other targets.", site)
    return working(W.flatten(1))


def spectra(model: nn.Module, method: Method) -> dict[str, tuple[Site, Tensor]]:
    """The singular values, descending, of every weight that the method acts on, with its site, by the site's name."""
    found = {}
    for site in method.select(anatomy.sites(model)):
        method.check(site)
        module = model.get_submodule(site.module)
        W = form_of(module, site.kind, site.parameter).weight(module)
        own = W if site.rows is None else W[slice(*site.rows)]
        found[site.name] = site, torch.linalg.svdvals(readable(method, own, site))
    return found


def ranks(model: nn.Module, method: Any) -> dict[str, int]:
    """The rank that the method's share m gives every weight it acts on, by the site's name; reads the model's weights."""
    return {name: rank_of(S, method.m) for name, (_, S) in spectra(model, method).items()}


def share_within(found: Mapping[str, Tensor], count: Callable[[Mapping[str, int]], int], budget: int) -> float:
    """The largest share m whose ranks need no more than `budget` trained parameters.

    Args:
        found: singular values, descending, by site name.
        count: trained parameters of some ranks by site name; must grow with them.

    Raises:
        BadValue: even rank 1 everywhere needs more.
    """
    shares = [(S.detach().cpu().double().cumsum(0) / S.detach().cpu().double().sum()) for S in found.values()]
    steps = torch.cat([*shares, torch.ones(1, dtype=torch.float64)]).unique().clamp(max=1).tolist()  # ranks change at these only
    low, high = -1, len(steps) - 1  # the largest affordable step is in (low, high]
    while low < high:
        middle = (low + high + 1) // 2
        if count({name: rank_of(S, steps[middle]) for name, S in found.items()}) <= budget:
            low = middle
        else:
            high = middle - 1
    if low < 0:
        least = count(dict.fromkeys(found, 1))
        raise BadValue(
            f"a budget of {budget} parameters is less than the {least} that rank 1 everywhere needs; raise it or choose fewer targets."
        )
    return steps[low]


def within(method: M, model: nn.Module, budget: int, count: Callable[[Site, int], int]) -> M:
    """The method with the largest share m that trains at most `budget` parameters of this model; reads its weights.

    Args:
        count: trained parameters at a site of some rank.

    Raises:
        BadValue: even rank 1 everywhere needs more.
    """
    found = spectra(model, method)

    def total(ranks: Mapping[str, int]) -> int:
        return sum(count(found[name][0], k) for name, k in ranks.items())

    try:
        m = share_within({name: S for name, (_, S) in found.items()}, total, budget)
    except BadValue as error:
        raise BadValue(f"{method.label}: {error}") from None
    return replaced(method, {"m": m})  # type: ignore[return-value]
