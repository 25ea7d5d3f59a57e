"""A model of linear integers from an adapter that learned steps: codes, steps and offsets of every layer, and nothing beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from veneer.errors import Unsupported
from veneer.maths.grids import from_codes
from veneer.method import Params
from veneer.part import compute_dtype

if TYPE_CHECKING:
    from veneer.tuned import Tuned


@torch.no_grad()
def integers(tuned: Tuned, name: str | None = None) -> dict[str, Params]:
    """Codes [out, in] in int8, steps s and offsets beta [out, in/group] of every site of an adapter (by default the first active one).

    W_eff = code · s + beta for every group of neighbouring columns (`weight_of`) is the very weight the adapter trains with.

    Raises:
        Unsupported: the adapter's method has no integers, shares a site with another one, or is merged into the base now.
    """
    adapter = tuned._one(name)
    own = [part for part in adapter.parts if hasattr(part.method, "pieces")]
    shared = {part.site.name for part in own} & {part.site.name for part in adapter.parts if part not in own}
    if not own or shared:
        at = f" (both at {min(shared)})" if shared else ""
        raise Unsupported(f"integers: {adapter.method.label} does not learn the steps of its own integers; l4q alone does{at}.")
    if tuned._merging:
        raise Unsupported("integers: adapters are merged into the base; call unmerge() first.")
    found: dict[str, Params] = {}
    for part in own:
        module, site, p = tuned.model.get_submodule(part.site.module), part.site, part.tensors()
        W = module._modules["veneer"].forms[site.parameter].weight(module)  # type: ignore[union-attr, index]
        W = W.to(compute_dtype(W))
        if site.rows is not None:
            W = W[:, slice(*site.rows)] if site.count else W[slice(*site.rows)]
        each = [part.method.pieces(w, {k: t[i] for k, t in p.items()}) for i, w in enumerate(W)] if site.count else None  # type: ignore[attr-defined]
        codes, s, beta = map(torch.stack, zip(*each)) if each else part.method.pieces(W, p)  # type: ignore[attr-defined]
        found[site.name] = {"codes": codes.to(torch.int8), "s": s.detach(), "beta": beta.detach()}
    return found


def weight_of(piece: Params) -> Tensor:
    """The weight [out, in] of one site's codes, steps and offsets."""
    return from_codes(piece["codes"], piece["s"], piece["beta"])
