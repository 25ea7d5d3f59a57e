"""Pruned bases in adapters' files: every adapter saved on one lists what was kept, and a whole base is pruned so before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer import anatomy
from veneer.errors import Mismatch, NoMatch, Unsupported
from veneer.pruned.base import kept_of, prune, remember
from veneer.pruned.units import units_at

PREFIX = "@kept/"
"""Begins the names of the masks in a file: @kept/site → [heads] or [neurons] of the whole base."""


def stored(model: nn.Module) -> dict[str, Tensor]:
    """The masks of a pruned base as tensors of an adapter's file."""
    return {PREFIX + name: mask for name, mask in kept_of(model).items()}


def facts(model: nn.Module) -> dict[str, Any]:
    """How much of what was pruned is left, to read."""
    kept = kept_of(model)
    return {"pruned": {name: f"{int(mask.sum())} of {len(mask)}" for name, mask in kept.items()}} if kept else {}


def fit(model: nn.Module, tensors: Mapping[str, Tensor], folder: Any) -> None:
    """Prunes a whole base as an adapter's file says; does nothing to one that is pruned so already.

    Raises `Mismatch` for a base of another shape or pruned in another way; nothing has changed then.
    """
    wanted = {name.removeprefix(PREFIX): mask.bool() for name, mask in tensors.items() if name.startswith(PREFIX)}
    have = kept_of(model)
    if not wanted and not have:
        return
    prefix = (getattr(model, "base_model_prefix", "") or "") + "."
    here = {s.name: s for s in anatomy.sites(model)}
    wanted = {next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in here), name): m for name, m in wanted.items()}
    if have:
        if have.keys() != wanted.keys() or any(not torch.equal(have[name], mask) for name, mask in wanted.items()):
            kind = "pruned in another way than this model is" if wanted else "made for a whole base, and this model is pruned"
            raise Mismatch(f"{folder}: {kind}. Load the base anew, then the adapter.")
        return
    try:
        found = units_at(model, list(here.values()), wanted)
    except (NoMatch, Unsupported) as error:
        raise Mismatch(f"{folder}: made for a pruned base, and this model cannot be pruned the same way. {error}") from None
    left = {name: (int(wanted[name].sum()), len(wanted[name]), unit.count) for name, unit in found.items()}
    if all(count == kept for kept, _, count in left.values()):
        remember(model, wanted)  # pruned already, by other means
        return
    for name, (_, whole, count) in left.items():
        if count != whole:
            raise Mismatch(f"{folder}: made for a base with {whole} units at {name}, of which some are kept; this model has {count}.")
    prune(model, wanted)
