"""What is left of an adapter when its base, its modules and their ranks shrink."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer import anatomy
from veneer.adapter import Adapter
from veneer.method import Method, Params
from veneer.part import Part
from veneer.plan import stacked
from veneer.pruned.base import Cut, cuts
from veneer.pruned.modules import FACT, is_module, key_of, masks_of
from veneer.pruned.shrinking import axes, rank_axes, resized, shrunk
from veneer.site import Site, whole_sites
from veneer.slot import Slot
from veneer.source import Source
from veneer.tuned import Tuned


@dataclass
class Piece:
    """One part in its new shape."""

    index: int
    site: str
    method: Method
    tensors: Params
    shared: Params


def pieces_of(model: nn.Module, adapter: Adapter, kept: Mapping[str, Tensor], alive: Mapping[str, Tensor]) -> list[Piece]:
    plan = cuts(model, kept)
    cut_at = {part.site.depth for part in adapter.parts if part.site.name in kept and part.site.role == "attn.o"}
    pieces = []
    for part in adapter.parts:
        if masks_of(part) or (is_module(part) and key_of(part) not in alive):
            continue
        if part.site.kind == "attention" and part.site.depth in cut_at:
            raise part.method.refuse("it has keys and values for heads that go {at}; leave heads whole with rho_a=0", part.site)
        ranks = alive.get(key_of(part), torch.zeros(0))
        pieces.append(_piece(part, plan.get(part.site.module) if part.site.kind == "linear" else None, ranks))
    untouched = len(pieces) == sum(not masks_of(part) for part in adapter.parts)
    for piece in pieces:
        if piece.shared and not untouched:
            raise piece.method.refuse(
                "its sites share tensors, so that none of them can go alone; keep all with rho_m=0", _site(adapter, piece)
            )
    return pieces


def _site(adapter: Adapter, piece: Piece) -> Site:
    return next(s for s in adapter.sites if s.name == piece.site)


def _piece(part: Part, cut: Cut | None, ranks: Tensor) -> Piece:
    tensors, method = part.tensors(), part.method
    shared = {key: tensors.pop(key).detach() for key in part.shared_keys}
    cuts: dict[str, dict[int, Tensor]] = {}
    rows, columns = cut.of(part.site) if cut else (None, None)
    for mask, what in ((rows, "out"), (columns, "in")):
        if mask is None:
            continue
        found = axes(method, what, part.site.role)
        if found is None or shared:
            raise method.refuse(f"its tensors cannot follow when some {what}puts of the layer go {{at}}; choose other targets", part.site)
        for name, axis in found.items():
            cuts.setdefault(name, {})[axis] = mask
    if len(ranks) and not ranks.all():
        for name, axis in rank_axes(part).items():
            cuts.setdefault(name, {})[axis] = ranks
        method = resized(method, int(ranks.sum()))
    return Piece(part.index, part.site.name, method, shrunk(tensors, cuts), shared)


class Given(Source):
    """Tensors that are there already."""

    def __init__(self, pieces: Mapping[str, Piece]):
        self.pieces = pieces

    def shared(self, part: Method, group: str, members: Sequence[Site]) -> Params:
        return self.pieces[members[0].name].shared

    def own(self, method: Method, site: Site, module: nn.Module, slot: Slot, like: Tensor, shared: Params) -> Params:
        return self.pieces[site.name].tensors


def attach_pieces(model: nn.Module, old: Adapter, pieces: Sequence[Piece]) -> Tuned:
    """A fresh adapter of these pieces, under the old one's name."""
    sites = anatomy.sites(model)
    here = {s.name: s for s in [*whole_sites(sites), *sites]}
    planned, parts = [], []
    for index, part in enumerate(old.method.parts):
        own = {piece.site: piece for piece in pieces if piece.index == index}
        if own:
            parts.append(part)
            planned.append((part, [(piece.method, here[name]) for name, piece in own.items()], Given(own)))
    facts: dict[str, Any] = {key: value for key, value in old.facts.items() if key != FACT}
    if any(piece.method.fixed for piece in pieces):
        facts["own_fixed"] = True  # a seed would give other numbers for the smaller layers
    return Tuned(model).add(Adapter(old.name, stacked(parts), [], facts=facts), planned)
