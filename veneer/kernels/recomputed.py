"""y = run(x, p), with nothing kept for backward but x and p: what lies between is computed again there.

Of x what it is made of may be kept instead (see `replay`). Bound: one more run. It pays where the run is cheap and keeps
several tensors of x's size (Kronecker products, butterflies).
The plain reference is `run` itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels.eager import eager
from veneer.kernels.replay import kept

Run = Callable[[Tensor, dict[str, Tensor]], Tensor]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Run, names: list[str], *tensors: Tensor) -> Tensor:
        ctx.run, ctx.names = run, names
        ctx.make, sources = kept(x)
        ctx.save_for_backward(*tensors, *sources)
        return run(x, dict(zip(names, tensors)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        n, needs = len(ctx.names), (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:])
        all_kept = ctx.saved_tensors  # read once: checkpointing hands them out once
        saved = (ctx.make(all_kept[n:]), *all_kept[:n])
        with torch.enable_grad():
            x, *tensors = leaves = [t.detach().requires_grad_(n) for t, n in zip(saved, needs)]
            y = ctx.run(x, dict(zip(ctx.names, tensors)))
        made = iter(torch.autograd.grad(y, [t for t in leaves if t.requires_grad], grad, allow_unused=True))
        gx, *found = [next(made) if t.requires_grad else None for t in leaves]
        return gx, None, None, *found


def recomputed(x: Tensor, run: Run, p: dict[str, Tensor]) -> Tensor:
    """run(x, p); `run` must give the same both times: no dropout in it. A compiler decides by itself what to keep."""
    if not eager(x) or not torch.is_grad_enabled():
        return run(x, p)
    return _Recomputed.apply(x, run, list(p), *p.values())
