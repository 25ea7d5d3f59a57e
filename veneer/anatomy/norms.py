"""Norms inside a block: which sub-layer each belongs to, and whether it follows it."""

from __future__ import annotations

from veneer.anatomy import families as names
from veneer.anatomy.order import calls
from veneer.anatomy.tree import Block, Layer, Node, Part
from veneer.site import ROLES


def settle_norm(layer: Layer, block: Block) -> None:
    """Gives a norm its role, and marks it and its sub-layer as `post` where it acts on the sum."""
    node = layer.node
    if names.HEAD_NORM.search(node.name):
        layer.roles = ("norm.qk",)
        return
    direct = node.parent is block.node
    told = _told(node, block.node) if direct else ""
    if told:
        part = _closest(node, [p for p in block.parts if f"norm.{p.role}" == told])
    else:
        part = _next_without_norm(node, block) if direct else _around(node, block)
    role = told or (f"norm.{part.role}" if part else "")
    layer.roles = (role if role in ROLES else "norm.other",)
    if part and _is_post(node, part):
        layer.extra["post"] = part.post = True


def _told(node: Node, block: Node) -> str:
    """The role that a direct child's name tells; "" when only its order can."""
    if node.name == "post_attention_layernorm":
        return "norm.attn" if any("feedforward" in k for k in block.children) else "norm.mlp"
    return next((role for pattern, role in names.BLOCK_NORMS if pattern.search(node.name)), "")


def _closest(node: Node, parts: list[Part]) -> Part | None:
    """Of several sub-layers of one role, the one that runs next to the norm."""
    called = _called(node)

    def distance(part: Part) -> int:
        at = [called.index(c) for c in _pieces(part, node.holder) if c in called]
        return min((abs(i - called.index(node.name)) for i in at), default=len(called)) if node.name in called else 0

    return min(parts, key=distance, default=None)


def _next_without_norm(node: Node, block: Block) -> Part | None:
    """Norms without a telling name belong to the sub-layers in order: attention, cross-attention, feed-forward."""
    order = {"attn": 0, "mixer": 0, "cross": 1, "mlp": 2}
    told = {c: _told(c, block.node) for c in block.node.children.values() if c.cls.__name__.endswith("Norm")}
    open_parts = sorted((p for p in block.parts if f"norm.{p.role}" not in told.values()), key=lambda p: order[p.role])
    untold = [n for n, role in told.items() if not role]
    place = untold.index(node) if node in untold else 0
    return open_parts[place] if place < len(open_parts) else None


def _around(node: Node, block: Block) -> Part | None:
    """The sub-layer whose module holds the norm, unless the norm runs between its projections."""
    parts = [p for p in block.parts if any(node.parent in (x.node, *x.node.above()) for x in p.layers)]
    return parts[0] if len(parts) == 1 and not _is_inner(node, parts[0]) else None


def _is_inner(node: Node, part: Part) -> bool:
    """A norm between the projections of a sub-layer is neither its norm before nor after."""
    if names.INNER_NORM.search(node.name):
        return True
    called, mine = _called(node), _pieces(part, node.holder)
    if node.name not in called:
        return False
    at = called.index(node.name)
    return not mine.isdisjoint(called[:at]) and not mine.isdisjoint(called[at:])


def _is_post(node: Node, part: Part) -> bool:
    """Whether the norm acts on the sum of the sub-layer's output and its residual."""
    parent = node.holder
    flags = (getattr(parent.module, name, None) for name in names.PRE_NORM_FLAGS)
    before = next((f for f in flags if isinstance(f, bool)), None)
    if before is not None:
        return not before
    called, mine = _called(node), _pieces(part, parent)
    if node.name not in called or mine.isdisjoint(called):
        return part.end.parent is parent and part.core is not parent
    at = called.index(node.name)
    ran = [i for i, c in enumerate(called[:at]) if c in mine]
    return bool(ran) and "+" in called[ran[-1] : at]


def _called(node: Node) -> tuple[str, ...]:
    """What the forward around a norm runs, in order."""
    return calls(node.holder.cls, tuple(node.holder.children))


def _pieces(part: Part, parent: Node) -> set[str]:
    """The children of `parent` that hold the two ends of a sub-layer."""
    return {n.within(parent).split(".")[0] for n in (part.entry, part.end) if parent in n.above()}
