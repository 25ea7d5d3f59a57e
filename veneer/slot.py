"""The child `veneer` of an adapted module: which adapters it has, and how the module runs with them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.calls import Frozen, Rows, Whole, linked, mixed, only_on
from veneer.errors import Unsupported
from veneer.forms import Form, ParameterForm, form_of
from veneer.part import LAYERS, Part, Tensors, add_fold
from veneer.route import Active, Route, by_rows, join_rows, take_rows
from veneer.shared_rows import added, share

SHARED_INPUTS = ("embed.position", "embed.other")
"""Roles of tables that may be read once for all rows of a batch."""

HIDDEN = ("hidden_states", "input", "x", "src", "tgt", "query", "inputs", "hidden_state", "input_ids", "pixel_values")


def hidden_place(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> str | None:
    """Name of the keyword that carries the layer's main input; None when it is the first positional argument."""
    if args:
        return None
    for name in HIDDEN:
        if name in kwargs:
            return name
    return next(iter(kwargs))


class Slot(nn.Module):
    """The child `veneer` of an adapted module: its adapters by name, and how the module runs with them."""

    def __init__(self, route: Route, base_forward: Callable[..., Any]):
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
        self.projections: tuple[tuple[nn.Module, slice], ...] = ()

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
        return any(isinstance(f, ParameterForm) for f in self.forms.values())

    def reads(self, module: nn.Module) -> bool:
        """Whether the module itself reads adapted parameters: its own, or those of layers it never calls."""
        below = (child._modules.get("veneer") for child in module.children())
        return any(isinstance(s, Slot) and s.by_property for s in (self, *below))

    # -- running --------------------------------------------------------------------------------------------

    def run(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.whole is not None:
            return self.whole(self, module, args, kwargs)
        return self.run_here(module, args, kwargs)

    def run_here(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The module with its own adapters, whatever runs it as a whole."""
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
        groups = [
            ([p for parts, _ in self.chosen(active, LAYERS) for p in parts], index)
            for active, index in self.route.groups(x.shape[self.batch_dim], x.device)
        ]
        if len(groups) > 1 and x.is_floating_point() and share([parts for parts, _ in groups]):
            return added(call, x, groups, self.batch_dim)
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
                return mixed(base, x, [(linked(base, parts, Form(), module), w) for parts, w in chosen])

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
                rest[:] = [out[1:]] if isinstance(out, tuple) else []
                return out[0] if isinstance(out, tuple) else out

            base = Whole(call, module.training, "a block")
            chosen = self.chosen(active, ("block",))
            return mixed(base, x, [(linked(base, parts, Form(), module), w) for parts, w in chosen])

        if self.route.rows is None:
            y = run(x, self.route.active, lambda v: v)
        else:
            y = self.run_block_rows(x, run)
        return (y, *rest[0]) if rest else y

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
            if isinstance(form, ParameterForm) and name in (parameter, form.bias_name):
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
