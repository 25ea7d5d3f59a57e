"""Anatomy: finds the sites of any model, with the same roles for every family.

The repeated block list is found by structure, the layers in it by name tables (`families`) and then by shape.
Nothing here reads a weight's values, so a model on the meta device does.
"""

from __future__ import annotations

import ast
import inspect
import math
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn

from veneer import families as names
from veneer.errors import BadFile, MissingExtra, NoMatch, UnknownName, nearest
from veneer.site import ROLES, Site

SKIPPED = ("veneer", "parametrizations")
"""Children that hold no layer of the model: adapter tensors and torch's parametrisations."""
SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
"""Parameters of `nn.MultiheadAttention` whose keys and values have other widths than its queries."""


@dataclass(eq=False)
class Node:
    """A module at its place in the tree."""

    path: str
    module: nn.Module
    parent: Node | None
    children: dict[str, Node] = field(default_factory=dict)
    block: Block | None = None
    side: str = ""

    def __post_init__(self) -> None:
        self.name = self.path.rpartition(".")[2]
        self.cls = plain_class(self.module)

    def walk(self) -> Iterator[Node]:
        yield self
        for child in self.children.values():
            yield from child.walk()

    def above(self) -> Iterator[Node]:
        """Parent, its parent … up to the root."""
        node = self.parent
        while node is not None:
            yield node
            node = node.parent

    def within(self, outer: Node) -> str:
        """The path seen from `outer`."""
        return self.path[len(outer.path) + 1 :] if outer.path else self.path


@dataclass(eq=False)
class Block:
    """One repeated block; `depth` counts over the model, `index` over its list."""

    node: Node
    index: int
    length: int
    depth: int = 0
    parts: list[Part] = field(default_factory=list)
    hidden: int = 0


@dataclass(eq=False)
class Layer:
    """A weight: `roles` has one entry, or one for every row range of a fused weight."""

    node: Node
    kind: str
    out: int
    inside: int
    parameter: str = "weight"
    roles: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)
    fixed: bool = False
    instead: str = ""
    """The role to show in place of `roles` (pooling heads have projections too)."""

    @property
    def name(self) -> str:
        last = self.parameter if self.kind == "parameter" else ""
        if self.parameter in SEPARATE:
            last = self.parameter[0]
        fused = self.parameter == "in_proj_weight"
        return ".".join(x for x in (self.node.path, last) if x) or ("" if fused else self.parameter)


@dataclass(eq=False)
class Part:
    """A sub-layer: role attn, cross, mlp or mixer."""

    role: str
    layers: list[Layer]
    entry: Node
    end: Node
    core: Node | None = None
    post: bool = False
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0


def sites(model: nn.Module, roles: Mapping[str, str] | None = None) -> list[Site]:
    """Every place of the model where a method can act, in model order.

    Args:
        roles: module name, its last components, or a regular expression over whole names → role, to add or
            correct; several roles separated by blanks name the equal row ranges of a fused layer, in order.

    Raises:
        UnknownName: a role that does not exist. NoMatch: a name in `roles` that the model does not have.
    """
    return _Anatomy(model, roles or {}).sites()


class _Anatomy:
    """One walk over one model."""

    def __init__(self, model: nn.Module, custom: Mapping[str, str]) -> None:
        _check_roles(custom)
        self.custom, self.used = custom, set[str]()
        self.root = _grow(model)
        self.nodes = list(self.root.walk())
        self.tokens = _asked(model, "get_input_embeddings")
        self.output = _asked(model, "get_output_embeddings")
        self.layers = _once([layer for node in self.nodes for layer in _layers_of(node)])
        self.by_node: dict[Node, list[Layer]] = {}
        for layer in self.layers:
            self.by_node.setdefault(layer.node, []).append(layer)
        for layer in self.layers:
            layer.fixed = self._take_custom(layer)
        self.blocks = self._find_blocks()
        self.seq_first = _sequence_first(self.nodes)
        for block in self.blocks:
            self._study(block)
        self._study(None)
        for layer in self.layers:
            if not layer.roles:
                layer.roles = (self._outside_role(layer),)

    # -- blocks ---------------------------------------------------------------------------------------------

    def _find_blocks(self) -> list[Block]:
        told = {x.node for x in self.layers if x.roles and x.roles[0].startswith(("attn.", "cross.", "mixer."))}
        attends = {p for n in self.nodes if n in told or _attends(n) for p in n.above()}
        stacks = _stacks(self.root, attends) or self._plain_stacks()
        blocks = [Block(node, i, len(stack)) for stack in stacks for i, node in enumerate(stack)]
        ordered = sorted(blocks, key=lambda b: b.node.side == "decoder")
        for depth, block in enumerate(ordered):
            block.depth = depth
            for node in block.node.walk():
                node.block = block
        return blocks

    def _plain_stacks(self) -> list[list[Node]]:
        """The blocks of models without attention: listed at least twice, with two matrices or convolutions or more."""
        count: dict[Node, int] = {}
        for layer in self.layers:
            if layer.kind in ("linear", "conv"):
                for node in layer.node.above():
                    count[node] = count.get(node, 0) + 1
        found = _stacks(self.root, {node for node, n in count.items() if n > 1})
        repeated = {stack[0].cls for stack in found if len(stack) > 1 and len({n.cls for n in stack}) == 1}
        return [stack for stack in found if {n.cls for n in stack} <= repeated]

    # -- roles ----------------------------------------------------------------------------------------------

    def _take_custom(self, layer: Layer) -> bool:
        for key, role in self.custom.items():
            if _named(key, layer.node.path) or _named(key, layer.name):
                layer.roles = tuple(role.split())
                self.used.add(key)
                return True
        return False

    def _study(self, block: Block | None) -> None:
        """Roles of the layers of one block (or of all that lie outside blocks), and its sub-layers."""
        outer = block.node if block else None
        mine = [x for n in (outer.walk() if outer else self.nodes) if n.block is block for x in self.by_node.get(n, ())]
        for layer in mine:
            if not layer.roles and (block or _in_attention(layer.node, None)):
                layer.roles = _block_roles(layer, outer)
        parts = _attention_parts(mine, outer)
        if block is None:
            for layer in (x for part in parts for x in part.layers):
                layer.instead = "pooler" if _is_pooler(layer.node) and not layer.fixed else ""
            return
        _pair_by_shape(mine, block.node)
        block.parts = [*parts, *_mixer_parts(mine), *_mlp_parts(mine)]
        block.hidden = _hidden(block, mine)
        for layer in mine:
            if layer.kind == "norm" and not layer.roles:
                self._norm_role(layer, block)
            elif not layer.roles:
                layer.roles = (self._inside_role(layer),)

    def _inside_role(self, layer: Layer) -> str:
        if layer.kind in ("conv", "parameter", "embedding"):
            return self._outside_role(layer)
        return "embed.other" if names.EMBEDDING_SCOPE.search(layer.node.within(layer.node.block.node)) else "other"  # type: ignore[union-attr]

    def _outside_role(self, layer: Layer) -> str:
        node = layer.node
        if layer.kind == "embedding":
            return self._embedding_role(node)
        if layer.kind == "parameter":
            return "embed.position" if _is_position(layer.parameter) else "parameter"
        if layer.kind == "norm":
            return self._final_norm_role(node)
        if names.PATCH.search(node.path) or (node.parent and names.PATCH.search(node.parent.cls.__name__)):
            return "embed.patch"
        if layer.kind == "conv" and _before_stack(node):
            return "embed.patch"
        if names.POSITION.search(node.path) and layer.kind == "conv":
            return "embed.position"
        if node.block is None and _is_pooler(node):
            return "pooler"
        if node.module is self.output or (node.block is None and names.HEAD.search(node.path)):
            return "head"
        if layer.kind == "conv":
            return "conv"
        return "embed.other" if names.EMBEDDING_SCOPE.search(node.path) else "other"

    def _embedding_role(self, node: Node) -> str:
        local = ".".join(node.path.split(".")[-2:])
        if node.module is self.tokens:
            return "embed.token"
        if names.POSITION.search(local) and not names.NOT_POSITION.search(local):
            return "embed.position"
        return "embed.token" if node.block is None and names.TOKEN.search(node.path) else "embed.other"

    def _final_norm_role(self, node: Node) -> str:
        """A norm outside blocks: before or after the stack, as its parent's forward calls it."""
        parent = node.parent or node
        stack = next((b.node for b in self.blocks if parent in b.node.above()), None)
        if stack is None or names.PATCH.search(node.path):
            return "norm.embed" if re.search(names.EMBEDDING_SCOPE.pattern + "|" + names.PATCH.pattern, node.path) else "norm.other"
        called = calls(parent.cls)
        first = stack.within(parent).split(".")[0]
        if node.name in called and first in called:
            if called.index(node.name) > called.index(first):
                return "norm.final"
            return "norm.other" if isinstance(node.module, nn.GroupNorm) else "norm.embed"
        return "norm.embed" if names.EMBEDDING_SCOPE.search(node.name) else "norm.final"

    def _norm_role(self, layer: Layer, block: Block) -> None:
        node, parent = layer.node, layer.node.parent
        assert parent is not None
        if names.HEAD_NORM.search(node.name):
            layer.roles = ("norm.qk",)
            return
        if parent is block.node:
            role = _block_norm(node, parent)
            part = _closest(node, [p for p in block.parts if f"norm.{p.role}" == role])
            if not role:
                part = _next_without_norm(node, block)
                role = f"norm.{part.role}" if part else "norm.other"
        else:
            inside = [p for p in block.parts if any(parent is x.node or parent in x.node.above() for x in p.layers)]
            part = inside[0] if len(inside) == 1 and not _is_inner(node, inside[0]) else None
            role = f"norm.{part.role}" if part else "norm.other"
        layer.roles = (role if role in ROLES else "norm.other",)
        if part and role == f"norm.{part.role}" and _is_post(node, part):
            layer.extra["post"] = part.post = True

    # -- sites ----------------------------------------------------------------------------------------------

    def sites(self) -> list[Site]:
        found: list[Site] = [s for layer in self.layers for s in self._layer_sites(layer)]
        self._refuse_unused(found)
        whole = self._whole_sites({s.name for s in found})
        merged: list[Site] = whole.pop("", [])
        at: dict[str, list[Site]] = {}
        for site in found:
            at.setdefault(site.module, []).append(site)
        for node in self.nodes:
            merged += [*whole.get(node.path, ()), *at.get(node.path, ())]
        return merged

    def _layer_sites(self, layer: Layer) -> Iterator[Site]:
        sizes = _sizes(layer)
        start = 0
        for role, size in zip(layer.roles, sizes):
            rows = (start, start + size) if len(sizes) > 1 else None
            name = f"{layer.name}.{role.rsplit('.', 1)[-1]}".lstrip(".") if rows else layer.name
            role = self._renamed(name, layer.instead or role)
            facts = {"rows": rows, "parameter": layer.parameter, "trainable_head": self._trains(role, layer.node), **layer.extra}
            yield self._site(layer.node, name=name, role=role, kind=layer.kind, out_features=size, in_features=layer.inside, **facts)
            start += size

    def _renamed(self, name: str, role: str) -> str:
        for key, wanted in self.custom.items():
            if " " not in wanted.strip() and _named(key, name):
                self.used.add(key)
                return wanted.strip()
        return role

    def _whole_sites(self, taken: set[str]) -> dict[str, list[Site]]:
        """Model, block, branch and attention sites by the path they are listed at."""
        out: dict[str, list[Site]] = {}

        def add(at: Node, **facts: Any) -> None:
            width = facts.pop("width")
            while facts["name"] in taken:
                facts["name"] += "." + facts["kind"]
            taken.add(facts["name"])
            node = facts.pop("node")
            site = self._site(node, out_features=width, in_features=width, **{**_of_block(at), **facts})
            out.setdefault(at.path, []).append(site)

        width = getattr(self.tokens, "embedding_dim", 0) or (self.blocks[0].hidden if self.blocks else 0)
        if width:
            side = "encoder" if any(n.side for n in self.nodes) else ""
            first = self.blocks[0].node if self.blocks else self.root
            add(
                self.root,
                node=self.root,
                name="input",
                role="model",
                kind="model",
                width=width,
                side=side,
                batch_dim=self._batch_dim(first),
            )
        for block in self.blocks:
            add(block.node, node=block.node, name=block.node.path, role="block", kind="block", width=block.hidden)
            for part, label in _labelled(block.parts):
                name = f"{block.node.path}.{label}"
                add(
                    block.node,
                    node=part.end,
                    name=name,
                    role=part.role,
                    kind="branch",
                    width=block.hidden,
                    entry=part.entry.path,
                    post=part.post,
                )
        for block in self.blocks:
            for part in (p for p in block.parts if p.core):
                shape = dict(heads=part.heads, kv_heads=part.kv_heads, head_dim=part.head_dim, causal=self._causal(part))
                core = part.core
                assert core is not None
                add(core, node=core, name=core.path, role=part.role, kind="attention", width=part.kv_heads * part.head_dim, **shape)
        return out

    def _site(self, node: Node, **facts: Any) -> Site:
        known = {"side": node.side, "batch_dim": self._batch_dim(node), **_of_block(node), **facts}
        return Site(module=node.path, **known)

    def _batch_dim(self, node: Node) -> int:
        return int(node in self.seq_first)

    def _causal(self, part: Part) -> bool:
        core = part.core
        assert core is not None
        if part.role == "cross":
            return False
        if getattr(core.module, "is_causal", False) is True or any(names.CAUSAL_PARENT.search(n.cls.__name__) for n in core.above()):
            return True
        return (core.side == "decoder" or "ForCausalLM" in self.root.cls.__name__) and not isinstance(
            getattr(core.module, "is_causal", None), bool
        )

    def _trains(self, role: str, node: Node) -> bool:
        if role != "head" or node.module is self.output or names.LANGUAGE_HEAD.search(node.path):
            return False
        if hasattr(self.root.module, "config"):
            return bool(names.TASK_MODEL.search(self.root.cls.__name__))
        return node.path.split(".")[0] in names.TASK_HEADS

    def _refuse_unused(self, found: list[Site]) -> None:
        for key in self.custom:
            if key not in self.used:
                known = {s.name for s in found} | {s.name.rsplit(".", 1)[-1] for s in found}
                raise NoMatch(f"roles: {key!r} names no layer of the model.{nearest(key, known)}")


# -- the tree -----------------------------------------------------------------------------------------------


def plain_class(module: nn.Module) -> type:
    """The class a module had before the frame, FSDP2 or torch's parametrisations swapped it."""
    classes = type(module).__mro__
    return next((c for c in classes if not c.__name__.startswith(names.SWAPPED) and c is not nn.Module), classes[0])


def _grow(model: nn.Module) -> Node:
    seen: set[int] = set()

    def grow(path: str, module: nn.Module, parent: Node | None) -> Node:
        node = Node(path, module, parent)
        node.side = parent.side if parent else ""
        seen.add(id(module))
        below = {k: m for k, m in module._modules.items() if m is not None and k not in SKIPPED}
        both = any(k.endswith("encoder") for k in below) and "decoder" in below
        for key, child in below.items():
            if id(child) in seen or _is_spare(key, child, module):
                continue
            grown = grow(f"{path}.{key}" if path else key, child, node)
            if both and not node.side and key.endswith(("encoder", "decoder")):
                for n in grown.walk():
                    n.side = "decoder" if key == "decoder" else "encoder"
            node.children[key] = grown
        return node

    return grow("", model, None)


def _is_spare(key: str, module: nn.Module, parent: nn.Module) -> bool:
    """An embedding called `shared` that only ties the two stacks' own tables: no forward calls it."""
    if key != "shared" or not isinstance(module, nn.Embedding):
        return False
    stacks = [getattr(parent, side, None) for side in ("encoder", "decoder")]
    tables = [getattr(s, "embed_tokens", None) for s in stacks if s is not None]
    return bool(tables) and all(t is not None and t is not module for t in tables)


def _asked(model: nn.Module, question: str) -> nn.Module | None:
    try:
        answer = getattr(model, question)()
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return answer if isinstance(answer, nn.Module) else None


def _before_stack(node: Node) -> bool:
    """Whether a convolution wider than one step stands beside the list of blocks: it makes their input."""
    if node.block or node.parent is None or math.prod(node.module.kernel_size) == 1:  # type: ignore[arg-type]
        return False
    beside = (c for c in node.parent.children.values() if isinstance(c.module, (nn.ModuleList, nn.Sequential)))
    return any(item.block and item.block.node is item for c in beside for item in c.children.values())


def _stacks(node: Node, wanted: set[Node]) -> list[list[Node]]:
    """The innermost lists of one class with a wanted item, or of several classes with all items wanted."""
    inner = [stack for child in node.children.values() for stack in _stacks(child, wanted)]
    if inner or not isinstance(node.module, (nn.ModuleList, nn.Sequential)):
        return inner
    items = list(node.children.values())
    alike = len({i.cls for i in items}) == 1
    found = [i in wanted for i in items]
    return [items] if (any(found) if alike else found and all(found)) else []


def _attends(node: Node) -> bool:
    """Whether this module is a projection that attention or a mixer reads through."""
    if node.cls is nn.MultiheadAttention:
        return True
    if node.name in names.ATTENTION_IN and _linear_shape(node.module) is not None:
        return True
    return bool(node.parent) and any(c.search(node.parent.cls.__name__) and node.name in t for c, t in names.MIXERS)  # type: ignore[union-attr]


def _sequence_first(nodes: list[Node]) -> set[Node]:
    """Modules that see [sequence, batch, width]: multi-head attention so built, and torch's transformer around it."""
    found: set[Node] = set()
    for node in nodes:
        if isinstance(node.module, nn.MultiheadAttention) and not node.module.batch_first:
            top = node
            for n in node.above():
                if n.cls.__module__ == "torch.nn.modules.transformer":
                    top = n
            found.update(top.walk())
    return found


def _of_block(node: Node) -> dict[str, Any]:
    b = node.block
    return {"depth": b.depth, "index": b.index, "length": b.length} if b else {"depth": None}


# -- weights ------------------------------------------------------------------------------------------------


def _linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear layer of whatever make; quantised weights have other shapes, so the attributes count."""
    if plain_class(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return int(module.nf), int(module.weight.shape[0])  # type: ignore[arg-type, union-attr, index]
    out, inside = getattr(module, "out_features", None), getattr(module, "in_features", None)
    leaf = bool(module._parameters or module._buffers) and all(k in SKIPPED for k in module._modules)
    return (out, inside) if leaf and isinstance(out, int) and isinstance(inside, int) else None


def _once(layers: list[Layer]) -> list[Layer]:
    """Leaves out bare parameters that another layer or an earlier module holds too."""
    seen = {id(p) for x in layers if x.kind != "parameter" for p in x.node.module._parameters.values()}
    kept = []
    for layer in layers:
        own = id(layer.node.module._parameters.get(layer.parameter))
        if layer.kind != "parameter" or own not in seen:
            kept.append(layer)
            seen.add(own)
    return kept


def _layers_of(node: Node) -> list[Layer]:
    module = node.module
    if isinstance(module, nn.MultiheadAttention):
        return _multihead(node, module)
    shape = _linear_shape(module)
    if shape:
        return [Layer(node, "linear", *shape)]
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        inside = module.in_channels // module.groups * math.prod(module.kernel_size)
        extra = {"kernel": tuple(module.kernel_size), "groups": module.groups}
        return [Layer(node, "conv", module.out_channels, inside, extra=extra)]
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return []
    if isinstance(module, nn.Embedding):
        return [Layer(node, "embedding", module.embedding_dim, module.num_embeddings)]
    own = {k: p for k, p in module._parameters.items() if p is not None}
    weight = own.get("weight")
    if weight is not None and weight.ndim == 1 and re.search(r"Norm(Act|Gated)?(\dd)?$", node.cls.__name__):
        return [Layer(node, "norm", len(weight), len(weight))]
    stacks = _expert_stacks(node, own)
    return [*stacks, *(_bare(node, k, p) for k, p in own.items() if all(k != s.parameter for s in stacks))]


def _multihead(node: Node, module: nn.MultiheadAttention) -> list[Layer]:
    width = module.embed_dim
    if module.in_proj_weight is not None:
        return [Layer(node, "linear", 3 * width, width, "in_proj_weight")]
    inside = {"q": width, "k": module.kdim, "v": module.vdim}
    return [Layer(node, "linear", width, n, f"{part}_proj_weight") for part, n in inside.items()]


def _expert_stacks(node: Node, own: Mapping[str, Any]) -> list[Layer]:
    """Stacked matrices [E, out, in] of a mixture; stacks stored the other way round stay bare parameters."""
    down = own.get("down_proj")
    first = next((k for k in ("gate_up_proj", "up_proj") if k in own), None)
    if down is None or first is None or down.ndim != 3 or own[first].ndim != 3:
        return []
    up = own[first]
    halves = ("expert.gate", "expert.up") if first == "gate_up_proj" else ("expert.up",)
    straight = up.shape[2] == down.shape[1] and up.shape[1] == len(halves) * down.shape[2]
    if not straight or getattr(node.module, "is_transposed", False) or not getattr(node.module, "is_concatenated", True):
        return []
    extra = {"count": up.shape[0]}
    return [
        Layer(node, "parameter", up.shape[1], up.shape[2], first, halves, extra=dict(extra)),
        Layer(node, "parameter", down.shape[1], down.shape[2], "down_proj", ("expert.down",), extra=dict(extra)),
    ]


def _bare(node: Node, name: str, parameter: nn.Parameter) -> Layer:
    shape = tuple(parameter.shape) or (1,)
    router = len(shape) == 2 and names.ROUTER.search(node.cls.__name__)
    out, inside = shape if len(shape) == 2 else (shape[-1], math.prod(shape[:-1]))
    return Layer(node, "parameter", out, inside, name, ("router",) if router else ())


def _sizes(layer: Layer) -> tuple[int, ...]:
    if len(layer.sizes) == len(layer.roles):
        return layer.sizes
    return (layer.out // len(layer.roles),) * len(layer.roles)


# -- roles inside a block -----------------------------------------------------------------------------------


def _key(node: Node) -> str:
    """The name that tells: a list's item counts with the list's name."""
    return f"{node.parent.name}.{node.name}" if node.name.isdigit() and node.parent else node.name


def _scope(node: Node, outer: Node | None) -> Iterator[Node]:
    """The modules between a layer and its block (None: the modules above a layer outside blocks)."""
    for n in node.above():
        if n is outer:
            return
        yield n


def _in_attention(node: Node, outer: Node | None) -> bool:
    above = _scope(node, outer)
    return isinstance(node.module, nn.MultiheadAttention) or any(
        names.ATTENTION_SCOPE.search(n.name) or names.ATTENTION_SCOPE.search(n.cls.__name__) for n in above
    )


def _block_roles(layer: Layer, outer: Node | None) -> tuple[str, ...]:
    node, key = layer.node, _key(layer.node)
    if layer.parameter == "in_proj_weight":
        return ("attn.q", "attn.k", "attn.v")
    if layer.parameter in SEPARATE:
        return (f"attn.{layer.parameter[0]}",)
    if layer.kind != "linear":
        return ()
    holder = node.parent.cls.__name__ if node.parent else ""
    for family, table in names.MIXERS:
        if family.search(holder):
            return (table[key],) if key in table else ()
    if _is_router(node):
        return ("router",)
    attention = _in_attention(node, outer)
    if key in names.ATTENTION_IN:
        return _input_roles(layer, names.ATTENTION_IN[key])
    if attention:
        return ("attn.o",) if key in names.ATTENTION_OUT else _unknown_attention(layer)
    return _mlp_roles(layer, key)


def _is_router(node: Node) -> bool:
    parent = node.parent
    if parent is None:
        return False
    return bool(names.ROUTER.search(parent.cls.__name__)) or (node.name in names.ROUTER_NAMES and "experts" in parent.children)


def _input_roles(layer: Layer, part: str) -> tuple[str, ...]:
    module = layer.node.parent.module if layer.node.parent else layer.node.module
    several = getattr(module, "multi_query", True)
    if part == "fused" and getattr(module, "is_cross_attention", False):
        part = "kv"
    if part == "interleaved" or (part == "fused" and not several):
        return ("attn.qkv",)
    return {"fused": ("attn.q", "attn.k", "attn.v"), "kv": ("attn.k", "attn.v")}.get(part, (f"attn.{part}",))


def _unknown_attention(layer: Layer) -> tuple[str, ...]:
    """By shape: three times as many rows as columns is a fused projection, in an order nobody told."""
    return ("attn.qkv",) if layer.out == 3 * layer.inside else ()


def _mlp_roles(layer: Layer, key: str) -> tuple[str, ...]:
    node = layer.node
    longer = f"{node.parent.name if node.parent else ''}.{key}"
    longest = f"{node.parent.parent.name}.{longer}" if node.parent and node.parent.parent else longer
    part = next((names.MLP[k] for k in (longest, longer, key) if k in names.MLP), "")
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


def _pair_by_shape(layers: list[Layer], outer: Node) -> None:
    """Names no table knows: a widening layer and the narrowing one after it are a feed-forward network."""
    unknown = [x for x in layers if x.kind == "linear" and not x.roles and not _in_attention(x.node, outer)]
    for a, b in pairwise(unknown):
        if a.out == b.inside and a.inside == b.out and a.out > a.inside:
            a.roles, b.roles = ("mlp.up",), ("mlp.down",)


# -- sub-layers ---------------------------------------------------------------------------------------------


def _attention_parts(layers: list[Layer], outer: Node | None) -> list[Part]:
    """Attention modules: the holders of the query, key and value projections, each with its output projection."""
    cores: dict[Node, list[Layer]] = {}
    for layer in layers:
        if layer.roles and re.match(r"(attn|cross)\.(q|k|v|qkv)$", layer.roles[0]):
            holder = layer.node if layer.node.cls is nn.MultiheadAttention else layer.node.parent or layer.node
            cores.setdefault(holder, []).append(layer)
    ends = {_nearest_core(x.node, list(cores)): x for x in reversed(layers) if x.roles in (("attn.o",), ("cross.o",)) and cores}
    parts: list[Part] = []
    for core, inputs in cores.items():
        cross = any(x.roles[0].startswith("cross.") for x in inputs) or _is_cross(core, outer, second=bool(parts))
        end = ends.get(core)
        mine = [*inputs, end] if end else inputs
        for layer in (x for x in mine if cross and not x.fixed):
            layer.roles = tuple(r.replace("attn.", "cross.") for r in layer.roles)
        queries = [x for x in inputs if any(r.endswith((".q", ".qkv")) for r in x.roles)]
        first = (queries or inputs)[0].node
        last = core if core.cls is nn.MultiheadAttention else end.node if end else core
        part = Part("cross" if cross else "attn", mine, first, last, core)
        _measure(part, inputs)
        parts.append(part)
    return parts


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
    if told is not True and second and names.CROSS_IF_SECOND.search(path):
        return True
    if isinstance(told, bool):
        return told
    return bool(names.CROSS.search(" ".join([path, *(n.cls.__name__ for n in (core, *_scope(core, outer)))])))


def _measure(part: Part, inputs: list[Layer]) -> None:
    """Heads, key heads and head width, and with them the row ranges of a fused projection."""
    assert part.core is not None
    module = part.core.module
    config = getattr(module, "config", None)
    width = _number(module, config, names.HEAD_DIM)
    heads = _number(module, config, names.HEADS)
    kv = _number(module, config, names.KV_HEADS)
    single = {role[-1]: size for x in inputs for role, size in zip(x.roles, _sizes(x))}
    fused = next((x for x in inputs if len(x.roles) == 3 or x.roles[0].endswith("qkv")), None)
    if fused is not None:
        width = width or (fused.out // (heads + 2 * (kv or heads)) if heads else 0)
        if width:
            kv = kv if kv and kv < (heads or fused.out // width) else fused.out // width // 3
            heads = fused.out // width - 2 * kv
            if len(fused.roles) == 3:
                fused.sizes = tuple(width * (heads if r.endswith(".q") else kv) for r in fused.roles)
    else:
        q, k = single.get("q", 0), single.get("k", 0)
        width = width or (q // heads if heads else 0)
        heads = heads or (q // width if width else 0)
        kv = k // width if width and k else kv or heads
    part.heads, part.kv_heads, part.head_dim = heads, kv or heads, width


def _number(module: nn.Module, config: Any, options: tuple[str, ...]) -> int:
    for holder in (module, config):
        for name in options:
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return 0


def _mixer_parts(layers: list[Layer]) -> list[Part]:
    mine = [x for x in layers if x.roles and x.roles[0].startswith("mixer.")]
    return [Part("mixer", mine, mine[0].node, mine[-1].node)] if mine else []


def _mlp_parts(layers: list[Layer]) -> list[Part]:
    """Feed-forward networks; a mixture of experts is one, from its router to the sum of the experts."""
    parts: list[Part] = []
    experts = _expert_holder(layers)
    if experts is not None:
        inside = [x for x in layers if experts in x.node.above() and x.roles]
        parts.append(Part("mlp", inside, experts, experts))
    rest = [x for x in layers if x.roles and x.roles[0].startswith("mlp.") and experts not in list(x.node.above())]
    for group in _mlp_groups(rest):
        down = next(x for x in group if "mlp.down" in x.roles)
        parts.append(Part("mlp", group, next(x for x in group if x is not down).node, down.node))
    return parts


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
        if layer.roles and (layer.roles[0].startswith("expert.") or layer.roles == ("router",)):
            holder = next((n for n in layer.node.above() if "experts" in n.children), layer.node.parent)
            return holder
    return None


def _labelled(parts: list[Part]) -> Iterator[tuple[Part, str]]:
    seen: dict[str, int] = {}
    for part in parts:
        complete = part.core is None or part.end is not part.core or part.core.cls is nn.MultiheadAttention
        if part.role == "mixer" or not complete:
            continue
        seen[part.role] = seen.get(part.role, 0) + 1
        yield part, part.role if seen[part.role] == 1 else f"{part.role}{seen[part.role]}"


def _hidden(block: Block, layers: list[Layer]) -> int:
    """The width of the block's stream: what its sub-layers read, else its norms or its first layer."""
    entries = {p.entry for p in block.parts}
    widths = [x.inside for x in layers if x.node in entries and x.kind == "linear"]
    widths += [x.out for x in layers if x.kind == "norm" and x.node.parent is block.node]
    widths += [int(x.node.module.in_channels) for x in layers if x.kind == "conv"]  # type: ignore[arg-type]
    widths += [x.inside for x in layers if x.kind == "linear"]
    return widths[0] if widths else 0


# -- norms --------------------------------------------------------------------------------------------------


def _block_norm(node: Node, block: Node) -> str:
    """The role that a direct child's name tells; "" when only its order can."""
    if node.name == "post_attention_layernorm":
        return "norm.attn" if any("feedforward" in k for k in block.children) else "norm.mlp"
    return next((role for pattern, role in names.BLOCK_NORMS if pattern.search(node.name)), "")


def _next_without_norm(node: Node, block: Block) -> Part | None:
    """Norms without a telling name belong to the sub-layers in order: attention, cross-attention, feed-forward."""
    order = {"attn": 0, "mixer": 0, "cross": 1, "mlp": 2}
    norms = [c for c in block.node.children.values() if c.cls.__name__.endswith("Norm")]
    told = {r for n in norms if (r := _block_norm(n, block.node))}
    open_parts = sorted((p for p in block.parts if f"norm.{p.role}" not in told), key=lambda p: order[p.role])
    place = [n for n in norms if not _block_norm(n, block.node)].index(node) if node in norms else 0
    return open_parts[place] if place < len(open_parts) else None


def _closest(node: Node, parts: list[Part]) -> Part | None:
    """Of several sub-layers of one role, the one that runs next to the norm."""
    called = calls(_parent(node).cls, tuple(_parent(node).children))

    def distance(part: Part) -> int:
        at = [called.index(c) for c in _pieces(part, _parent(node)) if c in called]
        return min((abs(i - called.index(node.name)) for i in at), default=len(called)) if node.name in called else 0

    return min(parts, key=distance, default=None)


def _is_inner(node: Node, part: Part) -> bool:
    """A norm between the projections of a sub-layer is neither its norm before nor after."""
    if names.INNER_NORM.search(node.name):
        return True
    before, after = _around(node, part)
    return before and after


def _around(node: Node, part: Part) -> tuple[bool, bool]:
    """Whether the parent's forward runs some of the sub-layer before the norm, and whether some after it."""
    called = calls(_parent(node).cls, tuple(_parent(node).children))
    if node.name not in called:
        return False, False
    mine = _pieces(part, _parent(node))
    at = called.index(node.name)
    return any(c in mine for c in called[:at]), any(c in mine for c in called[at:])


def _pieces(part: Part, parent: Node) -> set[str]:
    ends = [n for n in (part.entry, part.end) if parent in n.above()]
    return {n.within(parent).split(".")[0] for n in ends}


def _parent(node: Node) -> Node:
    return node.parent or node


def _is_post(node: Node, part: Part) -> bool:
    """Whether the norm acts on the sum of the sub-layer's output and its residual."""
    parent = _parent(node)
    flag = next((getattr(parent.module, f) for f in names.PRE_NORM_FLAGS if isinstance(getattr(parent.module, f, None), bool)), None)
    if flag is not None:
        return not flag
    called = calls(parent.cls, tuple(parent.children))
    mine = _pieces(part, parent)
    if node.name not in called or not mine & set(called):
        return part.end.parent is parent and part.core is not parent
    at = called.index(node.name)
    ran = [i for i, c in enumerate(called[:at]) if c in mine]
    return bool(ran) and "+" in called[ran[-1] : at]


@lru_cache(maxsize=512)
def calls(cls: type, children: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The attributes that a class's forward uses, in the order they run, with "+" for every sum between them.

    Methods of the class are followed. Empty when the source is not to be had; for a Sequential its children.
    """
    if issubclass(cls, nn.Sequential):
        return children
    return tuple(_run_order(cls, "forward", frozenset()))


def _run_order(cls: type, method: str, seen: frozenset[str]) -> list[str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(getattr(cls, method))))
    except (OSError, TypeError, SyntaxError, AttributeError):
        return []
    out: list[str] = []

    def use(name: str) -> None:
        if inspect.isfunction(getattr(cls, name, None)) and name not in seen:
            out.extend(_run_order(cls, name, seen | {method, name}))
        else:
            out.append(name)

    def visit(node: ast.AST) -> None:
        own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
        if isinstance(node, ast.Call):
            for child in (*node.args, *node.keywords, node.func):
                visit(child)
            return
        if own:
            use(node.attr)  # type: ignore[attr-defined]
            return
        for child in ast.iter_child_nodes(node):
            visit(child)
        if isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, ast.Add):
            out.append("+")

    visit(tree)
    return out


# -- names --------------------------------------------------------------------------------------------------


def _check_roles(custom: Mapping[str, str]) -> None:
    for key, wanted in custom.items():
        for role in wanted.split() or [wanted]:
            if role not in ROLES:
                raise UnknownName(
                    f"roles: {role!r}, given for {key!r}, is no role.{nearest(role, ROLES) or ' Roles: ' + ', '.join(ROLES) + '.'}"
                )


def _named(key: str, name: str) -> bool:
    if name == key or name.endswith("." + key):
        return True
    try:
        return re.fullmatch(key, name) is not None
    except re.error:
        return False


def _is_pooler(node: Node) -> bool:
    return bool(names.POOLER.search(node.path)) or any(names.POOLER_CLASS.search(n.cls.__name__) for n in node.above())


def _is_position(name: str) -> bool:
    return bool(names.POSITION.search(name)) and not names.NOT_POSITION.search(name)


# -- to read ------------------------------------------------------------------------------------------------


def layout(model: nn.Module, roles: Mapping[str, str] | None = None) -> str:
    """The model as a tree of roles with shapes [out, in], in plain text; equal blocks in a row are shown once."""
    found = sites(model, roles)
    inner: dict[int | None, list[Site]] = {}
    for site in found:
        inner.setdefault(site.depth, []).append(site)
    lines, run = [plain_class(model).__name__], list[Site]()
    for site in found:
        if site.depth is None and site.kind != "model":
            lines += [*_shown(run, inner), _line(site, site.name, 1)]
            run = []
        elif site.kind == "block":
            if run and (site.index == 0 or _outline(inner[site.depth]) != _outline(inner[run[-1].depth])):
                lines += _shown(run, inner)
                run = []
            run.append(site)
    return "\n".join([*lines, *_shown(run, inner)])


def _shown(run: list[Site], inner: Mapping[int | None, list[Site]]) -> list[str]:
    """The lines of equal blocks in a row."""
    if not run:
        return []
    first, last = run[0], run[-1]
    where = first.name if len(run) == 1 else f"{first.name} … {last.name}"
    head = f"  block × {len(run)}  {where}  width {first.out_features}"
    return [head, *(_line(s, s.name.removeprefix(first.name + "."), 2) for s in inner[first.depth] if s is not first)]


def _outline(members: list[Site]) -> list[tuple[Any, ...]]:
    """What two equal blocks have in common."""
    block = next(s.name for s in members if s.kind == "block")
    return [(s.name.removeprefix(block), s.role, s.kind, s.out_features, s.in_features, s.rows, s.post, s.causal) for s in members]


def _line(site: Site, name: str, level: int) -> str:
    weight = site.kind in ("linear", "conv", "embedding", "parameter")
    shape = f"[{f'{site.count}, ' if site.count else ''}{site.out_features}, {site.in_features}]" if weight else f"{site.out_features}"
    if site.kind == "norm":
        shape = f"[{site.out_features}]"
    notes = [f"rows {site.rows[0]}–{site.rows[1]}"] if site.rows else []
    if site.kind == "attention":
        notes.append(f"{site.heads} heads" + (f", {site.kv_heads} for keys" if site.kv_heads != site.heads else "") + f" × {site.head_dim}")
    notes += [word for word, said in (("causal", site.causal), ("post", site.post), ("trained with the task", site.trainable_head)) if said]
    if site.kind in ("branch", "attention"):
        notes.insert(0, "sub-layer" if site.kind == "branch" else "attention")
    return f"{'  ' * level}{site.role:<15} {shape:<16} {name}{'  (' + '; '.join(notes) + ')' if notes else ''}"


def skeleton(name_or_path: str) -> nn.Module:
    """The model of a configuration, without weights (on the meta device).

    Args:
        name_or_path: a folder with config.json or a model's name on the hub; the architecture named there is
            preferred, else the plain backbone is built. Folders of diffusers models work too.

    Raises:
        BadFile: no readable configuration there, or one that no installed library knows.
    """
    import torch

    known = _diffusers_config(Path(name_or_path))
    if known:
        return _diffusers_model(known, name_or_path)
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name_or_path)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadFile(
            f"{name_or_path!r} gives no model configuration: {reason}\nGive a folder with config.json or a model's name."
        ) from error
    named = next((getattr(transformers, a) for a in config.architectures or () if hasattr(transformers, a)), None)
    with torch.device("meta"):
        return named(config) if named else transformers.AutoModel.from_config(config)


def _diffusers_config(folder: Path) -> dict[str, Any]:
    import json

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) and "_class_name" in config else {}


def _diffusers_model(config: dict[str, Any], where: str) -> nn.Module:
    import torch

    try:
        import diffusers
    except ImportError as error:
        raise MissingExtra(f"{where!r} is a diffusers model. Install it with: pip install diffusers") from error
    cls = getattr(diffusers, str(config["_class_name"]), None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise BadFile(f"{where!r} names the class {config['_class_name']!r}, which the installed diffusers does not have.")
    with torch.device("meta"):
        return cls.from_config(config)  # type: ignore[attr-defined]
