"""Cutting units out of a base model, and remembering which ones are left.

The list of kept units stays with the model, and goes into the file of every adapter that is saved on it, so that a whole
base can be pruned the same way when the adapter is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer import anatomy
from veneer.anatomy.families import HEADS, KV_HEADS
from veneer.anatomy.tree import plain_class
from veneer.errors import BadFile, Unsupported
from veneer.layer import Adapted
from veneer.pruned.units import Units, units_at
from veneer.site import Site

Kept = Mapping[str, Tensor]
"""Site of an output projection or a last feed-forward layer → a mask [heads] or [neurons] of what stays."""

RECORD = "_veneer_kept"
WIDTHS = ("all_head_size", "split_size", "all_head_dim")
"""Attributes of attention modules that give the width of all heads together."""


def kept_of(model: nn.Module) -> dict[str, Tensor]:
    """What is left of the base, over its whole units; {} if it is whole."""
    return model.__dict__.get(RECORD, {})


def remember(model: nn.Module, kept: Kept) -> None:
    """Notes what is left of a base that has been pruned."""
    model.__dict__[RECORD] = dict(kept)


@dataclass
class Cut:
    """What stays of one layer's outputs and inputs."""

    rows: Tensor
    columns: Tensor

    def of(self, site: Site) -> tuple[Tensor | None, Tensor | None]:
        """Masks over the outputs and inputs of a site of this layer; None where all stay."""
        rows = self.rows if site.rows is None else self.rows[slice(*site.rows)]
        return None if rows.all() else rows, None if self.columns.all() else self.columns


def cuts(model: nn.Module, kept: Kept) -> dict[str, Cut]:
    """Layer → what stays of it. Nothing is changed; raises as `units_at` does, and `BadFile` for masks that do not fit."""
    sites = anatomy.sites(model)
    out: dict[str, Cut] = {}
    for name, unit in units_at(model, sites, kept).items():
        mask = kept[name]
        if mask.shape != (unit.count,) or not mask.any() or (mask.view(-1, unit.group).any(1) != mask.view(-1, unit.group).all(1)).any():
            raise BadFile(f"pruning: the list of what is kept at {name} does not fit its {unit.count} units in groups of {unit.group}.")
        for site in (unit.end, *unit.feeders):
            if site.module not in out:
                shape = anatomy.weights.linear_shape(model.get_submodule(site.module))
                assert shape is not None
                out[site.module] = Cut(torch.ones(shape[0], dtype=torch.bool), torch.ones(shape[1], dtype=torch.bool))
        out[unit.end.module].columns &= unit.columns(mask)
        for feeder in unit.feeders:
            out[feeder.module].rows[slice(*(feeder.rows or (None,)))] &= unit.rows(feeder, mask)
    return out


@torch.no_grad()
def prune(model: nn.Module, kept: Kept) -> None:
    """Leaves the units out of a plain model (no adapters on it), in place: layers shrink, and with them all they give and read."""
    if any(isinstance(m, Adapted) for m in model.modules()):
        raise Unsupported("pruning: adapters are attached; what they hold would not fit any more. Detach them, or load the base anew.")
    kept = {name: mask.cpu().bool() for name, mask in kept.items()}
    found = units_at(model, anatomy.sites(model), kept)
    for path, cut in cuts(model, kept).items():
        _narrow(model.get_submodule(path), cut)
    for name, unit in found.items():
        if unit.core:
            _tell_heads(model.get_submodule(unit.core), unit, int(kept[name].sum()))
    before = kept_of(model)
    remember(model, before | {name: _composed(before[name], mask) if name in before else mask for name, mask in kept.items()})


def _composed(before: Tensor, now: Tensor) -> Tensor:
    """A mask over the whole, from one over what an earlier one left."""
    out = before.clone()
    out[before.nonzero()[:, 0]] = now
    return out


def _narrow(module: Any, cut: Cut) -> None:
    rows, columns = (mask.nonzero()[:, 0].to(module.weight.device) for mask in (cut.rows, cut.columns))
    stored_in_out = plain_class(module).__name__ == "Conv1D"
    first, second = (columns, rows) if stored_in_out else (rows, columns)
    weight = module.weight.index_select(0, first).index_select(1, second)
    module.weight = nn.Parameter(weight.contiguous(), requires_grad=module.weight.requires_grad)
    if module.bias is not None:
        module.bias = nn.Parameter(module.bias.index_select(0, rows), requires_grad=module.bias.requires_grad)
    for names, size in ((("out_features", "nf"), len(rows)), (("in_features", "nx"), len(columns))):
        for name in names:
            if name in module.__dict__:
                setattr(module, name, size)


def _tell_heads(core: Any, unit: Units, heads: int) -> None:
    """The attention module's own numbers of heads; where it has none, one that tells later readers."""
    own = vars(core)
    sizes = dict.fromkeys(HEADS, heads) | dict.fromkeys(KV_HEADS, heads // unit.group) | dict.fromkeys(WIDTHS, heads * unit.end.head_dim)
    for name, size in sizes.items():
        if isinstance(own.get(name), int):
            setattr(core, name, size)
    if not any(isinstance(own.get(name), int) for name in HEADS):
        core.num_heads = heads
