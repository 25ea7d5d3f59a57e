"""From a studied model to its sites."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from veneer.anatomy import families as names
from veneer.anatomy.given import Given
from veneer.anatomy.study import study
from veneer.anatomy.sublayers import labelled
from veneer.anatomy.tree import Anatomy, Block, Layer, Node, Part
from veneer.site import Site


def sites(model: nn.Module, roles: Mapping[str, str] | None = None) -> list[Site]:
    """Every place of the model where a method can act, in model order.

    Args:
        roles: module name, its last components, or a regular expression over whole names → role, to add or
            correct; several roles separated by blanks name the equal row ranges of a fused layer, in order.

    Raises:
        UnknownName: a role that does not exist. NoMatch: a name in `roles` that the model does not have.
    """
    given = Given(roles or {})
    body = study(model, given)
    heads = {id(x): (part.heads, part.kv_heads, part.head_dim) for block in body.blocks for part in block.parts for x in part.layers}
    weights = [site for layer in body.layers for site in _layer_sites(layer, given, body, heads.get(id(layer), (0, 0, 0)))]
    given.refuse_unused(weights)
    taken = {s.name for s in weights}
    listed: dict[str, list[Site]] = {node.path: [] for node in body.nodes}
    for at, site in _whole_sites(body):
        while site.name in taken:
            site = replace(site, name=f"{site.name}.{site.kind}")
        taken.add(site.name)
        listed[at.path].append(site)
    for site in weights:
        listed[site.module].append(site)
    found = [site for here in listed.values() for site in here]
    causal = {s.depth for s in found if s.kind == "attention" and s.causal and s.depth is not None}
    return [replace(s, causal=True) if s.depth in causal and s.kind != "attention" else s for s in found]


def _layer_sites(layer: Layer, given: Given, body: Anatomy, heads: tuple[int, int, int]) -> Iterator[Site]:
    """A site for the weight, or one for every row range of a fused weight; `heads` are those of the attention it belongs to."""
    start = 0
    for role, size in zip(layer.roles, layer.sizes):
        rows = (start, start + size) if len(layer.roles) > 1 else None
        name = f"{layer.name}.{role.rsplit('.', 1)[-1]}".lstrip(".") if rows else layer.name
        wanted = given.wanted(name, most=1)
        role = wanted[0] if wanted else layer.instead or role
        facts = {"rows": rows, "parameter": layer.parameter, "trainable_head": _trains(role, layer.node, body), **layer.extra}
        shape = {"out_features": size, "in_features": layer.inside, **dict(zip(("heads", "kv_heads", "head_dim"), heads))}
        yield _site(layer.node, layer.node.block, name=name, role=role, kind=layer.kind, **shape, **facts)
        start += size


def _whole_sites(body: Anatomy) -> Iterator[tuple[Node, Site]]:
    """Model, block, branch and attention sites, each with the node it is listed at."""
    yield from ((body.root, site) for site in _model_site(body))
    for block in body.blocks:
        yield from ((block.node, site) for site in _block_sites(block))
    for block in body.blocks:
        for part in block.parts:
            if part.core:
                yield part.core, _attention_site(part, part.core, body)


def _model_site(body: Anatomy) -> Iterator[Site]:
    first = body.blocks[0] if body.blocks else None
    width = getattr(body.tokens, "embedding_dim", 0) or (first.hidden if first else 0)
    if width:
        side = "encoder" if any(n.side for n in body.nodes) else ""
        batch_dim = (first.node if first else body.root).batch_dim
        yield _site(body.root, None, name="input", role="model", kind="model", **_square(width), side=side, batch_dim=batch_dim)


def _block_sites(block: Block) -> Iterator[Site]:
    path, width = block.node.path, _square(block.hidden)
    yield _site(block.node, block, name=path, role="block", kind="block", **width)
    if "@stream" in getattr(block.node.module._modules.get("veneer"), "_modules", ()):
        yield _site(block.node, block, name=f"{path}.stream", role="stream", kind="linear", module=f"{path}.veneer.@stream", **width)
    for part, label in labelled(block.parts):
        facts = {"role": part.role, "kind": "branch", "entry": part.entry.path, "post": part.post}
        yield _site(part.end, block, name=f"{path}.{label}", **facts, **width)


def _attention_site(part: Part, core: Node, body: Anatomy) -> Site:
    shape = {"heads": part.heads, "kv_heads": part.kv_heads, "head_dim": part.head_dim, **_square(part.kv_heads * part.head_dim)}
    return _site(core, core.block, name=core.path, role=part.role, kind="attention", causal=_causal(part, core, body), **shape)


def _site(node: Node, block: Block | None, **facts: Any) -> Site:
    place = {"depth": block.depth, "index": block.index, "length": block.length} if block else {"depth": None}
    return Site(**{"module": node.path, "side": node.side, "batch_dim": node.batch_dim, **place, **facts})


def _square(width: int) -> dict[str, int]:
    return {"out_features": width, "in_features": width}


def _causal(part: Part, core: Node, body: Anatomy) -> bool:
    if part.role == "cross":
        return False
    told = getattr(core.module, "is_causal", None)
    if told is True or any(names.CAUSAL_PARENT.search(n.cls.__name__) for n in core.above()):
        return True
    return not isinstance(told, bool) and (core.side == "decoder" or "ForCausalLM" in body.root.cls.__name__)


def _trains(role: str, node: Node, body: Anatomy) -> bool:
    """Whether a head belongs to the task and not to the pretrained model."""
    if role != "head" or node.module is body.output or names.LANGUAGE_HEAD.search(node.path):
        return False
    if hasattr(body.root.module, "config"):
        return bool(names.TASK_MODEL.search(body.root.cls.__name__))
    return node.path.split(".")[0] in names.TASK_HEADS
