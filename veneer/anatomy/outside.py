"""Roles outside blocks: embeddings, convolutions, poolers, heads, final norms. Bare ones inside blocks have them too."""

from __future__ import annotations

import math

from torch import nn

from veneer.anatomy import families as names
from veneer.anatomy.order import calls
from veneer.anatomy.tree import Anatomy, Layer, Node


def outside_role(layer: Layer, body: Anatomy) -> str:
    """The role of a layer that is in no sub-layer."""
    node = layer.node
    if layer.kind == "embedding":
        return _embedding_role(node, body)
    if layer.kind == "parameter":
        return "embed.position" if _is_position(layer.parameter) else "parameter"
    if layer.kind == "norm":
        return _norm_role(node, body)
    if names.PATCH.search(node.path) or (node.parent and names.PATCH.search(node.parent.cls.__name__)):
        return "embed.patch"
    if layer.kind == "conv" and _before_stack(node):
        return "embed.patch"
    if layer.kind == "conv" and names.POSITION.search(node.path):
        return "embed.position"
    if node.block is None and is_pooler(node):
        return "pooler"
    if node.module is body.output or (node.block is None and names.HEAD.search(node.path)):
        return "head"
    return "conv" if layer.kind == "conv" else by_scope(node.path)


def by_scope(path: str) -> str:
    """A linear layer that nothing else tells of."""
    return "embed.other" if names.EMBEDDING_SCOPE.search(path) else "other"


def is_pooler(node: Node) -> bool:
    """Whether a layer belongs to a pooling head."""
    return bool(names.POOLER.search(node.path)) or any(names.POOLER_CLASS.search(n.cls.__name__) for n in node.above())


def _embedding_role(node: Node, body: Anatomy) -> str:
    if node.module is body.tokens:
        return "embed.token"
    if _is_position(".".join(node.path.split(".")[-2:])):
        return "embed.position"
    return "embed.token" if node.block is None and names.TOKEN.search(node.path) else "embed.other"


def _is_position(name: str) -> bool:
    return bool(names.POSITION.search(name)) and not names.NOT_POSITION.search(name)


def _norm_role(node: Node, body: Anatomy) -> str:
    """A norm outside blocks: before or after the stack, as its parent's forward calls it."""
    parent = node.holder
    first = next((b.node for b in body.blocks if parent in b.node.above()), None)
    patch = names.PATCH.search(node.path)
    if first is None or patch:
        return "norm.embed" if patch or names.EMBEDDING_SCOPE.search(node.path) else "norm.other"
    called, stack = calls(parent.cls), first.within(parent).split(".")[0]
    if node.name in called and stack in called:
        if called.index(node.name) > called.index(stack):
            return "norm.final"
        return "norm.other" if isinstance(node.module, nn.GroupNorm) else "norm.embed"
    return "norm.embed" if names.EMBEDDING_SCOPE.search(node.name) else "norm.final"


def _before_stack(node: Node) -> bool:
    """Whether a convolution wider than one step stands beside the list of blocks: it makes their input."""
    if node.block or node.parent is None or math.prod(node.module.kernel_size) == 1:  # type: ignore[arg-type]
        return False
    beside = (c for c in node.parent.children.values() if isinstance(c.module, (nn.ModuleList, nn.Sequential)))
    return any(item.block and item.block.node is item for c in beside for item in c.children.values())
