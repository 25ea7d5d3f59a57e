"""Before anything is attached: which part of a method acts where, with which hyper-parameters, from which data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from veneer import registry
from veneer.errors import BadValue, NoMatch, UnknownName, nearest
from veneer.method import Method, replaced
from veneer.site import Site, matches, tokens_of


def choose_sites(method: Method, sites: Sequence[Site], head: bool | str, allow_unmatched: bool) -> list[tuple[Method, list[Site]]]:
    """The method's parts, each with the sites it acts on; one more for the task's own head where it is to train."""
    chosen = []
    for part in method.parts:
        if allow_unmatched and part.targets is not None:
            lenient = replaced(part, {"targets": " ".join(t.removesuffix("?") + "?" for t in tokens_of(part.targets))})
            found = lenient.select(sites)
        else:
            found = part.select(sites)
        chosen.append((part, found))
    heads = [s for s in sites if s.role == "head" and s.trainable_head]
    covered = {s.module for part, found in chosen for s in found}
    if heads and head is not False and (head is True or not any(s.module in covered for s in heads)):
        part = registry.head_method()
        chosen.append((part, part.select(sites)))
    return chosen


def stacked(parts: Sequence[Method]) -> Method:
    """The parts as one method, in order."""
    method = parts[0]
    for part in parts[1:]:
        method = method + part
    return method


def check_overrides(overrides: Mapping[str, Mapping[str, Any]], chosen: Sequence[tuple[Method, Sequence[Site]]]) -> None:
    """Raises for a pattern that matches none of the chosen sites, or a hyper-parameter that no method there has."""
    for pattern, changes in overrides.items():
        there = [part for part, found in chosen if any(overridden(pattern, site) for site in found)]
        if not there:
            names = {n for _, found in chosen for s in found for n in (s.name, s.role)}
            raise NoMatch(f"overrides: {pattern!r} matches none of the chosen sites.{nearest(pattern, names)}")
        known = {name for part in there for name in type(part).__dataclass_fields__}
        for name in changes:
            if name not in known:
                raise UnknownName(f"overrides: {there[0].label} has no option {name!r}, given for {pattern!r}.{nearest(name, known)}")


def overridden(pattern: str, site: Site) -> bool:
    """Whether an override's pattern (role, module name or regular expression) names this site."""
    return matches(pattern, site) or re.search(pattern, site.name) is not None


def special_at(part: Method, site: Site, overrides: Mapping[str, Mapping[str, Any]] | None) -> tuple[Method, Site]:
    """The part with the hyper-parameters that differ at this site."""
    for pattern, changes in (overrides or {}).items():
        if overridden(pattern, site):
            known = {k: v for k, v in changes.items() if k in type(part).__dataclass_fields__}
            part = replaced(part, known) if known else part
    return part, site


def calibrated(
    model: nn.Module, part: Method, found: list[tuple[Method, Site]], batches: Iterable[Any] | None, index: int, starts: dict
) -> list[tuple[Method, Site]]:
    """Shows the method its sites' inputs on the given batches and takes its plan."""
    if batches is None:
        raise BadValue(f"{part.label} starts from data: pass batches=[…] of model inputs to attach.")
    states: dict[str, Any] = {}
    hooks = []
    for special, site in found:
        module = model.get_submodule(site.module)

        def seen(_module: nn.Module, args: tuple, kwargs: dict, special: Method = special, site: Site = site) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            states[site.name] = special.observe(states.get(site.name), x.detach(), site)

        hooks.append(module.register_forward_pre_hook(seen, with_kwargs=True))
    try:
        with torch.no_grad():
            for batch in batches:
                model(**batch) if isinstance(batch, Mapping) else model(*batch) if isinstance(batch, tuple) else model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    plan = part.settle(states, [site for _, site in found])
    out = []
    for _, site in found:
        settled = plan.get(site.name)
        if settled is not None:
            starts[index, site.name] = settled[1]
            out.append((settled[0], site))
    if not out:
        raise BadValue(f"{part.label}: the data gave no site any rank; pass more or more varied batches.")
    return out
