"""The repeated blocks, found by structure."""

from __future__ import annotations

from torch import nn

from veneer.anatomy import families as names
from veneer.anatomy.roles import mixer_table
from veneer.anatomy.tree import Anatomy, Block, Node
from veneer.anatomy.weights import linear_shape


def find_blocks(body: Anatomy) -> list[Block]:
    """The blocks, encoder first, each with its nodes marked; layers with roles already (the user's) count as attention's."""
    told = {x.node for x in body.layers if x.role.startswith(("attn.", "cross.", "mixer."))}
    attends = {p for n in body.nodes if n in told or _attends(n) for p in n.above()}
    stacks = _stacks(body.root, attends) or _plain_stacks(body)
    blocks = [Block(node, i, len(stack)) for stack in stacks for i, node in enumerate(stack)]
    blocks.sort(key=lambda b: b.node.side == "decoder")
    for depth, block in enumerate(blocks):
        block.depth = depth
        for node in block.node.walk():
            node.block = block
    return blocks


def _attends(node: Node) -> bool:
    """Whether this module is a projection that attention or a mixer reads through."""
    if node.cls is nn.MultiheadAttention:
        return True
    if node.name in names.ATTENTION_IN and linear_shape(node.module) is not None:
        return True
    return node.name in (mixer_table(node) or ())


def _stacks(node: Node, wanted: set[Node]) -> list[list[Node]]:
    """The innermost lists of one class with a wanted item, or of several classes with all items wanted."""
    inner = [stack for child in node.children.values() for stack in _stacks(child, wanted)]
    if inner or not isinstance(node.module, (nn.ModuleList, nn.Sequential)):
        return inner
    items = list(node.children.values())
    alike = len({i.cls for i in items}) == 1
    found = [i in wanted for i in items]
    return [items] if (any(found) if alike else found and all(found)) else []


def _plain_stacks(body: Anatomy) -> list[list[Node]]:
    """The blocks of models without attention: listed at least twice, with two matrices or convolutions or more."""
    count: dict[Node, int] = {}
    for layer in body.layers:
        if layer.kind in ("linear", "conv"):
            for node in layer.node.above():
                count[node] = count.get(node, 0) + 1
    found = _stacks(body.root, {node for node, n in count.items() if n > 1})
    repeated = {stack[0].cls for stack in found if len(stack) > 1 and len({n.cls for n in stack}) == 1}
    return [stack for stack in found if {n.cls for n in stack} <= repeated]
