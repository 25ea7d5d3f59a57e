"""Learned tokens beside the text in attention: a softmax of their own, over what the module's own projections make of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from veneer.errors import Unsupported
from veneer.part import Part
from veneer.route import Active, gather_rows
from veneer.site import Site
from veneer.slot import Slot


def projections(model: nn.Module, attention: Site, sites: Sequence[Site], who: str) -> tuple[tuple[nn.Module, slice], ...]:
    """The layers that make an attention module's keys and values, and their rows there.

    Raises:
        Unsupported: they are no linear layers of their own, or not told apart in a fused one.
    """
    found = []
    for role in ("attn.k", "attn.v"):
        here = [s for s in sites if s.role == role and s.depth == attention.depth and s.side == attention.side and s.parameter == "weight"]
        if len(here) != 1 or here[0].kind != "linear":
            raise Unsupported(f"{who}: {attention.name} has no key and value projections that are layers, which its tokens must pass.")
        found.append((model.get_submodule(here[0].module), slice(*(here[0].rows or (None,)))))
    return tuple(found)


def with_beside(slot: Slot, query: Tensor, output: Tensor, scaling: float | None) -> Tensor:
    """Heads' output [B, T, heads, head_dim] with what the active methods add beside it; queries [B, heads, T, head_dim]."""
    if not any(p.method.stands_beside for p in attention_parts(slot)):
        return output
    q = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)

    def change(q: Tensor, active: Active) -> Any:
        parts = [(p, w) for parts, w in slot.chosen(active, ("attention",)) for p in parts if p.method.stands_beside]  # type: ignore[attr-defined]
        return sum(weight * added(slot, part, q) for part, weight in parts)

    if slot.route.rows is None:
        return output + change(q, slot.route.active)
    groups = slot.route.groups(len(q), q.device)
    return gather_rows([output[index] + change(q[index], active) for active, index in groups], [index for _, index in groups], 0)


def attention_parts(slot: Slot) -> list[Any]:
    return [p for parts in slot.parts.values() for p in parts if p.site.kind == "attention"]


def added(slot: Slot, part: Part, q: Tensor) -> Tensor:
    """What one method adds, [B, T, heads, head_dim]."""
    method: Any = part.method
    p, site = part.tensors(), part.site
    tokens = method.tokens(p, site).to(q.dtype)
    keys, values = (
        frozen(module, tokens[None])[0, :, rows].unflatten(-1, (-1, q.shape[-1])) for module, rows in slot.projections
    )  # each [P, kv_heads, head_dim]
    return method.beside(q, keys, values, p, site).transpose(1, 2)


def frozen(module: nn.Module, x: Tensor) -> Tensor:
    """The layer as it is without adapters."""
    slot = module._modules.get("veneer")
    return slot.frozen(module, x) if isinstance(slot, Slot) else module.forward(x)
