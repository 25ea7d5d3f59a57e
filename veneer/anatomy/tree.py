"""The tree of a model's modules, and what the anatomy notes on it: layers, sub-layers, blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from veneer.anatomy import families as names

SKIPPED = ("veneer", "parametrizations")
"""Children that hold no layer of the model: adapter tensors and torch's parametrisations."""
SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
"""Parameters of `nn.MultiheadAttention` whose keys and values have other widths than its queries."""


@dataclass(eq=False)
class Node:
    """A module at its place in the tree; `side` and `batch_dim` as in `Site`."""

    path: str
    module: nn.Module
    parent: Node | None
    children: dict[str, Node] = field(default_factory=dict)
    block: Block | None = None
    side: str = ""
    batch_dim: int = 0

    def __post_init__(self) -> None:
        self.name = self.path.rpartition(".")[2]
        self.cls = plain_class(self.module)

    @property
    def holder(self) -> Node:
        """The parent; the root holds itself."""
        return self.parent or self

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
    fused: tuple[int, ...] = ()
    """Rows of each role, where they are not equally many."""
    extra: dict[str, Any] = field(default_factory=dict)
    fixed: bool = False
    instead: str = ""
    """The role to show in place of `roles` (pooling heads have projections too)."""

    @property
    def name(self) -> str:
        last = self.parameter if self.kind == "parameter" else ""
        if self.parameter in SEPARATE:
            last = self.parameter[0]
        whole = "" if self.parameter == "in_proj_weight" else self.parameter
        return ".".join(x for x in (self.node.path, last) if x) or whole

    @property
    def role(self) -> str:
        """The first role; "" while none is known."""
        return self.roles[0] if self.roles else ""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each role."""
        return self.fused if len(self.fused) == len(self.roles) else (self.out // len(self.roles),) * len(self.roles)


@dataclass(eq=False)
class Part:
    """A sub-layer: role attn, cross, mlp or mixer."""

    role: str
    layers: list[Layer]
    entry: Node
    end: Node
    core: Node | None = None
    """The attention module."""
    post: bool = False
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0


@dataclass(eq=False)
class Anatomy:
    """One model, studied; `tokens` and `output` are the embeddings the model names itself."""

    root: Node
    nodes: list[Node]
    layers: list[Layer]
    blocks: list[Block] = field(default_factory=list)
    tokens: nn.Module | None = None
    output: nn.Module | None = None


def plain_class(module: nn.Module) -> type:
    """The class a module had before the frame, FSDP2 or torch's parametrisations swapped it."""
    classes = type(module).__mro__
    return next((c for c in classes if not c.__name__.startswith(names.SWAPPED) and c is not nn.Module), classes[0])


def grow(model: nn.Module) -> Node:
    """The tree of all modules; one that stands at several places counts at its first.

    Children that a module names in its `left_alone` (a frozen vision tower) are left out, and with them from every adapter."""
    seen: set[int] = set()

    def at(path: str, module: nn.Module, parent: Node | None) -> Node:
        node = Node(path, module, parent)
        seen.add(id(module))
        skipped = (*SKIPPED, *getattr(module, "left_alone", ()))
        for key, child in module._modules.items():
            if child is not None and key not in skipped and id(child) not in seen and not _is_spare(key, child, module):
                node.children[key] = at(f"{path}.{key}" if path else key, child, node)
        return node

    root = at("", model, None)
    _tell_sides(root)
    _tell_batch_dims(root)
    return root


def _is_spare(key: str, module: nn.Module, parent: nn.Module) -> bool:
    """An embedding called `shared` that only ties the two stacks' own tables: no forward calls it."""
    if key != "shared" or not isinstance(module, nn.Embedding):
        return False
    stacks = [getattr(parent, side, None) for side in ("encoder", "decoder")]
    tables = [getattr(s, "embed_tokens", None) for s in stacks if s is not None]
    return bool(tables) and all(t is not None and t is not module for t in tables)


def _tell_sides(node: Node) -> None:
    """Encoder and decoder, where a module has both; the outermost such module counts."""
    for child in node.children.values():
        _tell_sides(child)
    below = [k for k, m in node.module._modules.items() if m is not None]
    if "decoder" not in below or not any(k.endswith("encoder") for k in below):
        return
    for key, child in node.children.items():
        if key.endswith(("encoder", "decoder")):
            for n in child.walk():
                n.side = "decoder" if key == "decoder" else "encoder"


def _tell_batch_dims(root: Node) -> None:
    """Input is [sequence, batch, width] for multi-head attention so built, and for torch's transformer around it."""
    for node in root.walk():
        if isinstance(node.module, nn.MultiheadAttention) and not node.module.batch_first:
            torchs = [n for n in node.above() if n.cls.__module__ == "torch.nn.modules.transformer"]
            for n in (torchs[-1] if torchs else node).walk():
                n.batch_dim = 1
