"""A model's roles as text, to read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from veneer.anatomy.sites import sites
from veneer.anatomy.tree import plain_class
from veneer.site import Site


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
    notes += [
        word
        for word, said in (
            ("causal", site.causal and site.kind == "attention"),
            ("post", site.post),
            ("trained with the task", site.trainable_head),
        )
        if said
    ]
    if site.kind in ("branch", "attention"):
        notes.insert(0, "sub-layer" if site.kind == "branch" else "attention")
    return f"{'  ' * level}{site.role:<15} {shape:<16} {name}{'  (' + '; '.join(notes) + ')' if notes else ''}"
