"""Mixers and feed-forward networks of a block, and what all its sub-layers are called."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from veneer.anatomy.tree import Block, Layer, Node, Part


def mixer_parts(layers: list[Layer]) -> list[Part]:
    """The state-space or recurrent mixer, from its first projection to its last."""
    mine = [x for x in layers if x.role.startswith("mixer.")]
    return [Part("mixer", mine, mine[0].node, mine[-1].node)] if mine else []


def mlp_parts(layers: list[Layer]) -> list[Part]:
    """Feed-forward networks; a mixture of experts is one, from its router to the sum of the experts."""
    parts: list[Part] = []
    experts = _expert_holder(layers)
    if experts is not None:
        inside = [x for x in layers if experts in x.node.above() and x.roles]
        parts.append(Part("mlp", inside, experts, experts))
    rest = [x for x in layers if x.role.startswith("mlp.") and all(n is not experts for n in x.node.above())]
    for group in _mlp_groups(rest):
        down = next(x for x in group if "mlp.down" in x.roles)
        parts.append(Part("mlp", group, next(x for x in group if x is not down).node, down.node))
    return parts


def labelled(parts: list[Part]) -> Iterator[tuple[Part, str]]:
    """The sub-layers that have both ends, each with its role, numbered from the second of a role on."""
    seen: dict[str, int] = {}
    for part in parts:
        complete = part.core is None or part.end is not part.core or part.core.cls is nn.MultiheadAttention
        if part.role == "mixer" or not complete:
            continue
        seen[part.role] = seen.get(part.role, 0) + 1
        yield part, part.role if seen[part.role] == 1 else f"{part.role}{seen[part.role]}"


def hidden_width(block: Block, layers: list[Layer]) -> int:
    """The width of the block's stream: what its sub-layers read, else its norms or its first layer."""
    entries = {p.entry for p in block.parts}
    linear = [x for x in layers if x.kind == "linear"]
    widths = [x.inside for x in linear if x.node in entries]
    widths += [x.out for x in layers if x.kind == "norm" and x.node.parent is block.node]
    widths += [int(x.node.module.in_channels) for x in layers if x.kind == "conv"]  # type: ignore[arg-type]
    widths += [x.inside for x in linear]
    return widths[0] if widths else 0


def _mlp_groups(layers: list[Layer]) -> list[list[Layer]]:
    """Layers that make one network: up to its last projection, with what the same module holds beyond it."""
    groups: list[list[Layer]] = []
    for layer in layers:
        last = groups[-1] if groups else []
        taken = {r for x in last for r in x.roles}
        full = "mlp.down" in taken and len(taken) > 1
        if last and (not full or (layer.node.parent is last[0].node.parent and not taken & set(layer.roles))):
            last.append(layer)
        else:
            groups.append([layer])
    return [g for g in groups if len(g) > 1 and any("mlp.down" in x.roles for x in g)]


def _expert_holder(layers: list[Layer]) -> Node | None:
    for layer in layers:
        if layer.role.startswith("expert.") or layer.roles == ("router",):
            return next((n for n in layer.node.above() if "experts" in n.children), layer.node.parent)
    return None
