"""Activations of feed-forward networks: where a model has them, and what each pass makes of them (2024, arXiv:2402.01911)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, TypeAlias

from torch import Tensor, nn

from veneer import anatomy
from veneer.errors import NoMatch, Unsupported, nearest
from veneer.site import Site, tokens_of
from veneer.strategies.passes import mask_in, named_inputs

NONE = "the model has no feed-forward network whose activation can be seen as a module"
KNOWN = ("torch.nn.modules.activation", "transformers.activations")
"""Where activation functions come from that are modules."""

Measure: TypeAlias = Callable[[Tensor, "Tensor | None"], Tensor]
"""(activations, mask [rows, tokens] of real tokens or None) → what is kept of them."""


@dataclass(frozen=True)
class Activation:
    """One activation function: its module (with `before`: the module that reads it), its stack, the last projection after it."""

    module: str
    side: str = ""
    down: str = ""
    before: bool = False


def activations(model: nn.Module, named: str | None = None) -> list[Activation]:
    """The activations of all feed-forward networks in model order, or of the modules named (names, endings, regular expressions).

    For gated networks that is the gate's branch before it is multiplied. Where the function is no module, an ungated
    network's is what its last projection reads. Raises `Unsupported` where neither can be had, `NoMatch` for unknown names."""
    sites = anatomy.sites(model)
    found = _named(model, sites, named) if named else [a for s in sites if s.role == "mlp.down" for a in _of(model, s, sites)]
    if not found:
        raise Unsupported(f"{NONE}; name modules with modules='…'.")
    return list({a.module: a for a in found}.values())


def _of(model: nn.Module, down: Site, sites: list[Site]) -> list[Activation]:
    """The activations of the network that ends at `down`."""
    if down.kind != "linear":
        return []
    others = [s for s in sites if s.role in ("mlp.up", "mlp.gate") and (s.depth, s.side) == (down.depth, down.side)]
    first = max(others, key=lambda s: len(_common(s.module, down.module)), default=None)
    if first is None:
        return []
    home = _common(first.module, down.module)
    attention = tuple(f"{s.module}." for s in sites if s.kind == "attention")
    inside = [n for n, m in model.get_submodule(home).named_modules(prefix=home) if _is_activation(m)]
    inside = [n for n in inside if not n.startswith(attention) and "veneer" not in n.split(".")]
    if inside:
        return [Activation(n, down.side, down.module) for n in inside]
    if any(s.role == "mlp.gate" for s in others):
        raise Unsupported(f"{NONE}: {home} is gated and its activation is no module of its own; name modules with modules='…'.")
    return [Activation(down.module, down.side, down.module, before=True)]


def _common(a: str, b: str) -> str:
    """The path of the smallest module that holds both."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(a.split("."), b.split(".")))
    return ".".join(name for name, _ in same)


def _is_activation(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__module__ in KNOWN and not any(True for _ in module.children()) and "max" not in kind.__name__.lower()


def _named(model: nn.Module, sites: list[Site], named: str) -> list[Activation]:
    modules = [n for n, _ in model.named_modules() if n and "veneer" not in n.split(".")]
    found: list[Activation] = []
    for token in tokens_of(named):
        hit = [n for n in modules if n == token or n.endswith(f".{token}") or re.fullmatch(token, n)]
        if not hit:
            raise NoMatch(f"DEFT: no module is called {token!r}.{nearest(token, modules)}")
        found += [Activation(n, max(sites, key=lambda s: len(_common(s.module, n))).side if sites else "") for n in hit]
    return found


class Watch:
    """Hooks that keep what `measure` makes of every activation of a pass, until the next pass or until it is taken.

    Args:
        acts: whether to look at the pass that begins. padding: give masks of real tokens to `measure`, where inputs have them.
    """

    def __init__(
        self, model: nn.Module, where: Iterable[Activation], measure: Measure, acts: Callable[[], bool], *, padding: bool = False
    ) -> None:
        self.measure, self.acts, self.padding = measure, acts, padding
        self.on = False
        self.real: dict[str, Tensor | None] = {}
        self.found: dict[str, list[Tensor]] = {}
        self.handles = [model.register_forward_pre_hook(self.enter, with_kwargs=True)]
        for one in where:
            module = model.get_submodule(one.module)
            see = Seen(self, one)
            self.handles.append(module.register_forward_pre_hook(see.before) if one.before else module.register_forward_hook(see.after))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "found": {}, "on": False}

    def enter(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.acts():
            self.on, self.found, self.real = True, {}, {}
            if not self.padding:
                inputs = named_inputs(model, args, kwargs)
                first = mask_in(inputs, "attention_mask")
                self.real = {"": first, "encoder": first, "decoder": mask_in(inputs, "decoder_attention_mask")}

    def see(self, one: Activation, h: Tensor) -> None:
        if self.acts():  # also where backward runs a checkpointed block again, which must do the same as the first time
            kept = self.measure(h, self.real.get(one.side))
            if self.on:
                self.found.setdefault(one.module, []).append(kept)

    def take(self) -> dict[str, list[Tensor]]:
        """What the pass left, by module; nothing of it but the masks is kept here, and what backward runs again is not."""
        found, self.found, self.on = self.found, {}, False
        return found


@dataclass(frozen=True)
class Seen:
    """The hook at one activation."""

    watch: Watch
    where: Activation

    def before(self, module: nn.Module, args: tuple) -> None:
        self.watch.see(self.where, args[0])

    def after(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.watch.see(self.where, output)
