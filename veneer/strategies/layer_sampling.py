"""Layer sampling: a few layers' adapters train at each step, drawn by an importance learned on the way (2024, arXiv:2410.11772)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from veneer.errors import BadValue, Unsupported
from veneer.part import Part, responding
from veneer.strategies.layer_dropping import kind
from veneer.strategies.probing import agreed, undisturbed
from veneer.strategy import Strategy

if TYPE_CHECKING:
    from veneer.methods.strategy.ist import IST
    from veneer.tuned import Tuned


def share(fraction: float, L: int) -> int:
    """So many of L layers, at least one."""
    return max(int(fraction * L), 1)


def draw(weights: Tensor, n: int, generator: Generator) -> list[int]:
    """n different layers, ascending: one after another, each with its weight's share of what is left."""
    least = torch.finfo(weights.dtype).tiny  # a weight that rounds to zero must not make the draw impossible
    return sorted(torch.multinomial(weights.clamp_min(least), n, generator=generator).tolist())


def candidates(weights: Tensor, n: int, K: int, generator: Generator) -> list[list[int]]:
    """K different sets of n layers: as many as there are, if fewer, or as show up in 100 draws each."""
    found: list[list[int]] = []
    wanted = min(K, math.comb(len(weights), n))
    for _ in range(100 * wanted):
        one = draw(weights, n, generator)
        if one not in found:
            found.append(one)
        if len(found) == wanted:
            break
    return found


def rescored(I: Tensor, damped: Sequence[Sequence[int]], losses: Tensor, mu: float) -> Tensor:
    """I after one round: I_i += mu · a_k · p_i (1 − p_i) for every layer i damped in candidate k, with p = sigmoid(I) before it,
    a_k = r_k − mean r, r_k = exp(−l_k). A larger I means that the layer can be damped: it is less important."""
    r = torch.exp(-losses.to(I)).nan_to_num(0.0)
    a, p = r - r.mean(), torch.sigmoid(I)
    out = I.clone()
    for layers, gain in zip(damped, a):
        at = list(layers)
        out[at] += mu * gain * p[at] * (1 - p[at])
    return out


@contextmanager
def damped(parts: Sequence[Part], beta: float) -> Iterator[None]:
    """What these parts make of their layers' outputs, base + beta · (adapted − base), inside the `with` block."""

    def respond(base: Tensor, y: Tensor) -> Tensor:
        if base.shape != y.shape:
            raise Unsupported("IST: a method adds tokens between the layers, so its effect has no size to damp; use ist(scored=False).")
        return base + beta * (y - base)

    with responding(parts, respond):
        yield


class LayerSampling(Strategy):
    """Draws the layers that train in the next step, and rescores all layers every T_u steps."""

    def __init__(self, how: IST) -> None:
        self.how, self.step = how, 0
        self.generator = Generator().manual_seed(how.seed)
        self.I = torch.empty(0, dtype=torch.float64)
        self.on: list[int] = []
        """Depths of the layers that train now."""
        self.tuned: Tuned | None = None
        self.parts: dict[int, list[Part]] = {}
        self.tensors: dict[int, list[Tensor]] = {}

    def start(self, tuned: Tuned, name: str, total_steps: int | None = None) -> None:
        parts = tuned.adapters[name].parts
        users: dict[int, tuple[Tensor, set[int | None]]] = {}
        for part in parts:
            for t in part.tensors().values():
                if isinstance(t, torch.nn.Parameter):
                    users.setdefault(id(t), (t, set()))[1].add(part.site.depth)
        depths = sorted({part.site.depth for part in parts if part.site.depth is not None})
        self.tuned, self.parts = tuned, {d: [part for part in parts if part.site.depth == d] for d in depths}
        self.tensors = {d: [t for t, used in users.values() if used == {d}] for d in depths}  # what layers share stays as it is
        self.check()
        if len(self.I) != len(depths):
            self.I = torch.zeros(len(depths), dtype=torch.float64)
        if not self.on:
            self.next()
        self.switch()

    def check(self) -> None:
        """Refuses adapters that have no layers to choose from, or layers whose answer cannot be damped."""
        limits = self.how.limits
        assert self.tuned is not None
        if self.how.scored:
            if self.probe is None:
                raise BadValue(
                    "IST scores layers by the task loss: call tuned.begin(steps, probe=…) with a function that gives the loss on a "
                    "training batch, or use ist(scored=False) to draw them uniformly."
                )
            for part in (part for parts in self.parts.values() for part in parts):
                if (how := kind(self.tuned, part)) in limits:
                    raise Unsupported(f"IST: {limits[how]} (at {part.site.name}). ist(scored=False) draws layers uniformly.")
        if not any(self.tensors.values()):
            raise Unsupported(f"IST: {limits['shared' if self.parts else 'layers']}.")

    def next(self) -> None:
        """Draws the layers of the next step."""
        depths = list(self.parts)
        self.on = [depths[i] for i in draw(torch.sigmoid(-self.I), share(self.how.N_u, len(depths)), self.generator)]

    def switch(self) -> None:
        """Gradients for the layers that train, none for the others'."""
        for depth, tensors in self.tensors.items():
            for t in tensors:
                t.requires_grad_(depth in self.on)
                if depth not in self.on:
                    t.grad = None  # a zero would still move the optimiser's moments

    def after_step(self) -> None:
        self.step += 1
        if self.how.scored and self.step % self.how.T_u == 0:
            self.rescore()
        self.next()
        self.switch()

    @torch.no_grad()
    def rescore(self) -> None:
        found = candidates(torch.sigmoid(self.I), share(self.how.N_v, len(self.I)), self.how.K, self.generator)
        if len(found) > 1:  # one alone has no advantage
            self.I = rescored(self.I, found, self.losses(found), self.how.mu)

    def losses(self, found: Sequence[Sequence[int]]) -> Tensor:
        """The task loss with each candidate damped; all on one batch where the probe can show it `again`."""
        assert self.tuned is not None and self.probe is not None
        again, values, layers = getattr(self.probe, "again", self.probe), [], list(self.parts.values())
        with undisturbed(self.tuned.model):
            for k, chosen in enumerate(found):
                with damped([part for i in chosen for part in layers[i]], self.how.beta):
                    values.append((again if k else self.probe)().detach().double().cpu())
        return agreed(torch.stack(values))

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "I": self.I, "on": list(self.on), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.I, self.on = state["step"], state["I"].clone(), list(state["on"])
        self.generator.set_state(state["generator"])
        self.switch()
