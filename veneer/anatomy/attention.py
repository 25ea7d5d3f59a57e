"""Attention sub-layers: which layers make one, and its heads."""

from __future__ import annotations

import re

from torch import nn

from veneer.anatomy import families as names
from veneer.anatomy.roles import scope
from veneer.anatomy.tree import Layer, Node, Part


def attention_parts(layers: list[Layer], outer: Node | None) -> list[Part]:
    """Attention modules: the holders of the query, key and value projections, each with its output projection.

    Roles in cross-attention change from `attn.` to `cross.`; `outer` is the block, None outside blocks.
    """
    cores: dict[Node, list[Layer]] = {}
    for layer in layers:
        if re.match(r"(attn|cross)\.(q|k|v|qkv)$", layer.role):
            core = layer.node if layer.node.cls is nn.MultiheadAttention else layer.node.holder
            cores.setdefault(core, []).append(layer)
    ends = {_nearest_core(x.node, list(cores)): x for x in reversed(layers) if x.roles in (("attn.o",), ("cross.o",)) and cores}
    parts: list[Part] = []
    for core, inputs in cores.items():
        parts.append(_part(core, inputs, ends.get(core), outer, second=bool(parts)))
        _measure(parts[-1], core, inputs)
    return parts


def _part(core: Node, inputs: list[Layer], end: Layer | None, outer: Node | None, second: bool) -> Part:
    cross = any(x.role.startswith("cross.") for x in inputs) or _is_cross(core, outer, second)
    mine = [*inputs, end] if end else inputs
    for layer in (x for x in mine if cross and not x.fixed):
        layer.roles = tuple(r.replace("attn.", "cross.") for r in layer.roles)
    queries = [x for x in inputs if any(r.endswith((".q", ".qkv")) for r in x.roles)]
    last = end.node if end and core.cls is not nn.MultiheadAttention else core
    return Part("cross" if cross else "attn", mine, (queries or inputs)[0].node, last, core)


def _nearest_core(node: Node, cores: list[Node]) -> Node:
    """The attention module that shares the longest path with an output projection."""
    parts = node.path.split(".")

    def shared(core: Node) -> int:
        pairs = zip(parts, core.path.split("."))
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(parts), core.path.count(".") + 1))

    return max(cores, key=shared)


def _is_cross(core: Node, outer: Node | None, second: bool) -> bool:
    """What the module says of itself, else its names; some names mean it only in a block's second attention."""
    told = getattr(core.module, "is_cross_attention", None)
    path = core.within(outer) if outer else core.path
    twice = outer is not None and names.SELF_TWICE.search(outer.cls.__name__)
    if told is not True and second and not twice and names.CROSS_IF_SECOND.search(path):
        return True
    if isinstance(told, bool):
        return told
    return bool(names.CROSS.search(" ".join([path, *(n.cls.__name__ for n in (core, *scope(core, outer)))])))


def _measure(part: Part, core: Node, inputs: list[Layer]) -> None:
    """Heads, key heads and head width, and with them the row ranges of a fused projection."""
    width, heads, kv = (_number(core.module, told) for told in (names.HEAD_DIM, names.HEADS, names.KV_HEADS))
    fused = next((x for x in inputs if len(x.roles) == 3 or x.role.endswith("qkv")), None)
    if fused is not None:
        width = width or (fused.out // (heads + 2 * (kv or heads)) if heads else 0)
        if width:
            kv = kv if kv and kv < (heads or fused.out // width) else fused.out // width // 3
            heads = fused.out // width - 2 * kv
            if len(fused.roles) == 3:
                fused.fused = tuple(width * (heads if r.endswith(".q") else kv) for r in fused.roles)
    else:
        rows = {role[-1]: size for x in inputs for role, size in zip(x.roles, x.sizes)}
        q, k = rows.get("q", 0), rows.get("k", 0)
        width = width or (q // heads if heads else 0)
        heads = heads or (q // width if width else 0)
        kv = k // width if width and k else kv or heads
    part.heads, part.kv_heads, part.head_dim = heads, kv or heads, width


def _number(module: nn.Module, options: tuple[str, ...]) -> int:
    """The first of these attributes that is a count, of the module or of its configuration; 0 when none is."""
    for holder in (module, getattr(module, "config", None)):
        for name in options:
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return 0
