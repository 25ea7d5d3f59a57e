"""The order in which a module's forward runs its children, read from its source."""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import lru_cache

from torch import nn


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
        if isinstance(node, ast.Call):
            for child in (*node.args, *node.keywords, node.func):
                visit(child)
            return
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            use(node.attr)
            return
        for child in ast.iter_child_nodes(node):
            visit(child)
        if isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, ast.Add):
            out.append("+")

    visit(tree)
    return out
