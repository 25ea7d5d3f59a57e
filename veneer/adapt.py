"""Attaching methods to models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn

from veneer import anatomy
from veneer.adapter import Adapter
from veneer.errors import VeneerError
from veneer.method import Method, Params
from veneer.plan import calibrated, check_overrides, choose_sites, special_at, stacked
from veneer.slot import Slot
from veneer.source import Fresh
from veneer.tuned import Tuned, check_name, tuned_of


def attach(
    model: nn.Module,
    method: Method | str,
    name: str = "default",
    *,
    seed: int = 0,
    head: bool | str = "auto",
    allow_unmatched: bool = False,
    roles: Mapping[str, str] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    batches: Iterable[Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> Tuned:
    """Attaches a method to a model in place, under a name, and makes it the active one. The base is frozen.

    Args:
        model: any `nn.Module`.
        method: a method or its spec, e.g. `"lora(r=8) + ssf"`.
        seed: of the first values; the same seed gives the same adapter on every device.
        head: also train the task head; "auto" does so when the model has one of its own (…ForSequenceClassification).
        allow_unmatched: let single targets match nothing.
        roles: module name (or regular expression) → role, to add or correct what anatomy finds.
        overrides: module name or role → hyper-parameters that differ there, e.g. `{"layer.0": {"r": 4}}`.
        batches: inputs (dicts or tensors) for methods that start from data.
        loss: (model, batch) → the task loss, for methods that start from gradients; by default the output's own `loss`.

    Raises:
        VeneerError: unknown targets, hyper-parameters that do not fit a layer, a taken name, a wrapped model.
    """
    tuned = tuned_of(model)
    if isinstance(method, str):
        from veneer.spec import parse

        method = parse(method)
    check_name(name, tuned)
    sites = anatomy.sites(model, roles)
    attached = {other: adapter.sites for other, adapter in tuned.adapters.items()}
    chosen = choose_sites(method, sites, head, allow_unmatched, attached)
    check_overrides(overrides or {}, chosen)
    method = stacked([part for part, _ in chosen])
    planned = [(part, [special_at(part, site, overrides) for site in found]) for part, found in chosen]
    starts: dict[tuple[int, str], Params] = {}
    for i, (part, found) in enumerate(planned):
        if part.calibrates or part.reads_gradients:
            planned[i] = (part, calibrated(model, part, found, batches, i, starts, loss))
    for _, found in planned:
        for special, site in found:
            special.check(site)
    adapter = Adapter(name, method, [], {k: dict(v) for k, v in (overrides or {}).items()})
    generator = Generator().manual_seed(seed)
    with torch.device("cpu"):  # whatever the caller's default is: the seed's numbers are the CPU's
        return tuned.add(adapter, [(part, found, Fresh(generator, i, starts)) for i, (part, found) in enumerate(planned)])


def of(model: nn.Module) -> Tuned:
    """What is attached to this model.

    Raises:
        VeneerError: nothing is.
    """
    slot = model._modules.get("veneer")
    if not isinstance(slot, Slot) or slot.tuned is None:
        raise VeneerError(f"Nothing is attached to this {type(model).__name__}; start with veneer.attach(model, method).")
    return slot.tuned
