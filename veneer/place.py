"""Putting an adapter's parts into a model: slots, tensors, and what each kind of site needs around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from veneer import anatomy, prompts
from veneer.adapter import Adapter
from veneer.beside import projections
from veneer.calls import Others
from veneer.errors import NoMatch, Unsupported
from veneer.forms import read_from_outside
from veneer.layer import adapt, restore, slot_of
from veneer.method import Method
from veneer.part import Part, Tensors
from veneer.reading import introduce
from veneer.route import Route
from veneer.seam import Seam, open_seam
from veneer.site import Site
from veneer.slot import Slot
from veneer.source import Source, cast_like, like_of
from veneer.waiting import WaitingOwn, WaitingShared


def trained(method: Method, name: str) -> bool:
    """Whether a method's tensor of this name is trained."""
    return name not in method.frozen and name not in method.fixed


def without_values(holder: Tensors, keys: Mapping[str, str]) -> bool:
    """Whether tensors are on `meta`, as their base is."""
    return any(t.is_meta for t in holder.named(keys).values())


class Places:
    """The places of one model where adapters are, and what was changed around them."""

    def __init__(self, model: nn.Module, route: Route):
        self.model, self.route = model, route
        self.configs: list[tuple[Any, str]] = []
        self.eager_layers: list[tuple[nn.Module, Any]] = []
        self.seams: dict[str, Seam] = {}
        self.hooks: list[RemovableHandle] = []

    def place(self, adapter: Adapter, index: int, part: Method, found: Sequence[tuple[Method, Site]], source: Source) -> None:
        """Puts one part's tensors where they belong; `source` makes them or has them from a file."""
        root = slot_of(self.model, self.route)
        absent = [name for name in part.relies_on if name not in root.tuned.adapters]
        if absent:
            said = ", ".join(map(repr, absent))
            raise NoMatch(f"{part.label} mixes {said}, not attached to this model; attach or load them under these names first.")
        found = [(special, replace(site, ordinal=n)) for n, (special, site) in enumerate(found)]
        groups: dict[str, list[Site]] = {}
        for special, site in found:
            if (group := special.tie(site)) is not None:
                groups.setdefault(group, []).append(site)
        shared: dict[str | None, dict[str, str]] = {None: {}}
        for group, members in groups.items():
            module = self.model.get_submodule(members[0].module)
            like, holder = like_of(module, members[0]), root.holder(adapter.name)
            shared[group] = {
                name: holder.hold(name if len(groups) == 1 else f"{group}_{name}", cast_like(t, like, module), trained(part, name))
                for name, t in source.shared(part, group, members).items()
            }
            if without_values(holder, shared[group]):
                adapter.waiting.append(WaitingShared(module, members[0], source, holder, shared[group], part, group, members))
        attention: list[Slot] = []
        enters = part.splits_blocks or getattr(part, "stands_beside", False)
        sites = anatomy.sites(self.model) if enters else []
        for special, site in found:
            module, slot = self._slot(site)
            keys = shared[special.tie(site)]
            ours = root.holder(adapter.name) if keys else None
            like = like_of(module, site)
            p = source.own(special, site, module, slot, like, ours.named(keys) if ours is not None else {})
            holder = slot.holder(adapter.name)
            names = {name: holder.hold(name, cast_like(t, like, module), trained(special, name)) for name, t in p.items()}
            piece = Part(index, special, site, holder, names, ours, keys)
            slot.add(adapter.name, piece, module)
            if site.kind == "model":
                slot.whole.room(piece)  # type: ignore[union-attr]
            piece.others = Others(piece, slot, module) if special.mixes else None
            adapter.parts.append(piece)
            if without_values(holder, names):
                adapter.waiting.append(WaitingOwn(module, site, source, holder, names, piece, slot))
            if site.kind == "attention":
                attention.append(slot)
                if special.stands_beside and not slot.projections:  # type: ignore[attr-defined]
                    slot.projections = projections(self.model, site, sites, special.label)
                if special.gates:  # type: ignore[attr-defined]
                    self._enter(site)
            if site.kind == "branch":
                self._enter(site)
            if site.kind == "block":
                self._alone(slot, adapter.name, special)
                piece.seam = self._seam(special, site, sites) if special.splits_blocks else None
        introduce(piece for piece in adapter.parts if piece.index == index)
        if attention:
            self.configs += prompts.route_attention(self.model)
            shift = part.shift_positions  # type: ignore[attr-defined]
            if shift or (shift is None and any(s.causal and s.side == "" for _, s in found)):
                prompts.install_shift(self.model, attention).room(
                    next(p for p in adapter.parts if p.index == index and p.site.kind == "attention")
                )

    def _slot(self, site: Site) -> tuple[nn.Module, Slot]:
        """The module a site acts on, adapted as its kind needs."""
        if site.kind == "model":
            causal = any(s.causal for s in anatomy.sites(self.model) if s.kind == "attention")
            module = prompts.install_tokens(self.model, causal)
            return module, module.veneer  # type: ignore[return-value]
        module = self.model.get_submodule(site.module)
        if site.kind == "attention":
            if not prompts.uses_interface(module):
                raise Unsupported(
                    f"{type(module).__name__} at {site.name} does not use transformers' attention interface, "
                    "so keys and values cannot be added there."
                )
            return module, slot_of(module, self.route)
        if site.kind == "branch" and read_from_outside(module):
            module = self.model.get_submodule(site.module.rpartition(".")[0])
        if site.kind == "linear" and read_from_outside(module):  # the owner routes rows for it
            adapt(self.model.get_submodule(site.module.rpartition(".")[0]), self.route, ())
        self._leave_fast_path(site)
        return module, adapt(module, self.route, [site])

    def _enter(self, site: Site) -> None:
        """Lets a sub-layer's first module, or an attention module, note its input."""
        slot = adapt(self.model.get_submodule(site.entry or site.module), self.route, ())
        if site.name not in slot.entries:
            slot.entries.append(site.name)

    def _alone(self, slot: Slot, adapter: str, special: Method) -> None:
        """Refuses a method that changes the number of tokens inside blocks beside others that act on whole blocks."""
        there = [p.method for p in slot.parts[adapter] if p.site.kind == "block"]
        if len(there) > 1 and any(m.splits_blocks for m in there):
            names = " + ".join(m.label for m in there)
            raise Unsupported(f"{names}: one of them changes the number of tokens inside blocks, so no other may act on whole blocks.")

    def _seam(self, special: Method, site: Site, sites: Sequence[Site]) -> Seam:
        """The seam of a block, opened once."""
        if site.module not in self.seams:
            self.seams[site.module], hooks = open_seam(self.model, site, sites, special.proportional, special.label)
            self.hooks += hooks
        return self.seams[site.module]

    def _leave_fast_path(self, site: Site) -> None:
        """`nn.TransformerEncoderLayer` reads its layers' weights itself in evaluation: keep it on the ordinary path."""
        path = site.module
        while path:
            path = path.rpartition(".")[0]
            parent = self.model.get_submodule(path)
            if isinstance(parent, nn.TransformerEncoderLayer) and all(m is not parent for m, _ in self.eager_layers):
                self.eager_layers.append((parent, parent.activation_relu_or_gelu))
                parent.activation_relu_or_gelu = 0

    def drop(self, adapter: Adapter) -> None:
        """Takes one adapter's tensors out."""
        for module in list(self.model.modules()):
            slot = module._modules.get("veneer")
            if isinstance(slot, Slot):
                slot.remove(adapter.name)

    def restore(self) -> None:
        """The model's classes, forwards and settings as they were."""
        for module in list(self.model.modules()):
            restore(module)
        for config, implementation in self.configs:
            config._attn_implementation_internal = implementation
        for layer, flag in self.eager_layers:
            layer.activation_relu_or_gelu = flag
        for hook in self.hooks:
            hook.remove()
        self.configs, self.eager_layers, self.seams, self.hooks = [], [], {}, []
