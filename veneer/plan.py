"""Before anything is attached: which part of a method acts where, with which hyper-parameters, from which data."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from veneer import registry
from veneer.errors import BadValue, NoMatch, UnknownName, Unsupported, nearest
from veneer.forms import form_of, is_quantised
from veneer.method import Method, replaced
from veneer.site import Site, matches, tokens_of
from veneer.slot import Slot

Loss: TypeAlias = Callable[[nn.Module, Any], Tensor]
"""(model, batch) → the task loss, a scalar."""


def choose_sites(
    method: Method,
    sites: Sequence[Site],
    head: bool | str,
    allow_unmatched: bool,
    adapters: Mapping[str, Sequence[Site]] | None = None,
) -> list[tuple[Method, list[Site]]]:
    """The method's parts, each with the sites it acts on; one more for the task's own head where it is to train.

    `adapters` are those attached already, by name, with their sites."""
    if not any(part.targets or part.default_targets for part in method.parts):  # a head that comes along is none of its own
        raise NoMatch(f"{method.label} trains nothing by itself: add it to a method, as in 'lora + {method.spec}'.")
    chosen = []
    for part in method.parts:
        if part.mixes:
            part, found = part.among(adapters or {})
        elif allow_unmatched and part.targets is not None:
            lenient = replaced(part, {"targets": " ".join(t.removesuffix("?") + "?" for t in tokens_of(part.targets))})
            found = lenient.select(sites)
        else:
            found = part.select(sites)
        chosen.append((part, found))
    heads = [s for s in sites if s.role == "head" and s.trainable_head]
    covered = {s.module for part, found in chosen for s in found}
    if heads and head is not False and (head is True or not any(s.module in covered for s in heads)):
        part = registry.head_method()
        chosen.append((part, [s for s in part.select(sites) if s.trainable_head]))  # not a language model's own beside it
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
    model: nn.Module,
    part: Method,
    found: list[tuple[Method, Site]],
    batches: Iterable[Any] | None,
    index: int,
    starts: dict,
    loss: Loss | None = None,
) -> list[tuple[Method, Site]]:
    """Shows the method its sites' inputs (and its weights' gradients) on the given batches and takes its plan.

    They are those of the base alone: adapters that are attached already do not act."""
    if batches is None:
        raise BadValue(f"{part.label} starts from data: pass batches=[…] of model inputs to attach.")
    if any(p.is_meta for p in model.parameters()) and not any(hasattr(m, "_hf_hook") for m in model.modules()):
        raise Unsupported(f"{part.label} starts from data, and the model has no weights to run with yet (meta); fill it, then attach.")
    states: dict[str, Any] = {}
    with ExitStack() as undo:
        slot = model._modules.get("veneer")
        if isinstance(slot, Slot) and slot.tuned is not None:
            undo.enter_context(slot.tuned.disabled())
        if part.calibrates:
            watch_inputs(model, found, states, undo)
        if part.reads_gradients:
            watch_gradients(model, found, states, undo)
        for batch in batches:
            if not part.reads_gradients:
                with torch.no_grad():
                    run(model, batch)
            else:
                with torch.enable_grad():
                    loss_of(model, batch, loss, part).backward()
    plan = part.settle(states, [site for _, site in found])
    out = []
    for _, site in found:
        settled = plan.get(site.name)
        if settled is not None:
            starts[index, site.name] = settled[1]
            out.append((settled[0], site))
    if not out:
        raise BadValue(f"{part.label}: the data gave no site anything to train; pass more or more varied batches, or a larger budget.")
    return out


def run(model: nn.Module, batch: Any) -> Any:
    """The model on one batch: a dict of arguments, a tuple of them, or the one argument."""
    return model(**batch) if isinstance(batch, Mapping) else model(*batch) if isinstance(batch, tuple) else model(batch)


def loss_of(model: nn.Module, batch: Any, loss: Loss | None, part: Method) -> Tensor:
    """The task loss on one batch, by the caller's function or the model's own."""
    if loss is not None:
        return loss(model, batch)
    value = getattr(run(model, batch), "loss", None)
    if not isinstance(value, Tensor):
        raise BadValue(f"{part.label} starts from gradients: give batches with labels, or loss=(model, batch) → loss, to attach.")
    return value


def watch_inputs(model: nn.Module, found: Sequence[tuple[Method, Site]], states: dict[str, Any], undo: ExitStack) -> None:
    """Hands every site's inputs to its method, for as long as `undo` is open."""
    for special, site in found:

        def seen(_module: nn.Module, args: tuple, kwargs: dict, special: Method = special, site: Site = site) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            states[site.name] = special.observe(states.get(site.name), x.detach(), site)

        undo.callback(model.get_submodule(site.module).register_forward_pre_hook(seen, with_kwargs=True).remove)


def watch_gradients(model: nn.Module, found: Sequence[tuple[Method, Site]], states: dict[str, Any], undo: ExitStack) -> None:
    """Hands every site's weight and bias gradients to its method, tensor by tensor as backward reaches them; none is kept.

    A parameter that two layers share is read once, for the first of them."""
    readers: dict[int, tuple[nn.Parameter, list[Callable[[Tensor], None]]]] = {}
    owners: dict[int, str] = {}
    for special, site in found:
        module = model.get_submodule(site.module)
        if is_quantised(module):
            raise special.refuse(
                "starts from gradients of the base, and its weight is stored quantised {at}; load the base in 16 or 32 bit", site
            )
        form = form_of(module, site.kind, site.parameter)
        for name, held in (("weight", form.parameter), ("bias", form.bias_name)):
            parameter = module._parameters.get(held)
            if parameter is None or owners.setdefault(id(parameter), site.module) != site.module:
                continue

            def read(grad: Tensor, special: Method = special, site: Site = site, form: Any = form, name: str = name) -> None:
                seen = form.seen(grad) if name == "weight" else grad
                if site.rows is not None:
                    seen = seen[:, slice(*site.rows)] if site.count else seen[slice(*site.rows)]
                states[site.name] = special.observe_gradient(states.get(site.name), name, seen, site)

            readers.setdefault(id(parameter), (parameter, []))[1].append(read)
    for p in model.parameters():
        undo.callback(p.requires_grad_, p.requires_grad)
        if p.is_floating_point():
            p.requires_grad_(id(p) in readers)
    for parameter, read_all in readers.values():
        undo.callback(setattr, parameter, "grad", parameter.grad)
        parameter.grad = None

        def arrived(p: Tensor, read_all: list[Callable[[Tensor], None]] = read_all) -> None:
            grad, p.grad = p.grad, None
            assert grad is not None
            for one in read_all:
                one(grad)

        undo.callback(parameter.register_post_accumulate_grad_hook(arrived).remove)
