"""y = x ΔWᵀ for a ΔW [out, in] that is zero but at n fixed positions, which is never formed.

Bound, for N rows: 2·N·n operations forward and twice that backward; the gradient of the values is n sampled dot
products, not the dense one. Extra memory is a transposed copy of x or of the gradient. Saved for backward are x
(shared by every layer that reads it) and the values. Positions come in row-major order. torch.compile takes the two
operations as they are. The plain reference is `reference`.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor


def placed(values: Tensor, indices: Tensor, out: int, inside: int) -> Tensor:
    """The dense matrix [out, in] with values [n] at indices [2, n]."""
    return values.new_zeros(out, inside).index_put((indices[0], indices[1]), values)


def reference(x: Tensor, values: Tensor, indices: Tensor, out: int) -> Tensor:
    """The definition: x [..., in], values [n], indices [2, n] (row, column) → [..., out]."""
    return torch.nn.functional.linear(x, placed(values, indices, out, x.shape[-1]))


with warnings.catch_warnings():  # torch says once a process that compressed rows are in beta
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1))


def _rows(values: Tensor, indices: Tensor, out: int, inside: int) -> Tensor:
    """The matrix by compressed rows."""
    ends = torch.searchsorted(indices[0].contiguous(), torch.arange(out + 1, device=indices.device))
    return torch.sparse_csr_tensor(ends, indices[1].contiguous(), values, (out, inside), check_invariants=False)


def denser(n: int, out: int, inside: int) -> bool:
    """Whether n entries of [out, in] are so many that the dense matrix is cheaper: a sparse product runs below a dense one's rate."""
    return 16 * n > out * inside


def _flat(x: Tensor) -> Tensor:
    """[..., d] → [rows, d] in a dtype that sparse products know."""
    return x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op("veneer::sparse_linear", mutates_args=())
def _sparse_linear(x: Tensor, values: Tensor, indices: Tensor, out: int, inside: int, back: bool) -> Tensor:
    """x ΔWᵀ [..., out], or x ΔW [..., in] if `back`."""
    rows = _flat(x)
    S = _rows(values.to(rows.dtype), indices, out, inside)
    with torch.autocast(x.device.type, enabled=False):
        y = (S.t() if back else S) @ rows.t().contiguous()
    return y.t().to(x.dtype).reshape(*x.shape[:-1], len(y)).contiguous()


@torch.library.custom_op("veneer::sparse_sampled", mutates_args=())
def _sparse_sampled(grad: Tensor, x: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """The entries of gradᵀ x [out, in] at the positions, [n]."""
    g, rows = _flat(grad), _flat(x)
    at = _rows(g.new_zeros(indices.shape[1]), indices, g.shape[1], rows.shape[1])
    with torch.autocast(x.device.type, enabled=False):
        return torch.sparse.sampled_addmm(at, g.t().contiguous(), rows, beta=0).values().to(dtype)


@_sparse_linear.register_fake
def _(x: Tensor, values: Tensor, indices: Tensor, out: int, inside: int, back: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], inside if back else out)


@_sparse_sampled.register_fake
def _(grad: Tensor, x: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(indices.shape[1], dtype=dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, indices, ctx.out, ctx.inside, _ = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, values, indices)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, values, indices = ctx.saved_tensors
    gx = _sparse_linear(grad, values, indices, ctx.out, ctx.inside, True) if ctx.needs_input_grad[0] else None
    gv = _sparse_sampled(grad, x, indices, values.dtype) if ctx.needs_input_grad[1] else None
    return gx, gv, None, None, None, None


_sparse_linear.register_autograd(_backward, setup_context=_setup)


def sparse_linear(x: Tensor, values: Tensor, indices: Tensor, out: int) -> Tensor:
    """x ΔWᵀ for values [n] at indices [2, n] in row-major order, [..., in] → [..., out] in x's dtype; float32 at least inside."""
    if x.device.type not in ("cpu", "cuda"):  # no compressed rows there
        return reference(x, values.to(x.dtype), indices, out)
    return _sparse_linear(x, values, indices, out, x.shape[-1], False)
