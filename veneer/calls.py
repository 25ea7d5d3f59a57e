"""The layers below a method: the frozen layer, a row range of it, what another method made of it, a whole sub-layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.errors import Unsupported
from veneer.forms import Form, LinearForm
from veneer.kernels.eager import eager
from veneer.kernels.low_rank import add_outer, linear_onto, low_rank_linear, outer_linear
from veneer.kernels.rebuilt import rebuilt_linear
from veneer.kernels.scaled import scaled_outer
from veneer.method import KEEP, Call, Params
from veneer.part import Part, compute_dtype

if TYPE_CHECKING:
    from veneer.slot import Slot


def rebuilds(x: Tensor) -> bool:
    """Whether a built weight is worth building twice: torch.compile decides that itself, autocast needs the plain operation."""
    return x.is_floating_point() and eager(x)


class Frozen(Call):
    """The frozen layer itself."""

    def __init__(self, slot: Slot, module: nn.Module, form: Form, rest: tuple = (), options: dict[str, Any] | None = None):
        self.slot, self.module, self.form, self.rest, self.options = slot, module, form, rest, options or {}
        self.training = module.training

    def __call__(self, x: Tensor) -> Tensor:
        return self.slot.frozen(self.module, x, *self.rest, **self.options)

    def weight(self) -> Tensor:
        W = self.form.weight(self.module)
        return W.to(compute_dtype(W))

    def bias(self) -> Tensor | None:
        b = self.form.bias(self.module)
        return None if b is None else b.to(compute_dtype(b))

    def apply(self, x: Tensor, weight: Any = KEEP, bias: Any = KEEP) -> Tensor:
        own = self.bias()
        if weight is KEEP and self.form.writable:  # packed weight: leave it packed
            y = self(x)
            if bias is not KEEP and own is not None:
                y = y - own.to(y.dtype)
            return y if bias is KEEP or bias is None else y + bias.to(y.dtype)
        W = self.form.weight(self.module) if weight is KEEP else weight
        return self.form.apply(self.module, x, W, own if bias is KEEP else bias)

    @property
    def bare(self) -> bool:
        """Whether calling it is x Wᵀ + b and nothing else."""
        return not self.options and not self.rest and self.slot.plain

    def add_low_rank(self, x: Tensor, L: Tensor, R: Tensor, inner: Tensor | None = None) -> Tensor:
        W = self.matrix(x)
        if inner is None and W is None and self.bare:
            y = self.form.packed_low_rank(self.module, x, L, R)
            if y is not None:
                return y
        t = None if inner is not None else self.read_ahead(x, R)
        if t is not None:
            return add_outer(self(x), t, L) if W is None else outer_linear(x, W, self.form.bias(self.module), t, L)
        if W is None or inner is not None:
            return self.form.low_rank(self.module, self(x), x if inner is None else inner, L, R)
        return low_rank_linear(x, W, self.form.bias(self.module), L, R)

    def gain_low_rank(self, x: Tensor, L: Tensor, R: Tensor, gain: Tensor) -> Tensor:
        W = self.matrix(x)
        if W is None:
            return super().gain_low_rank(x, L, R, gain)
        return scaled_outer(x, W, self.form.bias(self.module), gain, self.inner(x, R), L)

    def matrix(self, x: Tensor) -> Tensor | None:
        return self.form.as_it_is(self.module, x) if self.bare and eager(x) else None

    def inner(self, x: Tensor, R: Tensor) -> Tensor:
        t = self.read_ahead(x, R)
        return super().inner(x, R) if t is None else t

    def read_ahead(self, x: Tensor, R: Tensor) -> Tensor | None:
        """R xᵀ, taken with those of the layers that will read the same x after this one; None where there are none."""
        route = self.slot.route
        if self.caller is None or not self.caller.readers or route.rows is not None or not eager(x):
            return None
        return route.reading.inner(self.caller, x, R)

    def plus(self, x: Tensor, change: Tensor, fresh: bool = False) -> Tensor:
        W = self.matrix(x) if change.dtype == x.dtype else None
        return super().plus(x, change) if W is None else linear_onto(change, x, W, self.form.bias(self.module), fresh)

    def rebuild(self, x: Tensor, build: Callable[[Tensor, Params], Tensor], p: Params) -> Tensor:
        if not isinstance(self.form, LinearForm) or not rebuilds(x):
            return super().rebuild(x, build, p)
        b = self.bias()
        return rebuilt_linear(x, self.weight, None if b is None else b.to(x.dtype), build, p)


class Rows(Call):
    """A row range of a fused layer. The whole layer runs once on its own input, whichever ranges are adapted."""

    def __init__(self, whole: Frozen, rows: tuple[int, int], x: Tensor, y: Tensor):
        self.whole, self.rows, self.x, self.y = whole, slice(*rows), x, y
        self.training = whole.training

    def __call__(self, x: Tensor) -> Tensor:
        if x is self.x:
            return self.y[..., self.rows]
        if self.whole.form.writable:
            return self.whole(x)[..., self.rows]
        return self.apply(x)

    def weight(self) -> Tensor:
        return self.whole.weight()[self.rows]

    def bias(self) -> Tensor | None:
        b = self.whole.bias()
        return None if b is None else b[self.rows]

    def apply(self, x: Tensor, weight: Any = KEEP, bias: Any = KEEP) -> Tensor:
        W = self.weight() if weight is KEEP else weight
        b = self.bias() if bias is KEEP else bias
        return F.linear(x, W.to(x.dtype), None if b is None else b.to(x.dtype))

    def add_low_rank(self, x: Tensor, L: Tensor, R: Tensor, inner: Tensor | None = None) -> Tensor:
        return self.whole.form.low_rank(self.whole.module, self(x), x if inner is None else inner, L, R)

    def rebuild(self, x: Tensor, build: Callable[[Tensor, Params], Tensor], p: Params) -> Tensor:
        if not rebuilds(x):
            return super().rebuild(x, build, p)
        b = self.bias()
        return rebuilt_linear(x, self.weight, None if b is None else b.to(x.dtype), build, p)


class Link(Call):
    """What a method made of the layer below it."""

    def __init__(self, below: Call, part: Part, form: Form, module: nn.Module):
        self.below, self.part, self.form, self.module = below, part, form, module
        self.training = below.training

    def __call__(self, x: Tensor) -> Tensor:
        self.below.caller = self.part
        y = self.part.method.forward(self.below, x, self.part.tensors(), self.part.site)
        if self.part.respond is not None:
            y = self.part.respond(self.below(x), y)
        if x.is_floating_point():
            return y if y.dtype == x.dtype or torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)
        raw = self.module._parameters.get("weight")
        return y if raw is None or not raw.is_floating_point() else y.to(raw.dtype)

    def _folded(self) -> tuple[Tensor, Tensor | None]:
        return self.part.fold(self.below.weight(), self.below.bias())

    def weight(self) -> Tensor:
        return self._folded()[0]

    def bias(self) -> Tensor | None:
        return self._folded()[1]

    def apply(self, x: Tensor, weight: Any = KEEP, bias: Any = KEEP) -> Tensor:
        W, b = self._folded() if weight is KEEP or bias is KEEP else (None, None)
        return self.below.apply(x, W if weight is KEEP else weight, b if bias is KEEP else bias)

    def add_low_rank(self, x: Tensor, L: Tensor, R: Tensor, inner: Tensor | None = None) -> Tensor:
        return self.form.low_rank(self.module, self(x), x if inner is None else inner, L, R)


class Whole(Call):
    """A block or sub-layer as the layer below: only calling it makes sense."""

    def __init__(self, run: Callable[[Tensor], Tensor], training: bool, what: str):
        self.run, self.training, self.what = run, training, what

    def __call__(self, x: Tensor) -> Tensor:
        return self.run(x)

    def weight(self) -> Tensor:
        raise Unsupported(f"{self.what} is not one layer; it has no single weight.")

    bias = weight  # type: ignore[assignment]


def linked(call: Call, parts: Sequence[Part], form: Form, module: nn.Module) -> Call:
    for part in parts:
        call = Link(call, part, form, module)
    return call


class Others:
    """What other adapters make of the layer where a part acts."""

    def __init__(self, part: Part, slot: Slot, module: nn.Module):
        self.part, self.slot, self.module = part, slot, module

    def __call__(self, below: Call, x: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        site, found = self.part.site, {}
        for name in names:
            here = [p for p in self.slot.parts.get(name, ()) if p.site.name == site.name]
            if here:
                found[name] = linked(below, here, self.slot.forms.get(site.parameter, Form()), self.module)(x)
        return found


def mixed(base: Call, x: Tensor, links: Sequence[tuple[Call, float]]) -> Tensor:
    """One adapter as it is; several as base + Σ weight · (adapted − base), each generated from the frozen layer."""
    if not links:
        return base(x)
    if len(links) == 1 and links[0][1] == 1.0:
        return links[0][0](x)
    y = base(x)
    return y + sum(weight * (link(x) - y) for link, weight in links)


def only_on(x: Tensor, y: Tensor, name: str) -> Callable[[Tensor], Tensor]:
    """A finished sub-layer as a function of its input; it cannot run again on another one."""

    def call(other: Tensor) -> Tensor:
        if other is not x:
            raise Unsupported(f"the sub-layer {name} has already run on its input; a method may add to its output, not change its input.")
        return y

    return call
