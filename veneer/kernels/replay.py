"""Keeping an input for backward without keeping it: what it was made of lies in the graph already.

A layer's gradient needs its input x. Where x is a cheap function of tensors that autograd keeps anyway – a gated product
act(g) ⊙ u, a norm's output, a GELU – those are kept instead and x is made from them again. Bound: one elementwise pass in
backward, against x's bytes from forward to backward; exact to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

Make: TypeAlias = Callable[[Sequence[Tensor]], Tensor]

ROWS = 128
"""x is made again and used so many rows at a time: they stay in the cache (512 × 1408 numbers: 90 µs instead of 220)."""


def kept(x: Tensor) -> tuple[Make, tuple[Tensor, ...]]:
    """What to keep in x's place, and how to make x [..., d] from it; x itself where nothing better is known."""
    if torch.compiler.is_compiling():
        return _first, (x,)
    node = x.grad_fn
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    found = None if node is None or hooked else _of(node, x.dtype)  # hooks (checkpointing, offloading) decide themselves what is kept
    if found is None:
        return _first, (x,)
    make, sources = found
    return make, tuple(t.detach() for t in sources)


def keeps(make: Make) -> bool:
    """Whether what `kept` gave is the input itself."""
    return make is _first


def times(u: Tensor, make: Make, sources: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """u x [r, d] for u [r, N] and the x of this shape [..., d], N rows, that `make` gives from the sources."""
    if make is _first:
        return u @ sources[0].reshape(-1, shape[-1])
    lead = tuple(shape[:-1])
    by_row = [t.reshape(-1, t.shape[-1]) if tuple(t.shape[:-1]) == lead else None for t in sources]
    total: Tensor | None = None
    for start in range(0, u.shape[1], ROWS):
        at = slice(start, start + ROWS)
        x = make([t if rows is None else rows[at] for t, rows in zip(sources, by_row)])
        total = u[:, at] @ x if total is None else total.addmm_(u[:, at], x)
    return u.new_zeros(len(u), shape[-1]) if total is None else total


def _first(sources: Sequence[Tensor]) -> Tensor:
    return sources[0]


Found: TypeAlias = tuple[Make, tuple[Tensor, ...]]


def _of(node: Any, dtype: torch.dtype) -> Found | None:
    """The tensors kept by a node's graph that give its output."""
    rule = _RULES.get(type(node).__name__)
    try:
        return None if rule is None else rule(node, dtype)
    except RuntimeError:  # freed, or changed in place since
        return None


def _product(node: Any, dtype: torch.dtype) -> Found | None:
    a, b = node._saved_self, node._saved_other
    if a is not None and b is not None:
        return (lambda s: s[0] * s[1]), (a, b)
    gain, below = (a, node.next_functions[1][0]) if b is None else (b, node.next_functions[0][0])
    if gain is None or below is None or gain.dtype != dtype:
        return None
    inner = _of(below, dtype)  # a frozen gain: its factor is not kept, but what that is made of may be
    if inner is None:
        return None
    make, sources = inner
    return (lambda s: make(s[1:]) * s[0]), (gain, *sources)


def _cast(node: Any, dtype: torch.dtype) -> Found | None:
    inner = _of(node.next_functions[0][0], torch.float32)
    return inner and ((lambda s: inner[0](s).to(dtype)), inner[1])


def _gelu(node: Any, dtype: torch.dtype) -> Found:
    approximate = node._saved_approximate
    return (lambda s: F.gelu(s[0], approximate=approximate)), (node._saved_self,)


def _silu(node: Any, dtype: torch.dtype) -> Found:
    return (lambda s: F.silu(s[0])), (node._saved_self,)


def _layer_norm(node: Any, dtype: torch.dtype) -> Found | None:
    shape = node._saved_normalized_shape
    if len(shape) != 1:
        return None
    sources = (node._saved_input, node._saved_result1, node._saved_result2, node._saved_weight, node._saved_bias)
    if any(t is None for t in sources):
        return None

    def make(s: Sequence[Tensor]) -> Tensor:
        x, mean, rstd, gain, shift = s
        exact = torch.promote_types(dtype, torch.float32)
        return torch.addcmul(shift.to(exact), (x.to(exact) - mean).mul_(rstd), gain.to(exact)).to(dtype)

    return make, sources


_RULES: dict[str, Callable[[Any, torch.dtype], Found | None]] = {
    "MulBackward0": _product,
    "ToCopyBackward0": _cast,
    "GeluBackward0": _gelu,
    "SiluBackward0": _silu,
    "NativeLayerNormBackward0": _layer_norm,
}
