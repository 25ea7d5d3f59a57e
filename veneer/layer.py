"""Adapted layers: the class of a layer is swapped for a subclass of itself, its adapters are its child `veneer`."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.errors import Unsupported
from veneer.forms import Form, form_of, read_from_outside
from veneer.method import KEEP, Call, Method, Params
from veneer.route import Active, Route, by_rows, join_rows, take_rows
from veneer.site import Site

LAYERS = ("linear", "conv", "embedding", "norm")
SHARED_INPUTS = ("embed.position", "embed.other")
"""Roles of tables that may be read once for all rows of a batch."""


class Tensors(nn.Module):
    """The tensors of one adapter at one place (a layer, or the root for shared ones)."""

    def hold(self, name: str, tensor: Tensor, trained: bool) -> str:
        """Registers a tensor under the name (made unique) and returns the name it got."""
        key, n = name.replace(".", "_"), 1
        while key in self._parameters or key in self._buffers:
            n += 1
            key = f"{name.replace('.', '_')}_{n}"
        if trained:
            self.register_parameter(key, nn.Parameter(tensor))
        else:
            self.register_buffer(key, tensor)
        return key

    def named(self, keys: Mapping[str, str]) -> Params:
        """The tensors by their names in the method."""
        out = {}
        for name, key in keys.items():
            tensor = self._parameters.get(key)
            out[name] = tensor if tensor is not None else self._buffers[key]
        return out  # type: ignore[return-value]


class Part:
    """One method at one site: its place in the stack, and where its tensors are held."""

    def __init__(
        self,
        index: int,
        method: Method,
        site: Site,
        held: Tensors,
        keys: dict[str, str],
        shared: Tensors | None,
        shared_keys: dict[str, str],
    ):
        self.index, self.method, self.site = index, method, site
        self.held, self.keys, self.shared, self.shared_keys = held, keys, shared, shared_keys

    def tensors(self) -> Params:
        p = self.held.named(self.keys)
        if self.shared is not None and self.shared_keys:
            p.update(self.shared.named(self.shared_keys))
        return p

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The method's fold; for stacked matrices, once per matrix."""
        if not self.site.count:
            return self.method.fold(W, b, self.tensors(), self.site)
        axes = {name: 0 if name in self.keys else None for name in self.tensors()}
        folded = torch.vmap(lambda w, p: self.method.fold(w, None, p, self.site)[0], in_dims=(0, axes))
        return folded(W, self.tensors()), b


def compute_dtype(W: Tensor) -> torch.dtype:
    """Half-precision weights are worked on in float32."""
    return torch.float32 if W.dtype in (torch.float16, torch.bfloat16) or not W.is_floating_point() else W.dtype


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
            shift = 0 if bias is KEEP or bias is None else bias - (0 if own is None else own)
            return y if bias is KEEP else y + shift
        W = self.form.weight(self.module) if weight is KEEP else weight
        return self.form.apply(self.module, x, W, own if bias is KEEP else bias)

    def add_low_rank(self, x: Tensor, L: Tensor, R: Tensor, inner: Tensor | None = None) -> Tensor:
        if inner is None and not self.options and not self.rest and self.slot.plain:
            y = self.form.fused_low_rank(self.module, x, L, R)
            if y is not None:
                return y
        return self.form.low_rank(self.module, self(x), x if inner is None else inner, L, R)


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


class Link(Call):
    """What a method made of the layer below it."""

    def __init__(self, below: Call, part: Part, form: Form, module: nn.Module):
        self.below, self.part, self.form, self.module = below, part, form, module
        self.training = below.training

    def __call__(self, x: Tensor) -> Tensor:
        y = self.part.method.forward(self.below, x, self.part.tensors(), self.part.site)
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


def mixed(base: Call, x: Tensor, links: Sequence[tuple[Call, float]]) -> Tensor:
    """One adapter as it is; several as base + Σ weight · (adapted − base), each generated from the frozen layer."""
    if not links:
        return base(x)
    if len(links) == 1 and links[0][1] == 1.0:
        return links[0][0](x)
    y = base(x)
    return y + sum(weight * (link(x) - y) for link, weight in links)


class Slot(nn.Module):
    """The child `veneer` of an adapted module: its adapters by name, and how the module runs with them."""

    def __init__(self, module: nn.Module, route: Route, base_forward: Callable[..., Any]):
        super().__init__()
        self.route, self.base_forward = route, base_forward
        self.arguments = tuple(inspect.signature(base_forward).parameters)[1:]
        self.tuned: Any = None
        self.parts: dict[str, list[Part]] = {}
        self.forms: dict[str, Form] = {}
        self.entries: list[str] = []
        self.substitutes: dict[str, Any] = {}
        self.whole: Callable[[Slot, nn.Module, tuple, dict[str, Any]], Any] | None = None
        self.batch_dim = 0

    def forward(self, x: Any) -> Any:
        """Nothing: an `nn.Sequential` runs all of its children, this one too."""
        return x

    # -- bookkeeping ----------------------------------------------------------------------------------------

    def holder(self, adapter: str) -> Tensors:
        """The tensors of one adapter here."""
        if adapter not in self._modules:
            self.add_module(adapter, Tensors())
        return self._modules[adapter]  # type: ignore[return-value]

    def add(self, adapter: str, part: Part, module: nn.Module) -> None:
        self.parts.setdefault(adapter, []).append(part)
        site = part.site
        self.batch_dim = site.batch_dim
        if site.kind in (*LAYERS, "parameter") and site.parameter not in self.forms:
            self.forms[site.parameter] = form_of(module, site.kind, site.parameter)
            if self.by_property and not part.method.foldable:
                raise Unsupported(
                    f"{part.method.label}: the owner of {site.name} reads it as a weight, and this change is none: "
                    f"{part.method.limits.get('merge', 'it acts on outputs')}. Choose other targets."
                )

    def remove(self, adapter: str) -> None:
        self.parts.pop(adapter, None)
        self._modules.pop(adapter, None)

    def frozen(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The module as it was before it was adapted."""
        return self.base_forward(module, *args, **kwargs)

    def chosen(self, active: Active, kinds: Sequence[str], name: str = "") -> list[tuple[list[Part], float]]:
        out = []
        for adapter, weight in active:
            parts = [p for p in self.parts.get(adapter, ()) if p.site.kind in kinds and (not name or p.site.name == name)]
            if parts:
                out.append((parts, weight))
        return out

    def has(self, kinds: Sequence[str]) -> bool:
        return any(p.site.kind in kinds for parts in self.parts.values() for p in parts)

    @property
    def plain(self) -> bool:
        """Whether the frozen forward is nothing but x Wᵀ + b."""
        return self.base_forward.__qualname__ in ("Linear.forward", "Conv1D.forward")

    @property
    def by_property(self) -> bool:
        """Whether parameters are read through the class's properties instead of a call of this layer."""
        return any(type(f).__name__ == "ParameterForm" for f in self.forms.values())

    def reads(self, module: nn.Module) -> bool:
        """Whether the module itself reads adapted parameters: its own, or those of layers it never calls."""
        below = (child._modules.get("veneer") for child in module.children())
        return any(isinstance(s, Slot) and s.by_property for s in (self, *below))

    # -- running --------------------------------------------------------------------------------------------

    def run(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.whole is not None:
            return self.whole(self, module, args, kwargs)
        if self.has(("block",)):
            return self.run_block(module, args, kwargs)
        place = hidden_place(module, args, kwargs)
        if self.entries:
            for name in self.entries:
                self.route.captured[name] = args[0] if place is None else kwargs[place]
        if self.reads(module):
            y = self.run_owner(module, args, kwargs)
        elif self.forms:
            x = args[0] if place is None else kwargs[place]
            rest, options = (args[1:], kwargs) if place is None else (args, {k: v for k, v in kwargs.items() if k != place})
            y = self.run_layer(module, x, rest, options)
        else:
            y = self.frozen(module, *args, **kwargs)
        return self.run_branches(module, y) if self.has(("branch",)) else y

    def run_layer(self, module: nn.Module, x: Tensor, rest: tuple, options: dict[str, Any]) -> Tensor:
        call = Frozen(self, module, self.forms["weight"], rest, options)
        if self.route.rows is None:
            return self.adapted(call, x, self.route.active)
        if x.shape[0] == 1 and any(p.site.role in SHARED_INPUTS for parts in self.parts.values() for p in parts):
            x = x.expand(len(self.route.rows), *x.shape[1:])
        return by_rows(self.route, x, self.batch_dim, lambda group, active: self.adapted(call, group, active))

    def adapted(self, call: Frozen, x: Tensor, active: Active) -> Tensor:
        chosen = self.chosen(active, LAYERS)
        if not chosen:
            return call(x)
        if any(p.site.rows for parts, _ in chosen for p in parts):
            return self.adapted_rows(call, x, chosen)
        return mixed(call, x, [(linked(call, parts, call.form, call.module), weight) for parts, weight in chosen])

    def adapted_rows(self, call: Frozen, x: Tensor, chosen: list[tuple[list[Part], float]]) -> Tensor:
        y = call(x)
        whole = [(linked(call, own, call.form, call.module), w) for parts, w in chosen if (own := [p for p in parts if not p.site.rows])]
        pieces, at = [], 0
        for rows in sorted({p.site.rows for parts, _ in chosen for p in parts if p.site.rows}):
            below = Rows(call, rows, x, y)
            links = []
            for parts, weight in chosen:
                here = [p for p in parts if p.site.rows == rows]
                if here:
                    links.append((linked(below, here, call.form, call.module), weight))
            pieces += [y[..., at : rows[0]], mixed(below, x, links)]
            at = rows[1]
        out = torch.cat([*pieces, y[..., at:]], -1)
        return out + (mixed(call, x, whole) - y) if whole else out  # an adapter of the whole fused layer adds its change

    def run_owner(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.route.rows is None:
            return self.frozen(module, *args, **kwargs)
        size = next(a.shape[self.batch_dim] for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        device = next(a.device for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        results, indices = [], []
        for active, index in self.route.groups(size, device):
            picked = [take_rows(a, index, size, self.batch_dim) for a in args]
            options = {k: take_rows(v, index, size, self.batch_dim) for k, v in kwargs.items()}
            with self.route.narrowed(active):
                results.append(self.frozen(module, *picked, **options))
            indices.append(index)
        return join_rows(results, indices, [len(i) for i in indices], self.batch_dim)

    def run_branches(self, module: nn.Module, output: Any) -> Any:
        y = output[0] if isinstance(output, tuple) else output
        names = dict.fromkeys(p.site.name for parts in self.parts.values() for p in parts if p.site.kind == "branch")
        for name in names:
            x = self.route.captured.pop(name)

            def run(x: Tensor, y: Tensor, active: Active, name: str = name) -> Tensor:
                base = Whole(only_on(x, y, name), module.training, f"the sub-layer {name}")
                chosen = self.chosen(active, ("branch",), name)
                return mixed(base, x, [(linked(base, parts, Form(module), module), w) for parts, w in chosen])

            if self.route.rows is None:
                y = run(x, y, self.route.active)
            else:
                done, indices = [], []
                for active, index in self.route.groups(x.shape[self.batch_dim], x.device):
                    done.append(run(x.index_select(self.batch_dim, index), y.index_select(self.batch_dim, index), active))
                    indices.append(index)
                y = join_rows(done, indices, [len(i) for i in indices], self.batch_dim)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    def run_block(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        place = hidden_place(module, args, kwargs)
        x = args[0] if place is None else kwargs[place]
        rest: list[Any] = []

        def run(x: Tensor, active: Active, pick: Callable[[Any], Any]) -> Tensor:
            def call(x: Tensor) -> Tensor:
                if place is None:
                    out = self.frozen(module, x, *[pick(a) for a in args[1:]], **{k: pick(v) for k, v in kwargs.items()})
                else:
                    options = {k: x if k == place else pick(v) for k, v in kwargs.items()}
                    out = self.frozen(module, *[pick(a) for a in args], **options)
                rest[:] = out[1:] if isinstance(out, tuple) else [None]
                return out[0] if isinstance(out, tuple) else out

            base = Whole(call, module.training, "a block")
            chosen = self.chosen(active, ("block",))
            return mixed(base, x, [(linked(base, parts, Form(module), module), w) for parts, w in chosen])

        if self.route.rows is None:
            y = run(x, self.route.active, lambda v: v)
        else:
            y = self.run_block_rows(x, run)
        return y if rest == [None] else (y, *rest)

    def run_block_rows(self, x: Tensor, run: Callable[[Tensor, Active, Callable[[Any], Any]], Tensor]) -> Tensor:
        """Groups of rows may carry different numbers of tokens between blocks: shorter ones are padded at the end."""
        size = x.shape[0]
        lengths: dict[Active, int] = self.route.ragged.pop("lengths", {})
        results, indices = [], []
        for active, index in self.route.groups(size, x.device):
            own = x.index_select(0, index)[:, : lengths.get(active, x.shape[1])]
            with self.route.narrowed(active):
                results.append(run(own, active, lambda v, index=index: take_rows(v, index, size)))  # type: ignore[misc]
            indices.append(index)
        longest = max(r.shape[1] for r in results)
        if any(r.shape[1] != longest for r in results):
            self.route.ragged["lengths"] = {
                active: r.shape[1] for (active, _), r in zip(self.route.groups(size, x.device), results)
            }  # fmt: skip
            results = [F.pad(r, (0, 0, 0, longest - r.shape[1])) for r in results]
        return join_rows(results, indices, [len(i) for i in indices])

    # -- parameters -----------------------------------------------------------------------------------------

    def read(self, module: nn.Module, name: str) -> Any:
        """What the module sees under a parameter's name."""
        if name in self.substitutes:
            return self.substitutes[name]
        raw = module._parameters[name]
        if not self.route.on:
            return raw
        for parameter, form in self.forms.items():
            if type(form).__name__ == "ParameterForm" and name in (parameter, form.bias_name):
                W, b = self.effective(module, parameter, self.route.active)
                value = W if name == parameter else b
                return raw if value is None or raw is None else value.to(raw.dtype).reshape(raw.shape)
        return raw

    @contextmanager
    def substituted(self, values: dict[str, Any]) -> Iterator[None]:
        self.substitutes = values
        try:
            yield
        finally:
            self.substitutes = {}

    def effective(self, module: nn.Module, parameter: str, active: Active) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a parameter with the active adapters folded in, in the form's layout."""
        form = self.forms[parameter]
        call = Frozen(self, module, form)
        W, b = call.weight(), call.bias()
        new_W, new_b = W, b
        for parts, weight in self.chosen(active, (*LAYERS, "parameter")):
            here = [p for p in parts if p.site.parameter == parameter]
            for rows in dict.fromkeys(p.site.rows for p in here):
                chain = [p for p in here if p.site.rows == rows]
                new_W, new_b = add_fold(new_W, new_b, W, b, rows, chain, weight)
        return new_W, new_b


def add_fold(
    new_W: Tensor, new_b: Tensor | None, W: Tensor, b: Tensor | None, rows: tuple[int, int] | None, chain: list[Part], weight: float
) -> tuple[Tensor, Tensor | None]:
    """Adds weight · (folded − frozen) for one row range; with weight 1 on untouched rows, the fold itself."""
    at = slice(None) if rows is None else slice(*rows)
    stacked = bool(chain[0].site.count)
    own_W = W[:, at] if stacked else W[at]
    own_b = None if b is None else b[at]
    folded_W, folded_b = own_W, own_b
    for part in chain:
        folded_W, folded_b = part.fold(folded_W, folded_b)
    if folded_W is not own_W:
        now = new_W[:, at] if stacked else new_W[at]
        change = folded_W if weight == 1.0 and new_W is W else now + weight * (folded_W - own_W)
        new_W = change if rows is None else placed(new_W, change, rows, 1 if stacked else 0)
    if folded_b is not None and folded_b is not own_b:
        whole = torch.zeros(W.shape[0], dtype=folded_b.dtype, device=folded_b.device) if new_b is None else new_b
        old = 0 if own_b is None else own_b
        change = folded_b if weight == 1.0 and new_b is b else whole[at] + weight * (folded_b - old)
        new_b = change if rows is None else placed(whole, change, rows, 0)
    return new_W, new_b


def placed(whole: Tensor, piece: Tensor, rows: tuple[int, int], axis: int) -> Tensor:
    """`whole` with `piece` in place of its rows."""
    before, _, after = whole.split([rows[0], rows[1] - rows[0], whole.shape[axis] - rows[1]], axis)
    return torch.cat([before, piece, after], axis)


def only_on(x: Tensor, y: Tensor, name: str) -> Callable[[Tensor], Tensor]:
    """A finished sub-layer as a function of its input; it cannot run again on another one."""

    def call(other: Tensor) -> Tensor:
        if other is not x:
            raise Unsupported(f"the sub-layer {name} has already run on its input; a method may add to its output, not change its input.")
        return y

    return call


# -- classes ------------------------------------------------------------------------------------------------


class Adapted:
    """Marks the swapped classes: `isinstance(layer, Adapted)`."""


HIDDEN = ("hidden_states", "input", "x", "src", "tgt", "query", "inputs", "hidden_state", "input_ids", "pixel_values")


def hidden_place(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> str | None:
    """Name of the keyword that carries the layer's main input; None when it is the first positional argument."""
    if args:
        return None
    for name in HIDDEN:
        if name in kwargs:
            return name
    return next(iter(kwargs))


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
    slot = Slot(module, route, type(module).forward)
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
