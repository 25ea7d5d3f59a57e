"""A model with adapters: choosing what acts, training, merging, removing, saving."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from veneer.adapter import Adapter, Summary
from veneer.errors import BadValue, NoMatch, UnknownName, Unsupported, VeneerError, nearest
from veneer.forms import is_quantised, keep_trainable
from veneer.layer import slot_of
from veneer.merging import Merging
from veneer.method import Method, Params
from veneer.part import Tensors
from veneer.place import Places
from veneer.route import Active, Route
from veneer.site import Site
from veneer.slot import Slot
from veneer.source import Source
from veneer.strategy import Strategy

if TYPE_CHECKING:
    from veneer.streams.wrap import Reversible


class Tuned:
    """A model with adapters. Made by `attach` and `load`; `of(model)` finds it again."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.adapters: dict[str, Adapter] = {}
        self.route = Route()
        self._frozen_before = {name: p.requires_grad for name, p in model.named_parameters()}
        self._places = Places(model, self.route)
        self._merging = Merging(model)
        self._started = False
        self.reversible: Reversible | None = None
        """The network of two streams that the blocks are, after `veneer.reversible`."""

    # -- placing --------------------------------------------------------------------------------------------

    def add(self, adapter: Adapter, planned: Sequence[tuple[Method, Sequence[tuple[Method, Site]], Source]]) -> Tuned:
        """Places an adapter's parts (method, its sites, where its tensors come from), all or none, and activates it."""
        if self._merging:
            raise Unsupported("attach: adapters are merged into the base; call unmerge() first.")
        slot_of(self.model, self.route).tuned = self
        for module in self.model.modules():
            keep_trainable(module)
        try:
            for index, (part, found, source) in enumerate(planned):
                self._places.place(adapter, index, part, found, source)
            if not adapter.trained():
                count = len(adapter.parts)
                raise NoMatch(f"{adapter.method.label}: the {count} sites chosen have nothing to train; choose other targets.")
        except BaseException:
            self._places.drop(adapter)
            if not self.adapters and self.reversible is None:
                self.detach()
            raise
        self.adapters[adapter.name] = adapter
        self._freeze_base()
        adapter.strategies = [s for part, _, _ in planned if (s := part.strategy()) is not None]
        self._started = False
        return self.activate(adapter.name)

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
        if self._merging:
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
            self._weighable(active)
            self.route.rows, self.route.active = None, active
        self.route.ragged, self.route.captured = {}, {}
        names = {n for n, _ in self.route.active} | {n for n in self.route.rows or () if n}
        for adapter in self.adapters.values():
            for parameter in adapter.trained().values():
                parameter.requires_grad_(adapter.name in names)
        return self

    def _weighable(self, active: Active) -> None:
        """Raises `Unsupported` where several adapters, or a part of one, are asked of a method that cannot be weighted."""
        if len(active) == 1 and active[0][1] == 1.0:
            return
        for name, _ in active:
            for part in self.adapters[name].method.parts:
                if "weighted" in part.limits:
                    raise Unsupported(f"activate: {part.label} cannot be weighted or added to others: {part.limits['weighted']}.")

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
        if self._merging:
            raise Unsupported("disabled: adapters are merged into the base; call unmerge() first.")
        before, self.route.enabled = self.route.enabled, False
        try:
            yield self.model
        finally:
            self.route.enabled = before

    @contextmanager
    def acting(self, *names: str) -> Iterator[nn.Module]:
        """Other adapters inside the `with` block, none for the base: for comparison. What trains stays what it was."""
        if not names:
            with self.disabled() as model:
                yield model
            return
        self._known(*names)
        others: Active = tuple((name, 1.0) for name in names)
        self._weighable(others)
        before = self.route.active, self.route.rows
        self.route.active, self.route.rows = others, None
        self.route.ragged, self.route.captured = {}, {}
        try:
            yield self.model
        finally:
            self.route.active, self.route.rows = before
            self.route.ragged, self.route.captured = {}, {}

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

    def notes(self, name: str, key: str) -> Iterator[tuple[Site, Method, Tensor]]:
        """Site, method and tensor of every part that left one under this key in the last forward pass (`Call.note`)."""
        for part in self._one(name).parts:
            if key in part.notes:
                yield part.site, part.method, part.notes[key]

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

    # -- values that came later -----------------------------------------------------------------------------

    def materialise(self) -> Tuned:
        """Gives adapters that were attached while the base was on `meta` their values, once it has its weights.

        They are those of an ordinary attach (or of the adapter's file), bit for bit; layers are read one at a time, sharded
        ones gathered for it, so every process must call it. `veneer.fill` does it by itself. Optimisers come after it.
        """
        for adapter in self.adapters.values():
            for one in adapter.waiting:
                one.arrive()
            adapter.waiting = []
        return self

    # -- training -------------------------------------------------------------------------------------------

    def begin(self, total_steps: int | None = None, probe: Callable[[], Tensor] | None = None) -> None:
        """Starts the strategies of the active adapters.

        Args:
            total_steps: how many optimiser steps there will be, where the loop knows.
            probe: gives the task loss on another training batch; strategies that score by it ask for it now and then.
        """
        for name in self.active:
            for strategy in self.adapters[name].strategies:
                strategy.probe = probe
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

    def merge(self, *, keep: bool = True) -> Tuned:
        """Writes the active adapters into the base's weights (worked out in float32, then rounded to the base's dtype).

        Args:
            keep: keep the adapted weights as they were beside the merged ones, so that `unmerge` can bring them back. False
                needs no more memory than one weight's change, and `detach` is all that can follow.

        Raises:
            Unsupported: a method or layer that cannot be merged, with the reason; nothing has changed then.
        """
        if self._merging:
            raise Unsupported("merge: adapters are already merged; call unmerge() first.")
        if self.reversible is not None:
            raise Unsupported("merge: the reversible network is not the base with other weights; serve it with veneer.load(model, folder).")
        if self.route.rows is not None:
            raise Unsupported("merge: rows have different adapters; activate one adapter (or a weighted sum) first.")
        self._merging.write(self.route.active, keep)
        self.route.merged = True
        return self

    def unmerge(self) -> Tuned:
        """Takes the adapters out again: every base tensor is the very one it was."""
        if not self._merging:
            raise Unsupported("unmerge: nothing is merged.")
        if self._merging.for_good:
            raise Unsupported("unmerge: merged with keep=False, so the weights from before are gone; load the base again.")
        self._merging.undo()
        self.route.merged = False
        return self

    # -- removing -------------------------------------------------------------------------------------------

    def remove(self, name: str) -> Tuned:
        """Takes one adapter off. Another one becomes active if it was the active one."""
        self._known(name)
        if self._merging:
            raise Unsupported("remove: adapters are merged into the base; call unmerge() first.")
        for other, adapter in self.adapters.items():
            if any(name in part.relies_on for part in adapter.method.parts):
                raise Unsupported(f"remove: {other!r} mixes {name!r}; remove {other!r} first.")
        adapter = self.adapters.pop(name)
        self._places.drop(adapter)
        if name in {n for n, _ in self.route.active} | set(self.route.rows or ()):
            self.route.active, self.route.rows = (), None
            if self.adapters:
                self.activate(next(iter(self.adapters)))
        return self

    def detach(self) -> nn.Module:
        """Removes everything and returns the plain model. Merged weights stay merged; otherwise it is the base, exactly."""
        self._places.restore()
        for name, p in self.model.named_parameters():
            if not p.is_floating_point():
                continue
            p.requires_grad_(self._frozen_before.get(name, True))
        self.adapters.clear()
        self.reversible = None
        self._merging.forget()
        self.route.active, self.route.rows, self.route.merged = (), None, False
        return self.model

    # -- files ----------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, name: str | None = None, *, fixed: bool = False, **facts: Any) -> Path:
        """Writes one adapter to `folder` (adapter.safetensors + veneer.json), whole or not at all.

        Args:
            fixed: also store the random tensors that a method draws again from its seed; a checksum is always kept.
        """
        from veneer.store import save

        return save(self, folder, self._one(name).name, facts, fixed=fixed)

    def push_to_hub(self, repo: str, name: str | None = None, **options: Any) -> str:
        """Uploads one adapter with a model card through huggingface_hub; returns its address."""
        from veneer.hub import push

        return push(self, repo, self._one(name).name, **options)

    def __repr__(self) -> str:
        lines = [f"Tuned({type(self.model).__name__}, active={self.active})"]
        return "\n".join([*lines, *(f"  {n}: {self.summary(n)}" for n in self.adapters)])


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
    if not name.isidentifier() or hasattr(Slot(tuned.route, nn.Linear.forward), name):
        raise BadValue(
            f"attach: the adapter name {name!r} must be a plain word of letters, digits and underscores, such as 'default' or 'french'."
        )
