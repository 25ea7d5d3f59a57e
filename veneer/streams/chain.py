"""Blocks in a row: what travels between them in a pass, and what their inputs are made again from in backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from veneer.errors import Unsupported
from veneer.route import Route
from veneer.slot import Slot, hidden_place
from veneer.streams.halves import Halves, Run, Seen
from veneer.streams.step import Equations, Pair, ReversibleStep

if TYPE_CHECKING:
    from veneer.streams.scheme import Scheme
    from veneer.streams.stream import Stream

CACHES = ("past_key_values", "past_key_value", "layer_past")


class Passing:
    """One pass through a chain. The model hands the main stream from block to block; the other one waits here."""

    def __init__(self, x: Tensor, scheme: Scheme, report: Callable[[float], None]) -> None:
        exact = x.dtype if scheme.streams == "own" else torch.promote_types(x.dtype, getattr(torch, scheme.streams))
        exact = torch.float32 if x.device.type == "mps" else exact  # it has no float64
        self.dtype, self.report, self.crossing = x.dtype, report, scheme.variant != "meft3"
        self.main = self.other = x.to(exact)
        self.steps = 0
        self.pair: Pair | None = None
        self.at = -1

    def outputs(self, at: int, saved: tuple[Tensor, ...]) -> Pair:
        """y1 and y2 of the step `at`: as kept there, else as the step above it made them."""
        there = self.pair is not None and self.at == at
        if saved:
            if there:
                self.report(_distance(self.pair, saved))  # type: ignore[arg-type]
            return saved[0], saved[1]
        if not there:
            raise Unsupported(
                "reversible: backward came to a block before the one after it. Use the output of the last block for the loss, "
                "or keep activations (anchors=1)."
            )
        pair, self.pair = self.pair, None
        assert pair is not None
        return pair

    def rebuilt(self, at: int, x: Pair) -> None:
        """Takes the inputs of the step `at`: the step below gave them, crossed where the variant crosses them."""
        if at == 0:
            self.report(_distance(x[:1], x[1:]))  # both are what the chain was given
            self.pair, self.at = None, -1
        else:
            self.pair, self.at = (x[1], x[0]) if self.crossing else x, at - 1


def _distance(found: tuple[Tensor, ...], true: tuple[Tensor, ...]) -> float:
    """The largest relative distance of tensors."""
    return max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(found, true))


class Link:
    """A block in its chain: what its slot runs in the block's place."""

    def __init__(
        self, chain: Chain, route: Route, name: str, place: int, last: bool, post: bool, stream: Stream | None, halves: Halves | None
    ) -> None:
        self.chain, self.route, self.name, self.place, self.last, self.post = chain, route, name, place, last, post
        self.stream, self.halves, self.verified = stream, halves, False

    def __call__(self, slot: Slot, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if module.training and getattr(module, "gradient_checkpointing", False):
            raise Unsupported("reversible: gradient checkpointing runs each block alone; call model.gradient_checkpointing_disable().")
        place = hidden_place(module, args, kwargs)
        x = args[0] if place is None else kwargs[place]
        learns = torch.is_grad_enabled()
        kwargs = _without_cache(kwargs) if learns else kwargs
        passing = self.chain.entered(self, x)
        rest: list[Any] = []

        def run(h: Tensor) -> Tensor:
            own = h.to(passing.dtype)
            out = slot.run_here(module, (own, *args[1:]), kwargs) if place is None else slot.run_here(module, args, {**kwargs, place: own})
            rest[:] = [out[1:]] if isinstance(out, tuple) else []
            y = out[0] if isinstance(out, tuple) else out
            if not isinstance(y, Tensor) or y.shape != h.shape:
                got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
                raise Unsupported(
                    f"reversible: the block {self.name} makes {got} of {list(h.shape)}; only blocks that keep the shape can be."
                )
            return y.to(h.dtype)

        if self.halves is not None and not self.verified and not any(kwargs.get(name) is not None for name in CACHES):
            self.halves.verify(run, (x if self.place == 0 else passing.main).detach(), module)
            self.verified = True
        self._advance(passing, x, run, module, [v for v in (*args, *kwargs.values()) if v is not x])
        out = self.chain.finished(passing, self.post) if self.last else passing.main
        return (out, *rest[0]) if rest else out

    def _advance(self, passing: Passing, x: Tensor, run: Run, module: nn.Module, given: list[Any]) -> None:
        """The pair of streams after this block in place of the one before it."""
        scheme, at, variant = self.chain.scheme, passing.steps, self.chain.scheme.variant
        main = passing.main if self.place == 0 else x
        x1, x2 = (main, passing.other) if variant == "meft2" else (passing.other, main)
        keeps = self.last or (scheme.anchors is not None and (at + 1) % scheme.anchors == 0)
        equations = Equations(*self._maps(run), scheme.shares, module.training, keeps, self.route)
        tensors = _learning(module, given) if torch.is_grad_enabled() else []
        learns = bool(tensors) or (torch.is_grad_enabled() and (x1.requires_grad or x2.requires_grad))
        if not learns or self.chain.cached or torch.compiler.is_compiling():
            y1, y2 = equations.forwards(x1, x2)
        else:
            y1, y2 = ReversibleStep.apply(equations, passing, at, x1, x2, *tensors)
        passing.main, passing.other = (y1, y2) if variant == "meft1" else (y2, y1)
        passing.steps += 1

    def _maps(self, run: Run) -> tuple[Run, Run]:
        """F and G."""
        if self.halves is not None:
            halves: Halves = self.halves
            seen: Seen = {}
            return (lambda h: halves.first(run, h, seen).to(h.dtype)), (lambda h: halves.second(run, h, seen))
        stream = self.stream
        assert stream is not None
        return (run, stream.alone) if self.chain.scheme.variant == "meft1" else (stream.alone, run)


class Chain:
    """The reversible blocks of one stack. `cached`: run the same network with activations kept, as autograd does."""

    def __init__(self, scheme: Scheme, report: Callable[[float], None]) -> None:
        self.scheme, self.report, self.cached = scheme, report, False
        self.now: Passing | None = None

    def entered(self, link: Link, x: Tensor) -> Passing:
        """The pass that a block belongs to: a new one at the first block. Raises `Unsupported` if x is not what the block before gave."""
        if link.place == 0:
            self.now = Passing(x, self.scheme, self.report)
        elif self.now is None or self.now.steps != link.place or not _same(x, self.now.main):
            self.now = None
            raise Unsupported(
                f"reversible: {link.name} is not given what the block before it gave; something between the blocks changes hidden states "
                "or leaves blocks out, and could not be undone."
            )
        return self.now  # type: ignore[return-value]

    def finished(self, passing: Passing, post: bool) -> Tensor:
        """What the two streams end as, in the model's dtype."""
        self.now = None
        m, o = passing.main, passing.other
        passing.main = passing.other = m.new_empty(0)
        output = self.scheme.output or ("mean" if post else "sum")
        return (0.5 * (m + o) if output == "mean" else m + min(self.scheme.shares) * o).to(passing.dtype)


def _same(x: Tensor, y: Tensor) -> bool:
    """Whether one is the other, or another view of it."""
    return x is y or (x.shape == y.shape and not torch.compiler.is_compiling() and x.data_ptr() == y.data_ptr())


def _learning(module: nn.Module, given: list[Any]) -> list[Tensor]:
    """What a block's run depends on and learns: its parameters, those its adapters share with others, and other modules' outputs."""
    found: dict[int, Tensor] = {id(p): p for p in module.parameters() if p.requires_grad}
    for slot in module.modules():
        if isinstance(slot, Slot):
            tensors = (t for parts in slot.parts.values() for part in parts for t in part.tensors().values())
            found.update({id(t): t for t in tensors if t.requires_grad})
    flat = [t for value in given for t in (value if isinstance(value, tuple | list) else (value,))]
    found.update({id(t): t for t in flat if isinstance(t, Tensor) and t.requires_grad})
    return list(found.values())


def _without_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Without a cache of keys and values: a block that runs twice would fill it twice."""
    for name in CACHES:
        cache = kwargs.get(name)
        if cache is not None and getattr(cache, "get_seq_length", lambda: 0)():
            raise Unsupported("reversible: training goes on from no cache of keys and values; leave past_key_values out, or use no_grad.")
    return {**kwargs, **{name: None for name in CACHES if name in kwargs}}
