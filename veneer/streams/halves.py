"""A block cut in two, attention and feed-forward, by running its own forward: no family's code is written again.

The first half is the block up to what its feed-forward sub-layer is given from the residual stream. The second is the block with its
attention standing still: where norms come before sub-layers, attention gives zero and the block reads the stream itself; where they
come after, the norm of the attention sub-layer gives the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from veneer.errors import Unsupported
from veneer.maths.residual_stream import from_stream
from veneer.site import Site

Run: TypeAlias = Callable[[Tensor], Tensor]
Seen: TypeAlias = dict[nn.Module, tuple[Any, torch.dtype, Any]]
"""Shape, dtype and further outputs of the attention modules in one run."""
ATTENTION = ("attn", "cross")


class Halves:
    """Where one block is cut. Raises `Unsupported`, naming the block, for one without two sub-layers in a row.

    Args:
        model: holds the block. block: its site. sites: all sites of the model.
    """

    def __init__(self, model: nn.Module, block: Site, sites: Sequence[Site]) -> None:
        inside = [s for s in sites if s.depth == block.depth]
        branches = [s for s in inside if s.kind == "branch"]
        mlps, attentions = ([s for s in branches if s.role in roles] for roles in (("mlp",), ATTENTION))
        cores = [s.module for s in inside if s.kind == "attention"]
        self.name, self.label = block.name, type(model.get_submodule(block.module)).__name__.removeprefix("Adapted")
        if len(mlps) != 1 or not attentions or not cores:
            raise self.refused(f"it has {len(attentions)} attention and {len(mlps)} feed-forward sub-layers")
        entry = from_stream(mlps, sites)[0].entry
        norms = [s.module for s in inside if s.kind == "norm" and s.post and s.role in ("norm.attn", "norm.cross")]
        if mlps[0].post and not norms:
            raise self.refused("no norm ends its attention sub-layer")
        self.entry = model.get_submodule(entry)
        self.cores = [model.get_submodule(path) for path in cores]
        self.ends = [model.get_submodule(s.module) for s in attentions]
        self.norm = model.get_submodule(norms[-1]) if mlps[0].post else None

    def refused(self, why: str) -> Unsupported:
        return Unsupported(
            f"reversible: the block {self.name} ({self.label}) cannot be cut between attention and feed-forward: {why}. "
            "Choose meft1 or meft2, which run whole blocks."
        )

    def first(self, run: Run, x: Tensor, seen: Seen) -> Tensor:
        """What the feed-forward sub-layer is given, [..., D], when the block runs on x [..., D]; `seen` takes what attention gave."""

        def remember(core: nn.Module, _args: Any, out: Any) -> None:
            y, further = (out[0], (None,) * (len(out) - 1)) if isinstance(out, tuple) else (out, None)
            seen[core] = (y.shape, y.dtype, further)

        def stop(*args: Any, **kwargs: Any) -> Any:
            raise _Reached(args[0] if args else next(iter(kwargs.values())))

        with ExitStack() as undo:
            for core in self.cores:
                undo.callback(core.register_forward_hook(remember).remove)
            undo.enter_context(standing_in({self.entry: stop}))
            try:
                run(x)
            except _Reached as reached:
                return reached.value.reshape(x.shape)
        raise self.refused("its feed-forward sub-layer is never called")

    def second(self, run: Run, x: Tensor, seen: Seen) -> Tensor:
        """The block's output [..., D] from the output x [..., D] of its first half."""

        def still(core: nn.Module) -> Callable[..., Any]:
            shape, dtype, further = seen[core]
            zero = x.new_zeros(shape, dtype=dtype)
            return lambda *args, **kwargs: zero if further is None else (zero, *further)

        def nothing(h: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return h.new_zeros(*h.shape[:-1], x.shape[-1])

        def given(h: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return x.reshape(h.shape).to(h.dtype)

        stand_ins: dict[nn.Module, Callable[..., Any]] = {end: nothing for end in self.ends}
        stand_ins |= {core: still(core) for core in self.cores if core in seen}
        if self.norm is not None:
            stand_ins[self.norm] = given
        with standing_in(stand_ins):
            return run(x)

    def verify(self, run: Run, x: Tensor, block: nn.Module) -> None:
        """Raises `Unsupported` if the halves in a row are not the block: sub-layers side by side, say. Dropout rests."""
        seen: Seen = {}
        modes = [(m, m.training) for m in block.modules()]
        block.eval()
        try:
            with torch.no_grad():
                whole, parts = run(x).double(), self.second(run, self.first(run, x, seen), seen).double()
        finally:
            for module, mode in modes:
                module.training = mode
        if not torch.dist(whole, parts) <= 0.02 * whole.norm():
            raise self.refused("one half after the other is not what the block gives, as with sub-layers side by side")


class _Reached(BaseException):
    """Ends a block's forward at the cut; no `except Exception` of the model's may hold it."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


@contextmanager
def standing_in(functions: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Functions in place of modules' forwards, inside the `with` block."""
    before = {module: module.__dict__.get("forward") for module in functions}
    for module, function in functions.items():
        module.__dict__["forward"] = function
    try:
        yield
    finally:
        for module, old in before.items():
            del module.__dict__["forward"]
            if old is not None:
                module.__dict__["forward"] = old
