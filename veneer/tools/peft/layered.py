"""One table entry for a method that adapts layer by layer: what its options and tensors are called on the two sides."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from veneer import registry
from veneer.errors import Unsupported
from veneer.method import Method, Params
from veneer.part import Part
from veneer.site import Site
from veneer.tools.peft.format import Format
from veneer.tools.peft.given import Given, Piece, finished
from veneer.tools.peft.names import pattern_value, turned
from veneer.tools.peft.taken import Grouped, Taken, most, whole_number

WAY = "Save it in veneer's own format, or export it as LoRA (as_lora=True, with rank=… where it is not of low rank)."

Places = Mapping[str, tuple[Any, Site]]
"""The method and the whole site of every adapted module."""


@dataclass(frozen=True)
class Kept:
    """One tensor of a site.

    Args:
        slot: its name in PEFT's file, behind the module's path. name: its name in our method.
        ours, theirs: from PEFT's shape to ours, and back.
        kinds: the sites that have it.
    """

    slot: str
    name: str
    ours: Callable[[Tensor, Site], Tensor] = lambda t, site: t
    theirs: Callable[[Tensor, Site], Tensor] = lambda t, site: t
    kinds: tuple[str, ...] = ("linear", "conv", "embedding")


@dataclass(frozen=True)
class Layered:
    """How a method stands in PEFT's format.

    Args:
        kind, slug: PEFT's type and our method.
        tensors: what each site holds; of tensors that the site's method does not make there is nothing in the file.
        options: PEFT's option → our hyper-parameter of the same value.
        patterns: our hyper-parameters that may differ by site → PEFT's option that says so.
        anchored: whether a pattern's keys may start with ^.
        ours: more hyper-parameters from a config.
        theirs: more options, from all modules and the config it was loaded with ({} if none); None: they do not agree.
        sized: hyper-parameters of one site that its tensors tell, given the method, the tensors by slot and the site.
        values: how to work out hyper-parameters whose attribute is not yet the value.
        training: PEFT's options that act in training only and that our method does not have.
        refused: PEFT's tensors that are not computed, by slot, with what they are.
        kinds: the sites' kinds. transposed: whether layers that store [in, out] are among them.
        biases: whether the type has the option `bias`.
        unfit: a reason against one place, "" if there is none.
        join: method and tensors of a whole layer from those of its row ranges; None where that has no answer.
    """

    kind: str
    slug: str
    tensors: tuple[Kept, ...]
    options: Mapping[str, str] = field(default_factory=dict)
    patterns: Mapping[str, str] = field(default_factory=dict)
    anchored: bool = True
    ours: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda config: {}
    theirs: Callable[[Places, Mapping[str, Any]], dict[str, Any] | None] = lambda at, before: {}
    sized: Callable[[Any, Mapping[str, Tensor], Site], dict[str, Any]] = lambda method, slots, site: {}
    values: Mapping[str, Callable[[Any, Site], Any]] = field(default_factory=dict)
    training: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    kinds: tuple[str, ...] = ("linear",)
    transposed: bool = False
    biases: bool = True
    unfit: Callable[[Site, nn.Module], str] = lambda site, layer: ""
    join: Callable[[Sequence[Part], Site], tuple[Method, Params] | None] = lambda parts, site: None

    @property
    def format(self) -> Format:
        return Format(self.kind, (self.slug,), self.read, self.write, self.biases)

    def against(self, site: Site, layer: nn.Module) -> str:
        """What stands against this place, in words; "" if nothing does."""
        return self.unfit(site, layer) if site.kind in self.kinds else f"of the kind {site.kind}"

    # -- reading ----------------------------------------------------------------------------------------------

    def read(self, given: Given) -> Piece:
        method = self.method(given)
        paths = dict.fromkeys(path for kept in self.tensors for path in given.having(kept.slot))
        found = [self.site(given, method, path) for path in paths]
        usual = {special for special, _, _ in found}
        return finished(given, usual.pop() if len(usual) == 1 else method, found)

    def method(self, given: Given) -> Method:
        """Our method with the config's hyper-parameters."""
        config = given.config
        if idle := [f"{option}={config[option]}" for option in self.training if config.get(option)]:
            warnings.warn(f"{given.folder}: {', '.join(idle)} acts in training only and is not computed here.", stacklevel=4)
        renamed = {ours: config[theirs] for theirs, ours in self.options.items() if config.get(theirs) is not None}
        return registry.method(self.slug, **{**renamed, **self.ours(config)})

    def site(self, given: Given, method: Method, path: str) -> tuple[Method, Site, Params]:
        """The variant of the method, the site and its tensors at one module."""
        site, slots = given.places.whole(path), given.modules[path]
        if reason := self.against(site, given.places.model.get_submodule(path)):
            raise Unsupported(f"{given.folder}: {path} is {reason}, where PEFT's {self.kind} cannot be read.")
        if unknown := next((slot for slot in self.refused if slot in slots), None):
            raise Unsupported(
                f"{given.folder}: {path} has {unknown}, {self.refused[unknown]}, which cannot be read here. "
                "Merge it into the base with PEFT, or train anew without it."
            )
        special = {ours: pattern_value(given.config.get(theirs), path, getattr(method, ours)) for ours, theirs in self.patterns.items()}
        method = replace(method, **{**special, **self.sized(method, slots, site)})
        method.check(site)
        p = method.init(site, Generator())
        for kept in self.tensors:
            if kept.name not in p or site.kind not in kept.kinds or (kept.name in method.fixed and kept.slot not in slots):
                continue
            first = p[kept.name]
            p[kept.name] = kept.ours(given.need(path, kept.slot, tuple(kept.theirs(first, site).shape)), site)
            given.own_fixed |= kept.name in method.fixed and not torch.equal(p[kept.name], first)
        return method, site, p

    # -- writing ----------------------------------------------------------------------------------------------

    def write(self, taken: Taken, groups: Grouped) -> None:
        at: dict[str, tuple[Method, Site]] = {}
        for path, parts in groups.items():
            site = taken.places.whole(path)
            layer, _, form = taken.layer(parts)
            stored = "stored as [in, out]" if site.kind == "linear" and turned(form) and not self.transposed else ""
            if reason := self.against(site, layer) or stored:
                raise Unsupported(f"PEFT's {self.kind} has no place for {path}, which is {reason}. {WAY}")
            method, p = self.whole(parts, site)
            at[path] = method, site
            for kept in self.tensors:
                if kept.name in p and site.kind in kept.kinds:
                    taken.put(path, kept.slot, kept.theirs(p[kept.name], site))
        taken.name_targets(list(groups))
        if not self.transposed:
            del taken.config["fan_in_fan_out"]
        if self.biases:
            taken.config["bias"] = "none"
        self.put_options(taken, at)

    def whole(self, parts: Sequence[Part], site: Site) -> tuple[Method, Params]:
        """Method and tensors of a module; of one that is adapted by row ranges, put together."""
        if len(parts) == 1 and parts[0].site.rows is None:
            return parts[0].method, parts[0].tensors()
        joined = self.join(parts, site) if len({p.method for p in parts}) == 1 else None
        if joined is None:
            rows = ", ".join(p.site.name.removeprefix(site.module + ".") for p in parts)
            raise Unsupported(
                f"PEFT's {self.kind} has one adapter for all of {site.module}, which cannot do what this one does to {rows}. {WAY}"
            )
        return joined

    def put_options(self, taken: Taken, at: Places) -> None:
        """Options of the config; what differs by site goes into a pattern, or is refused."""
        before = taken.remembered if taken.remembered.get("peft_type") == self.kind else {}
        for theirs, ours in self.options.items():
            value = self.values.get(ours, lambda method, site, ours=ours: getattr(method, ours))
            found = {path: number(value(method, site)) for path, (method, site) in at.items()}
            usual, pattern = most(list(found.values())), self.patterns.get(ours)
            if pattern is None and any(value != usual for value in found.values()):
                raise Unsupported(f"PEFT's {self.kind} has one {theirs} for the whole adapter, here {ours} differs by site. {WAY}")
            if pattern and all(pattern_value(before.get(pattern), path, before.get(theirs)) == value for path, value in found.items()):
                continue  # the words it was loaded with still hold
            taken.config[theirs] = usual
            if pattern:
                taken.config[pattern] = {f"^{re.escape(path)}" if self.anchored else path: v for path, v in found.items() if v != usual}
        more = self.theirs(at, before)
        if more is None:
            raise Unsupported(f"PEFT's {self.kind} has one set of options for the whole adapter, here they differ by site. {WAY}")
        taken.config.update(more)


def number(value: Any) -> Any:
    """A whole number as an int: so PEFT writes it."""
    return whole_number(value) if isinstance(value, float) else value


def by_rows(parts: Sequence[Part], site: Site, fill: Mapping[str, float], axis: int = 0) -> tuple[Method, Params] | None:
    """Joins tensors whose `axis` runs along the output: every range's own rows, `fill` in the others."""
    out: Params = {}
    for name, other in fill.items():
        first = parts[0].tensors()[name]
        width, rows = first.shape[axis], parts[0].site.out_features
        ends = [[end * width / rows for end in part.site.rows or ()] for part in parts]
        if any(not end.is_integer() for pair in ends for end in pair):
            return None
        shape = [*first.shape[:axis], site.out_features * width // rows, *first.shape[axis + 1 :]]
        out[name] = torch.full(shape, other, dtype=first.dtype, device=first.device)
        for part, (start, stop) in zip(parts, ends):
            out[name].narrow(axis, int(start), int(stop - start)).copy_(part.tensors()[name])
    return parts[0].method, out
