"""y = x f(W, p)ᵀ + b for a weight built from the frozen one, which is not kept for backward but built again there.

Bound, for N rows and a build of B operations: B twice, and the dense gradient of the built weight, 2·N·in·out, once.
Saved for backward are x, or what it is made of (see `replay`), and p. The plain reference is `reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels.replay import kept

Build = Callable[[Tensor, dict[str, Tensor]], Tensor]


def reference(x: Tensor, W: Tensor, b: Tensor | None, build: Build, p: dict[str, Tensor]) -> Tensor:
    """The definition: x [..., in], W [out, in], build(W, p) [out, in] → [..., out]."""
    return torch.nn.functional.linear(x, build(W, p), b)


class _RebuiltLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, read: Callable[[], Tensor], b: Tensor | None, build: Build, names: list[str], *tensors: Tensor
    ) -> Tensor:
        ctx.read, ctx.build, ctx.names = read, build, names
        trained = any(ctx.needs_input_grad[5:])
        ctx.shape = x.shape
        ctx.make, sources = kept(x) if trained else (None, ())
        ctx.save_for_backward(*tensors, *sources)
        return torch.nn.functional.linear(x, build(read(), dict(zip(names, tensors))).to(x.dtype), b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, n = ctx.saved_tensors, len(ctx.names)  # read once: checkpointing hands them out once
        tensors, sources = saved[:n], saved[n:]
        needs = ctx.needs_input_grad[5:]
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_(n) for t, n in zip(tensors, needs)]
            W = ctx.build(ctx.read(), dict(zip(ctx.names, leaves)))
        g = grad.reshape(-1, grad.shape[-1])
        gx = (g @ W.detach().to(g.dtype)).view(ctx.shape) if ctx.needs_input_grad[0] else None
        found: list[Tensor | None] = [None] * len(leaves)
        if any(needs):
            G = (g.t() @ ctx.make(sources).reshape(-1, ctx.shape[-1])).to(W.dtype)
            made = torch.autograd.grad(W, [t for t, n in zip(leaves, needs) if n], G, allow_unused=True)
            for i, t in zip([i for i, n in enumerate(needs) if n], made):
                found[i] = t
        return gx, None, None, None, None, *found


def rebuilt_linear(x: Tensor, read: Callable[[], Tensor], b: Tensor | None, build: Build, p: dict[str, Tensor]) -> Tensor:
    """x build(read(), p)ᵀ + b; `read` gives the frozen weight [out, in], once in forward and once in backward."""
    return _RebuiltLinear.apply(x, read, b, build, list(p), *p.values())
