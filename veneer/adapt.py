"""Attaching methods to models, and everything a user does with what is attached."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from veneer import anatomy, prompts, registry
from veneer.errors import BadValue, NoMatch, UnknownName, Unsupported, VeneerError, nearest
from veneer.forms import form_of, is_quantised, read_from_outside
from veneer.layer import LAYERS, Frozen, Part, Slot, Tensors, adapt, compute_dtype, restore, slot_of
from veneer.method import Method, Params, replaced
from veneer.route import Active, Route
from veneer.site import Site, matches, tokens_of
from veneer.strategy import Strategy


@dataclass
class Adapter:
    """A method attached under a name."""

    name: str
    method: Method
    parts: list[Part]
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    strategies: list[Strategy] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    """Training facts that are saved with it."""

    @property
    def sites(self) -> list[Site]:
        return [p.site for p in self.parts]

    def trained(self) -> dict[int, nn.Parameter]:
        """Its parameters, each once, by id."""
        return {id(t): t for part in self.parts for t in part.tensors().values() if isinstance(t, nn.Parameter)}


@dataclass(frozen=True)
class Summary:
    """What is attached, in numbers; `str` gives one line."""

    spec: str
    trained: int
    total: int
    sites: int
    roles: dict[str, int]

    @property
    def percent(self) -> float:
        return 100.0 * self.trained / max(self.total, 1)

    def __str__(self) -> str:
        roles = ", ".join(f"{n}× {role}" for role, n in self.roles.items())
        return f"{self.spec}: {self.trained:,} trained of {self.total:,} ({self.percent:.3f} %), {self.sites} sites ({roles})"


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

    Raises:
        VeneerError: unknown targets, hyper-parameters that do not fit a layer, a taken name, a wrapped model.
    """
    tuned = tuned_of(model)
    if isinstance(method, str):
        from veneer.spec import parse

        method = parse(method)
    check_name(name, tuned)
    sites = anatomy.sites(model, roles)
    chosen = _choose(method, sites, head, allow_unmatched)
    _check_overrides(overrides or {}, chosen)
    method = _stacked([part for part, _ in chosen])
    planned = [(part, [_special(part, site, overrides) for site in found]) for part, found in chosen]
    starts: dict[tuple[int, str], Params] = {}
    for i, (part, found) in enumerate(planned):
        if part.calibrates:
            planned[i] = (part, _calibrated(model, part, found, batches, i, starts))
    for _, found in planned:
        for special, site in found:
            special.check(site)
    adapter = Adapter(name, method, [], {k: dict(v) for k, v in (overrides or {}).items()})
    generator = Generator().manual_seed(seed)
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


def tuned_of(model: nn.Module) -> Tuned:
    """What is attached to the model, or an empty beginning."""
    if not isinstance(model, nn.Module):
        raise BadValue(f"attach: expected a torch.nn.Module, got {type(model).__name__}; load the model first and pass the object.")
    kind = type(model).__name__
    if kind == "OptimizedModule" or kind.startswith("FSDP") or kind in ("DistributedDataParallel", "FullyShardedDataParallel"):
        raise Unsupported(f"attach: the model is already wrapped ({kind}). Attach first, then shard, then compile.")
    slot = model._modules.get("veneer")
    return slot.tuned if isinstance(slot, Slot) and slot.tuned is not None else Tuned(model)


def check_name(name: str, tuned: Tuned) -> None:
    """Raises `BadValue` for a name that is taken or that a module cannot have."""
    if name in tuned.adapters:
        raise BadValue(f"attach: an adapter named {name!r} is already attached; choose another name or call remove({name!r}) first.")
    if not name.isidentifier() or hasattr(Slot(nn.Module(), tuned.route, nn.Linear.forward), name):
        raise BadValue(
            f"attach: the adapter name {name!r} must be a plain word of letters, digits and underscores, such as 'default' or 'french'."
        )


def _choose(method: Method, sites: Sequence[Site], head: bool | str, allow_unmatched: bool) -> list[tuple[Method, list[Site]]]:
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


def _stacked(parts: Sequence[Method]) -> Method:
    method = parts[0]
    for part in parts[1:]:
        method = method + part
    return method


def _check_overrides(overrides: Mapping[str, Mapping[str, Any]], chosen: Sequence[tuple[Method, Sequence[Site]]]) -> None:
    """Raises for a pattern that matches none of the chosen sites, or a hyper-parameter that no method there has."""
    for pattern, changes in overrides.items():
        there = [part for part, found in chosen if any(_overridden(pattern, site) for site in found)]
        if not there:
            names = {n for _, found in chosen for s in found for n in (s.name, s.role)}
            raise NoMatch(f"overrides: {pattern!r} matches none of the chosen sites.{nearest(pattern, names)}")
        known = {name for part in there for name in type(part).__dataclass_fields__}
        for name in changes:
            if name not in known:
                raise UnknownName(f"overrides: {there[0].label} has no option {name!r}, given for {pattern!r}.{nearest(name, known)}")


def _overridden(pattern: str, site: Site) -> bool:
    return matches(pattern, site) or re.search(pattern, site.name) is not None


def _special(part: Method, site: Site, overrides: Mapping[str, Mapping[str, Any]] | None) -> tuple[Method, Site]:
    """The part with the hyper-parameters that differ at this site."""
    for pattern, changes in (overrides or {}).items():
        if _overridden(pattern, site):
            known = {k: v for k, v in changes.items() if k in type(part).__dataclass_fields__}
            part = replaced(part, known) if known else part
    return part, site


def _calibrated(
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


class Tuned:
    """A model with adapters. Made by `attach` and `load`; `of(model)` finds it again."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.adapters: dict[str, Adapter] = {}
        self.route = Route()
        self._frozen_before = {name: p.requires_grad for name, p in model.named_parameters()}
        self._originals: dict[tuple[str, str], nn.Parameter | None] = {}
        self._configs: list[tuple[Any, str]] = []
        self._untied: list[Any] = []
        self._eager_layers: list[tuple[nn.Module, Any]] = []
        self._started = False

    # -- placing --------------------------------------------------------------------------------------------

    def add(self, adapter: Adapter, planned: Sequence[tuple[Method, Sequence[tuple[Method, Site]], Source]]) -> Tuned:
        """Places an adapter's parts (method, its sites, where its tensors come from), all or none, and activates it."""
        if self._originals:
            raise Unsupported("attach: adapters are merged into the base; call unmerge() first.")
        slot_of(self.model, self.route).tuned = self
        for module in self.model.modules():
            _keep_trainable(module)
        try:
            for index, (part, found, source) in enumerate(planned):
                self._place(adapter, index, part, found, source)
            if not adapter.trained():
                count = len(adapter.parts)
                raise NoMatch(f"{adapter.method.label}: the {count} sites chosen have nothing to train; choose other targets.")
        except BaseException:
            self._drop(adapter)
            if not self.adapters:
                self.detach()
            raise
        self.adapters[adapter.name] = adapter
        self._freeze_base()
        adapter.strategies = [s for part, _, _ in planned if (s := part.strategy()) is not None]
        self._started = False
        return self.activate(adapter.name)

    def _place(self, adapter: Adapter, index: int, part: Method, found: Sequence[tuple[Method, Site]], source: Source) -> None:
        """Puts one part's tensors where they belong; `source` makes them or has them from a file."""
        root = slot_of(self.model, self.route)
        found = [(special, replace(site, ordinal=n)) for n, (special, site) in enumerate(found)]
        groups: dict[str, list[Site]] = {}
        for special, site in found:
            if (group := special.tie(site)) is not None:
                groups.setdefault(group, []).append(site)
        shared: dict[str | None, dict[str, str]] = {None: {}}
        for group, members in groups.items():
            module = self.model.get_submodule(members[0].module)
            like, holder = _like(module, members[0]), root.holder(adapter.name)
            shared[group] = {
                name: holder.hold(name if len(groups) == 1 else f"{group}_{name}", _cast(t, like, module), name not in part.frozen)
                for name, t in source.shared(part, group, members).items()
            }
        attention: list[Slot] = []
        for special, site in found:
            module, slot = self._slot(site)
            keys = shared[special.tie(site)]
            ours = root.holder(adapter.name) if keys else None
            like = _like(module, site)
            p = source.own(special, site, module, slot, like, ours.named(keys) if ours is not None else {})
            holder = slot.holder(adapter.name)
            names = {name: holder.hold(name, _cast(t, like, module), name not in special.frozen) for name, t in p.items()}
            piece = Part(index, special, site, holder, names, ours, keys)
            slot.add(adapter.name, piece, module)
            adapter.parts.append(piece)
            if site.kind == "attention":
                attention.append(slot)
            if site.kind == "branch":
                self._enter(site)
        if attention:
            self._configs += prompts.route_attention(self.model)
            shift = part.shift_positions  # type: ignore[attr-defined]
            if shift or (shift is None and any(s.causal and s.side == "" for _, s in found)):
                prompts.install_shift(self.model, attention)

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
        """Lets a sub-layer's first module note its input."""
        slot = adapt(self.model.get_submodule(site.entry), self.route, ())
        if site.name not in slot.entries:
            slot.entries.append(site.name)

    def _leave_fast_path(self, site: Site) -> None:
        """`nn.TransformerEncoderLayer` reads its layers' weights itself in evaluation: keep it on the ordinary path."""
        path = site.module
        while path:
            path = path.rpartition(".")[0]
            parent = self.model.get_submodule(path)
            if isinstance(parent, nn.TransformerEncoderLayer) and all(m is not parent for m, _ in self._eager_layers):
                self._eager_layers.append((parent, parent.activation_relu_or_gelu))
                parent.activation_relu_or_gelu = 0

    def _freeze_base(self) -> None:
        own = {id(p) for m in self.model.modules() if isinstance(m, Tensors) for p in m.parameters()}
        for p in self.model.parameters():
            if id(p) not in own:
                p.requires_grad_(False)

    # -- choosing what acts ---------------------------------------------------------------------------------

    def activate(
        self,
        which: str | Sequence[str] | Mapping[str, float] | None = None,
        *,
        weights: Mapping[str, float] | None = None,
        per_row: Sequence[str | None] | None = None,
    ) -> Tuned:
        """Chooses the adapters that act, and that train.

        `activate("fr")`; `activate(["fr", "en"])` adds their changes; `activate({"fr": 0.3, "en": 0.7})` weights them;
        `activate(per_row=["fr", None, "en"])` gives every row of the batch its own (None: the base).
        """
        if self._originals:
            raise Unsupported("activate: adapters are merged into the base; call unmerge() first.")
        given = weights if weights is not None else which
        if (given is None) == (per_row is None):
            raise BadValue("activate: give either names (or weights), or per_row=[…].")
        if per_row is not None:
            self._known(*[n for n in per_row if n is not None])
            if not per_row:
                raise BadValue("activate: per_row is empty; give one adapter name (or None) per row of the batch.")
            self.route.rows, self.route.active = tuple(per_row), ()
        else:
            assert given is not None
            active: Active
            if isinstance(given, str):
                active = ((given, 1.0),)
            elif isinstance(given, Mapping):
                active = tuple((n, float(w)) for n, w in given.items())
            else:
                active = tuple((n, 1.0) for n in given)
            self._known(*[n for n, _ in active])
            self.route.rows, self.route.active = None, active
        self.route.ragged, self.route.captured = {}, {}
        names = {n for n, _ in self.route.active} | {n for n in self.route.rows or () if n}
        for adapter in self.adapters.values():
            for parameter in adapter.trained().values():
                parameter.requires_grad_(adapter.name in names)
        return self

    def _known(self, *names: str) -> None:
        for name in names:
            if name not in self.adapters:
                have = ", ".join(self.adapters) or "none"
                raise UnknownName(f"No adapter named {name!r} is attached; there are: {have}.{nearest(str(name), self.adapters)}")

    @property
    def active(self) -> list[str]:
        """Names of the adapters that act."""
        return [n for n, _ in self.route.active] or list(dict.fromkeys(n for n in self.route.rows or () if n))

    @contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """The base model, exactly, inside the `with` block."""
        if self._originals:
            raise Unsupported("disabled: adapters are merged into the base; call unmerge() first.")
        before, self.route.enabled = self.route.enabled, False
        try:
            yield self.model
        finally:
            self.route.enabled = before

    # -- looking --------------------------------------------------------------------------------------------

    def sites(self, name: str | None = None) -> list[Site]:
        """The sites of one adapter (by default of the first active one)."""
        return self._one(name).sites

    def _one(self, name: str | None) -> Adapter:
        if name is None:
            if not self.adapters:
                raise VeneerError("No adapter is attached.")
            name = self.active[0] if self.active else next(iter(self.adapters))
        self._known(name)
        return self.adapters[name]

    def entries(self, name: str | None = None) -> Iterator[tuple[Site, Method, Params]]:
        """Site, method and live tensors of every part of one adapter."""
        for part in self._one(name).parts:
            yield part.site, part.method, part.tensors()

    def named_parameters(self, name: str | None = None) -> Iterator[tuple[str, nn.Parameter]]:
        """Trained tensors of one adapter as ("site/tensor", parameter); shared ones once."""
        seen: set[int] = set()
        for part in self._one(name).parts:
            for key, tensor in part.tensors().items():
                if isinstance(tensor, nn.Parameter) and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield f"{part.site.name}/{key}", tensor

    def parameters(self, name: str | None = None) -> list[nn.Parameter]:
        """The trained tensors of the active adapters (or of one by name), each once."""
        names = [name] if name is not None else self.active
        found: dict[int, nn.Parameter] = {}
        for one in names:
            found.update(self._one(one).trained())
        return list(found.values())

    def param_groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Optimiser groups: each tensor at its method's own ratio of lr; no decay on vectors."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        seen: set[int] = set()
        for one in self.active:
            for part in self._one(one).parts:
                ratios = part.method.lr_ratios()
                for key, tensor in part.tensors().items():
                    if isinstance(tensor, nn.Parameter) and id(tensor) not in seen:
                        seen.add(id(tensor))
                        decay = weight_decay if tensor.ndim > 1 else 0.0
                        groups.setdefault((lr * ratios.get(key, 1.0), decay), []).append(tensor)
        return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]

    def summary(self, name: str | None = None) -> Summary:
        """Spec, trained and total parameters, sites and roles of one adapter. Total counts base and this adapter."""
        adapter = self._one(name)
        trained = sum(p.numel() for p in adapter.trained().values())
        roles: dict[str, int] = {}
        for site in adapter.sites:
            roles[site.role] = roles.get(site.role, 0) + 1
        return Summary(adapter.method.spec, trained, self.base_size() + trained, len(adapter.sites), roles)

    def base_size(self) -> int:
        """Number of parameters of the base; packed weights count as what they stand for."""
        total = 0
        for name, p in self.model.named_parameters():
            if "veneer" not in name.split("."):
                module: Any = self.model.get_submodule(name.rpartition(".")[0])
                packed = is_quantised(module) and name.endswith("weight")
                total += module.in_features * module.out_features if packed else p.numel()
        return total

    # -- training -------------------------------------------------------------------------------------------

    def begin(self, total_steps: int | None = None) -> None:
        """Starts the strategies of the active adapters; loops that know their length say so."""
        for name in self.active:
            for strategy in self.adapters[name].strategies:
                strategy.start(self, name, total_steps)
        self._started = True

    def _strategies(self) -> list[Strategy]:
        if not self._started:
            self.begin()
        return [s for name in self.active for s in self.adapters[name].strategies]

    def before_step(self) -> None:
        """Call after backward, before the optimiser's step."""
        for strategy in self._strategies():
            strategy.before_step()

    def after_step(self) -> None:
        """Call after the optimiser's step, before gradients are cleared."""
        for strategy in self._strategies():
            strategy.after_step()

    def loss_terms(self) -> dict[str, Tensor]:
        """Extra loss terms of the active adapters: `loss = task_loss + sum(tuned.loss_terms().values())`."""
        terms: dict[str, Tensor] = {}
        for strategy in self._strategies():
            terms.update(strategy.loss_terms())
        return terms

    def strategy_state(self) -> dict[str, list[dict[str, Any]]]:
        """State of all strategies, for checkpoints."""
        return {name: [s.state_dict() for s in a.strategies] for name, a in self.adapters.items() if a.strategies}

    def load_strategy_state(self, state: Mapping[str, Sequence[dict[str, Any]]]) -> None:
        for name, states in state.items():
            self._known(name)
            for strategy, one in zip(self.adapters[name].strategies, states):
                strategy.load_state_dict(one)

    # -- merging --------------------------------------------------------------------------------------------

    def merge(self) -> Tuned:
        """Writes the active adapters into the base's weights (worked out in float32, then rounded to the base's dtype).

        Raises:
            Unsupported: a method or layer that cannot be merged, with the reason; nothing has changed then.
        """
        if self._originals:
            raise Unsupported("merge: adapters are already merged; call unmerge() first.")
        if self.route.rows is not None:
            raise Unsupported("merge: rows have different adapters; activate one adapter (or a weighted sum) first.")
        slots = self._mergeable()
        done: dict[tuple[str, str], nn.Parameter | None] = {}
        try:
            with torch.no_grad():
                for path, module, slot in slots:
                    self._write(path, module, slot, done)
        except BaseException:
            self._put_back(done)
            raise
        self._originals, self.route.merged = done, True
        self._untie(done)
        return self

    def _mergeable(self) -> list[tuple[str, nn.Module, Slot]]:
        found = []
        for path, module in self.model.named_modules():
            slot = module._modules.get("veneer")
            if not isinstance(slot, Slot):
                continue
            parts = [p for name in self.active for p in slot.parts.get(name, ())]
            for part in parts:
                if not part.method.foldable or part.site.kind not in (*LAYERS, "parameter"):
                    reason = part.method.limits.get("merge", "it does not act on a weight")
                    raise Unsupported(f"merge: {part.method.label} at {part.site.name} cannot be merged: {reason}")
                form = slot.forms[part.site.parameter]
                if form.writable:
                    raise Unsupported(f"merge: {part.site.name} cannot take a merge: {form.writable}")
                if module._parameters[part.site.parameter].device.type == "meta":  # type: ignore[union-attr]
                    raise Unsupported(f"merge: the weight of {part.site.name} is offloaded; load the model without offloading to merge.")
            if parts:
                found.append((path, module, slot))
        if not found:
            raise Unsupported("merge: no active adapter acts on a weight; activate one first.")
        return found

    def _write(self, path: str, module: nn.Module, slot: Slot, done: dict) -> None:
        names = {p.site.parameter for name in self.active for p in slot.parts.get(name, ())}
        for parameter in sorted(names):
            form = slot.forms[parameter]
            W, b = slot.effective(module, parameter, self.route.active)
            raw = module._parameters[parameter]
            assert raw is not None
            self._replace(path, module, parameter, form.store(W, raw), done)
            own = module._parameters.get(form.bias_name)
            if b is None:
                continue
            if own is None and form.bias_name not in module._parameters:
                raise Unsupported(f"merge: {type(module).__name__} at {path} has no bias to take the shift.")
            self._replace(path, module, form.bias_name, b.to(raw.dtype if own is None else own.dtype), done)

    @staticmethod
    def _replace(path: str, module: nn.Module, name: str, value: Tensor, done: dict) -> None:
        done[path, name] = module._parameters[name]
        module._parameters[name] = nn.Parameter(value.detach().clone(), requires_grad=False)

    def _put_back(self, originals: Mapping[tuple[str, str], nn.Parameter | None]) -> None:
        for (path, name), parameter in originals.items():
            self.model.get_submodule(path)._parameters[name] = parameter

    def _untie(self, merged: Mapping[tuple[str, str], nn.Parameter | None]) -> None:
        """A merged layer keeps its own weight where it shared one: the other use must not change."""
        kept = {id(p) for _, p in self.model.named_parameters()}
        shared = [path for (path, _), p in merged.items() if p is not None and id(p) in kept]
        if not shared:
            return
        warnings.warn(f"merge: {', '.join(shared)} shared its weight with another layer; they are untied now.", stacklevel=3)
        for config in {id(c): c for m in self.model.modules() if (c := getattr(m, "config", None)) is not None}.values():
            if getattr(config, "tie_word_embeddings", False):
                config.tie_word_embeddings = False
                self._untied.append(config)

    def unmerge(self) -> Tuned:
        """Takes the adapters out again: every base tensor is the very one it was."""
        if not self._originals:
            raise Unsupported("unmerge: nothing is merged.")
        self._put_back(self._originals)
        for config in self._untied:
            config.tie_word_embeddings = True
        self._originals, self._untied, self.route.merged = {}, [], False
        return self

    # -- removing -------------------------------------------------------------------------------------------

    def remove(self, name: str) -> Tuned:
        """Takes one adapter off. Another one becomes active if it was the active one."""
        self._known(name)
        if self._originals:
            raise Unsupported("remove: adapters are merged into the base; call unmerge() first.")
        adapter = self.adapters.pop(name)
        self._drop(adapter)
        if name in {n for n, _ in self.route.active} | set(self.route.rows or ()):
            self.route.active, self.route.rows = (), None
            if self.adapters:
                self.activate(next(iter(self.adapters)))
        return self

    def _drop(self, adapter: Adapter) -> None:
        for module in list(self.model.modules()):
            slot = module._modules.get("veneer")
            if isinstance(slot, Slot):
                slot.remove(adapter.name)

    def detach(self) -> nn.Module:
        """Removes everything and returns the plain model. Merged weights stay merged; otherwise it is the base, exactly."""
        for module in list(self.model.modules()):
            restore(module)
        for config, implementation in self._configs:
            config._attn_implementation_internal = implementation
        for layer, flag in self._eager_layers:
            layer.activation_relu_or_gelu = flag
        for name, p in self.model.named_parameters():
            if not p.is_floating_point():
                continue
            p.requires_grad_(self._frozen_before.get(name, True))
        self.adapters.clear()
        self._configs, self._eager_layers, self._originals = [], [], {}
        self.route.active, self.route.rows = (), None
        return self.model

    # -- files ----------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, name: str | None = None, **facts: Any) -> Path:
        """Writes one adapter to `folder` (adapter.safetensors + veneer.json), whole or not at all."""
        from veneer.store import save

        return save(self, folder, self._one(name).name, facts)

    def push_to_hub(self, repo: str, name: str | None = None, **options: Any) -> str:
        """Uploads one adapter with a model card through huggingface_hub; returns its address."""
        from veneer.hub import push

        return push(self, repo, self._one(name).name, **options)

    def __repr__(self) -> str:
        lines = [f"Tuned({type(self.model).__name__}, active={self.active})"]
        return "\n".join([*lines, *(f"  {n}: {self.summary(n)}" for n in self.adapters)])


class Source:
    """Where the tensors of a new adapter's part come from."""

    def shared(self, part: Method, group: str, members: Sequence[Site]) -> Params:
        """Tensors shared by a tie group."""
        raise NotImplementedError

    def own(self, method: Method, site: Site, module: nn.Module, slot: Slot, like: Tensor, shared: Params) -> Params:
        """Tensors of one site."""
        raise NotImplementedError


class Fresh(Source):
    """First values, drawn from a generator or settled from data."""

    def __init__(self, generator: Generator, index: int, starts: Mapping[tuple[int, str], Params]):
        self.generator, self.index, self.starts = generator, index, starts

    def shared(self, part: Method, group: str, members: Sequence[Site]) -> Params:
        return part.init_shared(members, self.generator)

    def own(self, method: Method, site: Site, module: nn.Module, slot: Slot, like: Tensor, shared: Params) -> Params:
        p = self._first(method, site)
        p.update(self.starts.get((self.index, site.name), {}))
        p = {k: t.to(like.dtype) if t.is_floating_point() else t for k, t in p.items()}
        if not method.reads_weight:
            return p
        with torch.no_grad():
            return self._from_weight(method, site, module, slot, p, shared)

    def _first(self, method: Method, site: Site) -> Params:
        if not site.count:
            return dict(method.init(site, self.generator))
        each = [method.init(site, self.generator) for _ in range(site.count)]  # stacked matrices: each its own draw
        return {name: torch.stack([e[name] for e in each]) for name in each[0]}

    def _from_weight(self, method: Method, site: Site, module: nn.Module, slot: Slot, p: Params, shared: Params) -> Params:
        if site.kind == "model":
            table = module.get_input_embeddings().weight  # type: ignore[operator]
            return method.init_from_weight(table.detach(), None, p, site, self.generator)
        if site.kind not in (*LAYERS, "parameter"):
            return p
        call = Frozen(slot, module, form_of(module, site.kind, site.parameter))
        W, b = call.weight(), call.bias()
        if site.count:
            own = W if site.rows is None else W[:, slice(*site.rows)]
            each = [method.init_from_weight(w, None, {k: t[i] for k, t in p.items()}, site, self.generator) for i, w in enumerate(own)]
            return {k: torch.stack([e[k] for e in each]) for k in each[0]}
        if site.rows is not None:
            W, b = W[slice(*site.rows)], None if b is None else b[slice(*site.rows)]
        made = method.init_from_weight(W, b, {**shared, **{k: t.to(W.device) for k, t in p.items()}}, site, self.generator)
        return {k: t for k, t in made.items() if k not in shared}


def _like(module: nn.Module, site: Site) -> Tensor:
    """A parameter of the module that tells dtype and device for its adapters."""
    held = module._parameters.get(site.parameter) if site.kind in (*LAYERS, "parameter") else None
    if held is None or not held.is_floating_point():
        held = next((p for p in module.parameters() if p.is_floating_point()), held)
    if held is None:
        return torch.zeros((), dtype=torch.float32)
    return torch.empty(0, dtype=compute_dtype(held), device=held.device)


def _cast(tensor: Tensor, like: Tensor, module: nn.Module) -> Tensor:
    """A first tensor in the adapter's dtype on the layer's device; where the layer is offloaded, on the device it runs on."""
    device = like.device
    hook = getattr(module, "_hf_hook", None)
    if device.type == "meta" and hook is not None:
        device = torch.device(getattr(hook, "execution_device", None) or "cpu")
    return tensor.detach().to(device, like.dtype if tensor.is_floating_point() else tensor.dtype).clone()


def _keep_trainable(module: nn.Module) -> None:
    """Some CPUs repack bitsandbytes 4-bit weights at the first evaluation, after which gradients stop silently: prevent or undo it."""
    if not hasattr(module, "support_avx512bf16_for_cpu"):
        return
    module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    weight: Any = module.weight
    state: Any = getattr(weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpacked

        weight.data, weight.quant_state = unpacked(weight.data, state)
        if not weight.quant_state.nested:  # left in the packed order there
            weight.quant_state.absmax = weight.quant_state.absmax.T.reshape(-1).float()


__all__ = ["Adapter", "Source", "Summary", "Tuned", "attach", "of"]
