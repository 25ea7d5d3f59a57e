"""One reversible step: y1 = lambda x1 + F(x2), y2 = beta x2 + G(y1), with nothing kept for backward.

Backward gets y1 and y2 from the step above it (or as kept, at the last step and at anchors), runs G and F once more with a graph of
their own, and makes x2 = (y2 − G(y1)) / beta and x1 = (y1 − F(x2)) / lambda for the step below. Bound: one more run of F and G; memory of
one block's graph at a time and of one pair of streams, whatever the depth. The plain reference is the two equations under autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.route import Route

Map: TypeAlias = Callable[[Tensor], Tensor]
Pair: TypeAlias = tuple[Tensor, Tensor]


class Equations:
    """F and G of one block in one pass, each with the scene it was run in. `keeps`: the result is kept for backward."""

    def __init__(self, F: Map, G: Map, shares: tuple[float, float], random: bool, keeps: bool, route: Route) -> None:
        self.F, self.G, self.shares, self.random, self.keeps, self.route = F, G, shares, random, keeps, route
        self.scenes: dict[Map, Scene] = {}

    def forwards(self, x1: Tensor, x2: Tensor) -> Pair:
        y1 = self.shares[0] * x1 + self._run(self.F, x2)
        return y1, self.shares[1] * x2 + self._run(self.G, y1)

    def _run(self, run: Map, x: Tensor) -> Tensor:
        self.scenes[run] = Scene(x.device, self.random, self.route)
        return run(x)

    def backwards(self, y: Pair, d: Pair, tensors: Sequence[Tensor]) -> tuple[Pair, Pair, list[Tensor | None]]:
        """The step's inputs, their gradients, and those of the tensors that F and G use."""
        (y1, y2), (d1, d2) = y, d
        share1, share2 = self.shares
        g, back, of_G = self._again(self.G, y1, d2, tensors)
        d1, x2 = d1 + back, (y2 - g).div_(share2)
        del g, back
        f, back, of_F = self._again(self.F, x2, d1, tensors)
        x1 = (y1 - f).div_(share1)
        return (x1, x2), (share1 * d1, torch.add(back, d2, alpha=share2)), [_sum(a, b) for a, b in zip(of_G, of_F)]

    def _again(self, run: Map, x: Tensor, d: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Sequence[Tensor | None]]:
        """run(x), and the gradients of x and the tensors for the gradient d of the result."""
        with torch.enable_grad(), self.scenes[run].again():
            leaf = x.detach().requires_grad_()
            y = run(leaf)
        if not y.requires_grad:
            return y, torch.zeros_like(x), [None] * len(tensors)
        found = torch.autograd.grad(y, [leaf, *tensors], d, allow_unused=True)
        return y.detach(), torch.zeros_like(x) if found[0] is None else found[0], found[1:]


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


class Scene:
    """Random generators, autocast and the adapters that act, at a moment: to run something again as it was."""

    def __init__(self, device: torch.device, random: bool, route: Route) -> None:
        self.device, self.states = device, {}
        self.route, self.acting = route, {name: getattr(route, name) for name in ("enabled", "merged", "active", "rows")}
        if random:
            self.states = {"cpu": torch.get_rng_state()}
            if device.type == "cuda":
                self.states["cuda"] = torch.cuda.get_rng_state(device)
        kinds = {"cpu", device.type} - {"meta"}
        self.autocast = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in sorted(kinds)]

    @contextmanager
    def again(self) -> Iterator[None]:
        with ExitStack() as undo:
            if self.states:
                undo.enter_context(torch.random.fork_rng([self.device] if "cuda" in self.states else []))
                torch.set_rng_state(self.states["cpu"])
                if "cuda" in self.states:
                    torch.cuda.set_rng_state(self.states["cuda"], self.device)
            for name, value in self.acting.items():
                undo.callback(setattr, self.route, name, getattr(self.route, name))
                setattr(self.route, name, value)
            for kind, dtype, enabled in self.autocast:
                undo.enter_context(torch.autocast(kind, dtype, enabled))
            yield


class ReversibleStep(torch.autograd.Function):
    """(x1, x2) → (y1, y2); `passing` hands the pair down from step to step in backward."""

    @staticmethod
    def forward(ctx: Any, equations: Equations, passing: Any, at: int, x1: Tensor, x2: Tensor, *tensors: Tensor) -> Pair:
        ctx.equations, ctx.passing, ctx.at, ctx.tensors = equations, passing, at, tensors
        y1, y2 = equations.forwards(x1, x2)
        if equations.keeps:
            ctx.save_for_backward(y1, y2)
        return y1, y2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d1: Tensor, d2: Tensor) -> tuple[Tensor | None, ...]:
        y = ctx.passing.outputs(ctx.at, ctx.saved_tensors)
        needed = [t for t, need in zip(ctx.tensors, ctx.needs_input_grad[5:]) if need]
        x, d, grads = ctx.equations.backwards(y, (d1, d2), needed)
        ctx.passing.rebuilt(ctx.at, x)
        found = iter(grads)
        return None, None, None, *d, *(next(found) if need else None for need in ctx.needs_input_grad[5:])
