"""Roles of the linear layers inside a block: by the tables of names, then by shape."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import nn

from veneer.anatomy import families as names
from veneer.anatomy.tree import SEPARATE, Layer, Node

QKV = ("attn.q", "attn.k", "attn.v")


def block_roles(layer: Layer, outer: Node | None) -> tuple[str, ...]:
    """The roles that a layer's name tells, one for each row range; () when none does. `outer` as in `scope`."""
    node, key = layer.node, _key(layer.node)
    if layer.parameter == "in_proj_weight":
        return QKV
    if layer.parameter in SEPARATE:
        return (f"attn.{layer.parameter[0]}",)
    if layer.kind != "linear":
        return ()
    mixer = mixer_table(node)
    if mixer is not None:
        return (mixer[key],) if key in mixer else ()
    if _is_router(node):
        return ("router",)
    if key in names.ATTENTION_IN:
        return _input_roles(node, names.ATTENTION_IN[key])
    if in_attention(node, outer):
        return ("attn.o",) if key in names.ATTENTION_OUT else _unknown_attention(layer)
    return _mlp_roles(node)


def pair_by_shape(layers: list[Layer], outer: Node) -> None:
    """Names no table knows: a widening layer and the narrowing one after it are a feed-forward network."""
    unknown = [x for x in layers if x.kind == "linear" and not x.roles and not in_attention(x.node, outer)]
    for a, b in pairwise(unknown):
        if a.out == b.inside and a.inside == b.out and a.out > a.inside:
            a.roles, b.roles = ("mlp.up",), ("mlp.down",)


def scope(node: Node, outer: Node | None) -> Iterator[Node]:
    """The modules between a layer and its block `outer` (None: all modules above a layer outside blocks)."""
    for n in node.above():
        if n is outer:
            return
        yield n


def in_attention(node: Node, outer: Node | None) -> bool:
    """Whether a layer lies in an attention module, by the names of what is around it."""
    return isinstance(node.module, nn.MultiheadAttention) or any(
        names.ATTENTION_SCOPE.search(n.name) or names.ATTENTION_SCOPE.search(n.cls.__name__) for n in scope(node, outer)
    )


def mixer_table(node: Node) -> dict[str, str] | None:
    """Layer name → role in the module that holds `node`, if that is a mixer."""
    holder = node.parent.cls.__name__ if node.parent else ""
    return next((table for family, table in names.MIXERS if family.search(holder)), None)


def _key(node: Node) -> str:
    """The name that tells: a list's item counts with the list's name."""
    return f"{node.parent.name}.{node.name}" if node.name.isdigit() and node.parent else node.name


def _is_router(node: Node) -> bool:
    parent = node.parent
    if parent is None:
        return False
    return bool(names.ROUTER.search(parent.cls.__name__)) or (node.name in names.ROUTER_NAMES and "experts" in parent.children)


def _input_roles(node: Node, part: str) -> tuple[str, ...]:
    module = node.holder.module
    if part == "fused" and getattr(module, "is_cross_attention", False):
        part = "kv"
    if part == "interleaved" or (part == "fused" and not getattr(module, "multi_query", True)):
        return ("attn.qkv",)
    return {"fused": QKV, "kv": QKV[1:]}.get(part, (f"attn.{part}",))


def _unknown_attention(layer: Layer) -> tuple[str, ...]:
    """By shape: three times as many rows as columns is a fused projection, in an order nobody told."""
    return ("attn.qkv",) if layer.out == 3 * layer.inside else ()


def _mlp_roles(node: Node) -> tuple[str, ...]:
    path = node.path.split(".")
    ends = (".".join(path[-length:]) for length in (3, 2, 1))
    part = next((names.MLP[end] for end in ends if end in names.MLP), "")
    gate_last = _gate_last(node.parent) if part == "up" else None
    if part == "gate_up" or gate_last is False:
        return ("mlp.gate", "mlp.up")
    if gate_last:
        return ("mlp.up", "mlp.gate")
    return (f"mlp.{part}",) if part else ()


def _gate_last(holder: Node | None) -> bool | None:
    """For a fused first projection, whether the gate's rows come second; None if nothing is fused."""
    if holder is None:
        return None
    told = getattr(holder.module, "gate_last", None)
    return told if isinstance(told, bool) else bool(names.UP_THEN_GATE.search(holder.cls.__name__)) or None
