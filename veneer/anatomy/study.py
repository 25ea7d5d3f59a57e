"""The whole study of one model: one walk that leaves every layer with its roles and every block with its sub-layers."""

from __future__ import annotations

from torch import nn

from veneer.anatomy.attention import attention_parts
from veneer.anatomy.blocks import find_blocks
from veneer.anatomy.given import Given
from veneer.anatomy.norms import settle_norm
from veneer.anatomy.outside import by_scope, is_pooler, outside_role
from veneer.anatomy.roles import block_roles, in_attention, pair_by_shape
from veneer.anatomy.sublayers import hidden_width, mixer_parts, mlp_parts
from veneer.anatomy.tree import Anatomy, Block, Layer, grow
from veneer.anatomy.weights import layers_in


def study(model: nn.Module, given: Given) -> Anatomy:
    """The model with the role of every layer; roles the user gave stand before all others."""
    root = grow(model)
    nodes = list(root.walk())
    body = Anatomy(root, nodes, layers_in(nodes))
    body.tokens, body.output = _asked(model, "get_input_embeddings"), _asked(model, "get_output_embeddings")
    for layer in body.layers:
        wanted = given.wanted(layer.node.path, layer.name)
        layer.roles, layer.fixed = wanted or layer.roles, bool(wanted)
    body.blocks = find_blocks(body)
    mine: dict[Block | None, list[Layer]] = {block: [] for block in (*body.blocks, None)}
    for layer in body.layers:
        mine[layer.node.block].append(layer)
    for block in body.blocks:
        _study_block(block, mine[block], body)
    _study_rest(mine[None], body)
    return body


def _asked(model: nn.Module, question: str) -> nn.Module | None:
    try:
        answer = getattr(model, question)()
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return answer if isinstance(answer, nn.Module) else None


def _study_block(block: Block, layers: list[Layer], body: Anatomy) -> None:
    for layer in layers:
        layer.roles = layer.roles or block_roles(layer, block.node)
    attention = attention_parts(layers, block.node)
    pair_by_shape(layers, block.node)
    block.parts = [*attention, *mixer_parts(layers), *mlp_parts(layers)]
    block.hidden = hidden_width(block, layers)
    for layer in (x for x in layers if not x.roles):
        if layer.kind == "norm":
            settle_norm(layer, block)
        elif layer.kind == "linear":
            layer.roles = (by_scope(layer.node.within(block.node)),)
        else:
            layer.roles = (outside_role(layer, body),)


def _study_rest(layers: list[Layer], body: Anatomy) -> None:
    """Outside blocks there may be attention too, as in pooling heads."""
    for layer in layers:
        if not layer.roles and in_attention(layer.node, None):
            layer.roles = block_roles(layer, None)
    for layer in (x for part in attention_parts(layers, None) for x in part.layers):
        layer.instead = "pooler" if is_pooler(layer.node) and not layer.fixed else ""
    for layer in layers:
        layer.roles = layer.roles or (outside_role(layer, body),)
