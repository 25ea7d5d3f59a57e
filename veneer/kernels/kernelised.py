"""y = x ΔWᵀ for ΔW = gate(K, t), K[o, i] from row i of one thin matrix and others, t from all of |K|: nothing of [out, in] is kept.

K is built by inputs, at most `LIMIT` entries at a time, and dropped. Bound, for N rows and a build of B operations: 6·N·in·out
more than a frozen layer; B once forward and, with its own gradient, once backward; with several pieces forward also once for
every digit of t. Saved for backward are x, the tensors K is built from, and t, which counts as a constant. The plain
reference is `reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Tensors = dict[str, Tensor]

LIMIT = 1 << 22
"""Entries of K that are built at a time."""


class Rule(NamedTuple):
    """How ΔW comes from thin tensors, of which the one named `cut` has a row for each input."""

    kernel: Callable[[Tensors], Tensor]
    """The tensors, `cut` with some of its rows → K [out, those], each column from its own row alone."""
    threshold: Callable[[Callable[[], Iterable[Tensor]], int, Tensor], Tensor | None]
    """All of K in pieces, how many entries that are, one of them → t or None."""
    gate: Callable[[Tensor, Tensor | None], Tensor]
    """K, t → ΔW, entry by entry."""
    cut: str = "A"


def pieces(out: int, inside: int) -> int:
    """In how many pieces a K [out, in] is built."""
    return max(1, min(inside, -(-out * inside // LIMIT)))


def _parts(rule: Rule, p: Tensors, out: int) -> list[Tensors]:
    """The tensors, for some inputs at a time."""
    count = pieces(out, len(p[rule.cut]))
    return [{**p, rule.cut: part} for part in p[rule.cut].tensor_split(count)] if count > 1 else [p]


def _found(rule: Rule, p: Tensors, out: int) -> tuple[Callable[[], Iterable[Tensor]], Tensor | None]:
    """K in pieces, built anew each time it is asked for if there are several, and t."""
    parts = _parts(rule, p, out)
    whole = [rule.kernel(parts[0])] if len(parts) == 1 else None

    def built() -> Iterable[Tensor]:
        return whole if whole is not None else (rule.kernel(part) for part in parts)

    with torch.no_grad():
        return built, rule.threshold(built, out * len(p[rule.cut]), p[rule.cut])


def dense(rule: Rule, p: Tensors, out: int) -> Tensor:
    """ΔW [out, in], with gradients."""
    built, t = _found(rule, p, out)
    return torch.cat([rule.gate(K, t) for K in built()], 1)


def reference(x: Tensor, rule: Rule, p: Tensors, out: int) -> Tensor:
    """The definition: x [..., in] → [..., out]."""
    return torch.nn.functional.linear(x, dense(rule, p, out).to(x.dtype))


class _Kernelised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rule: Rule, names: list[str], out: int, *tensors: Tensor) -> Tensor:
        built, t = _found(rule, dict(zip(names, tensors)), out)
        ctx.rule, ctx.names, ctx.out, ctx.shape = rule, names, out, x.shape
        ctx.save_for_backward(x if any(ctx.needs_input_grad[4:]) else None, t, *tensors)
        rows = x.reshape(-1, x.shape[-1])
        y, at = None, 0
        for K in built():
            change = rule.gate(K, t).to(x.dtype)
            piece = rows[:, at : at + change.shape[1]] @ change.t()
            at += change.shape[1]
            y = piece if y is None else y.to(torch.promote_types(y.dtype, torch.float32)).add_(piece)
        assert y is not None
        return y.to(x.dtype).view(*x.shape[:-1], out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, t, *tensors = ctx.saved_tensors
        needs = dict(zip(ctx.names, ctx.needs_input_grad[4:]))
        g = grad.reshape(-1, grad.shape[-1])
        rows = None if x is None else x.reshape(-1, x.shape[-1])
        gx = g.new_empty(len(g), ctx.shape[-1]) if ctx.needs_input_grad[0] else None
        found: dict[str, list[Tensor]] = {name: [] for name in ctx.names}
        at = 0
        for part in _parts(ctx.rule, dict(zip(ctx.names, tensors)), ctx.out):
            with torch.enable_grad(), torch.autocast(g.device.type, enabled=False):
                leaves = {name: tensor.detach().requires_grad_(needs[name]) for name, tensor in part.items()}
                change = ctx.rule.gate(ctx.rule.kernel(leaves), t)
            columns = slice(at, at := at + change.shape[1])
            if gx is not None:
                gx[:, columns] = g @ change.detach().to(g.dtype)
            trained = [name for name in leaves if needs[name]]
            if rows is not None:
                G = (g.t() @ rows[:, columns]).to(change.dtype)
                for name, made in zip(trained, torch.autograd.grad(change, [leaves[name] for name in trained], G)):
                    found[name].append(made)
        gradients = [torch.cat(f) if name == ctx.rule.cut and f else sum(f[1:], f[0]) if f else None for name, f in found.items()]
        return (None if gx is None else gx.view(ctx.shape)), None, None, None, *gradients


def kernelised_linear(x: Tensor, rule: Rule, p: Tensors, out: int) -> Tensor:
    """x ΔWᵀ, [..., in] → [..., out] in x's dtype. K is built in the tensors' own dtype."""
    device = x.device.type
    if torch.compiler.is_compiling():  # a compiler decides by itself what to build twice
        return reference(x, rule, p, out)
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return _Kernelised.apply(x, rule, list(p), out, *p.values())
