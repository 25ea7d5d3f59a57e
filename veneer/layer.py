"""Adapted layers: the class of a layer is swapped for a subclass of itself that asks the layer's slot."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from veneer.forms import form_of, read_from_outside
from veneer.route import Route
from veneer.site import Site
from veneer.slot import Slot


class Adapted:
    """Marks the swapped classes: `isinstance(layer, Adapted)`."""


def adapted_forward(base: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that asks the module's slot; it keeps the signature of the one it replaces."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        slot = self._modules["veneer"]
        if not slot.route.on:
            return slot.frozen(self, *args, **kwargs)
        return slot.run(self, args, kwargs)

    functools.update_wrapper(forward, base)
    forward.__signature__ = inspect.signature(base)  # type: ignore[attr-defined]
    return forward


def reading(name: str) -> property:
    def get(self: Any) -> Any:
        slot = self._modules.get("veneer")
        return self._parameters[name] if slot is None else slot.read(self, name)

    return property(get)


@functools.cache
def adapted_class(base: Any, properties: frozenset[str] = frozenset()) -> type:
    """The subclass of `base` that consults adapters; parameters in `properties` are read through them."""
    body: dict[str, Any] = {name: reading(name) for name in sorted(properties)}
    body.update(
        forward=adapted_forward(base.forward), __module__=base.__module__, __doc__=base.__doc__, __qualname__=f"Adapted{base.__qualname__}"
    )  # type: ignore[attr-defined]
    return type(f"Adapted{base.__name__}", (Adapted, base), body)


def properties_for(module: nn.Module, sites: Sequence[Site]) -> frozenset[str]:
    names: set[str] = set()
    for site in sites:
        if site.kind == "norm" and not isinstance(module, nn.LayerNorm):
            names |= {"weight", "bias"} & set(module._parameters)
        elif site.kind == "parameter" or site.parameter == "in_proj_weight" or (site.kind == "linear" and read_from_outside(module)):
            form = form_of(module, site.kind, site.parameter)
            names |= {form.parameter, form.bias_name} & set(module._parameters)
    return frozenset(names)


def slot_of(module: nn.Module, route: Route) -> Slot:
    """The module's slot, made if there is none; the module's class stays as it is."""
    if "veneer" in module._modules:
        return module._modules["veneer"]  # type: ignore[return-value]
    slot = Slot(route, type(module).forward)
    slot.train(module.training)
    module.add_module("veneer", slot)
    return slot


def adapt(module: nn.Module, route: Route, sites: Sequence[Site]) -> Slot:
    """Swaps the module's class (once; again if more parameters must be read through properties) and returns its slot."""
    properties = properties_for(module, sites)
    base: Any = type(module)
    slot = slot_of(module, route)
    if isinstance(module, Adapted):
        present = frozenset(n for n, v in vars(base).items() if isinstance(v, property))
        if not properties <= present:
            module.__class__ = adapted_class(base.__mro__[2], properties | present)
        return slot
    swapped = adapted_class(base, properties)
    own = module.__dict__
    if "_old_forward" in own:  # an offloading hook stands in front: act beneath it, so that it still brings the weight in
        slot.base_forward = getattr(own["_old_forward"], "__func__", base.forward)
        own["_old_forward"] = types.MethodType(swapped.forward, module)  # type: ignore[attr-defined]
    elif "forward" in own:  # patched on the instance: the patched function is the layer below
        patched = own["_veneer_patched"] = own.pop("forward")
        slot.base_forward = lambda _self, *args, **kwargs: patched(*args, **kwargs)
    module.__class__ = swapped
    return slot


def restore(module: nn.Module) -> None:
    """The module as it was: class, forward and children."""
    if "veneer" in module._modules:
        del module._modules["veneer"]
    if not isinstance(module, Adapted):
        return
    base = type(module).__mro__[2]
    own = module.__dict__
    if "_old_forward" in own:
        own["_old_forward"] = types.MethodType(base.forward, module)  # type: ignore[attr-defined]
    if "_veneer_patched" in own:
        own["forward"] = own.pop("_veneer_patched")
    module.__class__ = base
