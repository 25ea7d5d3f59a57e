"""Layer dropping: the adapters of the lowest layers are silent, a random number of them at each step (2020, arXiv:2010.11918)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from veneer.errors import BadValue, Unsupported
from veneer.forms import ParameterForm
from veneer.part import LAYERS, Part, responding
from veneer.strategy import Strategy

if TYPE_CHECKING:
    from veneer.methods.strategy.adapterdrop import AdapterDrop
    from veneer.tuned import Tuned


def by_layer(tuned: Tuned, name: str) -> list[list[Part]]:
    """An adapter's parts in the blocks, from the lowest block up."""
    found: dict[int, list[Part]] = {}
    for part in tuned.adapters[name].parts:
        if part.site.depth is not None:
            found.setdefault(part.site.depth, []).append(part)
    return [found[depth] for depth in sorted(found)]


def kind(tuned: Tuned, part: Part) -> str:
    """How a part acts: "attention", "parameter" where its weight is read from outside the layer, "between", or its site's kind."""
    slot: Any = tuned.model.get_submodule(part.site.module)._modules.get("veneer")
    if part.site.kind in LAYERS and slot is not None and isinstance(slot.forms.get(part.site.parameter), ParameterForm):
        return "parameter"
    return "between" if part.site.kind == "block" and "weighted" in part.method.limits else part.site.kind


@contextmanager
def lower(tuned: Tuned, n: int, name: str | None = None) -> Iterator[None]:
    """Without the adapters of the n lowest layers, inside the `with` block.

    Raises:
        BadValue: there are not so many layers.
    """
    layers = by_layer(tuned, name or tuned.active[0])
    if not 0 <= n <= len(layers):
        raise BadValue(f"lower: n={n} layers cannot be left out; the adapter has {len(layers)}, choose 0 … {len(layers)}.")
    with responding([part for layer in layers[:n] for part in layer], lambda base, y: base):
        yield


class LayerDropping(Strategy):
    """Draws, before each step, how many of the lowest layers are silent in it."""

    def __init__(self, how: AdapterDrop) -> None:
        self.how, self.n = how, -1
        self.generator = Generator().manual_seed(how.seed)
        self.tuned: Tuned | None = None
        self.layers: list[list[Part]] = []

    def start(self, tuned: Tuned, name: str, total_steps: int | None = None) -> None:
        self.tuned, self.layers = tuned, by_layer(tuned, name)
        self.check(self.layers)
        if self.n < 0:
            self.next()
        self.switch()

    def check(self, layers: Sequence[Sequence[Part]]) -> None:
        """Refuses adapters without lower layers, and parts that cannot be silenced."""
        assert self.tuned is not None
        limits = self.how.limits
        if len(layers) < 2:
            raise Unsupported(f"{self.how.label}: {limits['layers']}.")
        for part in (part for layer in layers for part in layer):
            if (reason := limits.get(kind(self.tuned, part))) is not None:
                raise Unsupported(f"{self.how.label}: {reason} (at {part.site.name}).")

    def next(self) -> None:
        """Draws the number for the next step."""
        most = len(self.layers) - 1 if self.how.most is None else min(self.how.most, len(self.layers) - 1)
        self.n = int(torch.randint(most + 1, (), generator=self.generator))

    def switch(self) -> None:
        for i, layer in enumerate(self.layers):
            for part in layer:
                part.respond = self.silent if i < self.n else None

    def silent(self, base: Tensor, y: Tensor) -> Tensor:
        return base if self.tuned is not None and self.tuned.model.training else y

    def after_step(self) -> None:
        self.next()
        self.switch()

    def state_dict(self) -> dict[str, Any]:
        return {"n": self.n, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n = state["n"]
        self.generator.set_state(state["generator"])
        self.switch()
