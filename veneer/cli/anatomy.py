"""`veneer anatomy MODEL`: the roles that methods can act on, found without loading the weights."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

from veneer.cli.command import Argument, Flag
from veneer.cli.output import table
from veneer.errors import BadValue, nearest
from veneer.site import ROLES

if TYPE_CHECKING:
    from veneer.site import Site


def anatomy(
    model: Annotated[str, Argument("MODEL", "a model folder, a hub name, or a short name such as minilm")],
    role: Annotated[list[str], Flag("add or correct roles", metavar="MODULE=ROLE")] = [],  # noqa: B006  (never changed)
    all: Annotated[bool, Flag("every block in full, also where it is built like the one before it")] = False,
) -> Any:
    """Print a model's tree of roles with shapes."""
    roles = roles_of(role)
    from veneer import anatomy, assets

    sites = anatomy.sites(anatomy.skeleton(assets.resolve(model)), roles or None)
    for title, members in _groups(sites, all):
        print(f"\n{title}")
        table(("role", "kind", "[out, in]", "name"), [(s.role, _kind(s), _shape(s), s.name) for s in members])
    counts = Counter(s.role for s in sites)
    print("\n" + ", ".join(f"{n}× {role}" for role, n in counts.items()))
    return {"model": model, "roles": counts, "sites": sites}


def roles_of(pairs: list[str]) -> dict[str, str]:
    """Module (or regular expression) → role, from MODULE=ROLE. Raises `BadValue` with the nearest roles."""
    found = {}
    for pair in pairs:
        module, mark, role = pair.rpartition("=")
        if not mark or not module:
            raise BadValue(f"--role {pair!r}: write MODULE=ROLE, such as encoder.proj=attn.o.")
        if role not in ROLES:
            raise BadValue(f"--role {pair!r}: there is no role {role!r}.{nearest(role, ROLES)} Roles: {', '.join(ROLES)}.")
        found[module] = role
    return found


def _groups(sites: list[Site], full: bool) -> list[tuple[str, list[Site]]]:
    """Sites by block; neighbouring blocks that are built alike stand once."""
    blocks: dict[int | None, list[Site]] = {}
    for site in sites:
        blocks.setdefault(site.depth, []).append(site)
    found: list[tuple[list[int], list[Site]]] = []
    for depth in sorted(d for d in blocks if d is not None):
        members = blocks[depth]
        if found and not full and _build(found[-1][1]) == _build(members):
            found[-1][0].append(depth)
        else:
            found.append(([depth], members))
    outside = [("outside blocks", blocks[None])] if None in blocks else []
    return [*outside, *((f"block {d[0]}" if len(d) == 1 else f"blocks {d[0]}–{d[-1]}, alike", members) for d, members in found)]


def _build(members: list[Site]) -> list[tuple[Any, ...]]:
    return [(s.role, s.kind, s.out_features, s.in_features, s.rows, s.count) for s in members]


def _kind(site: Site) -> str:
    rows = f", rows {site.rows[0]}–{site.rows[1] - 1}" if site.rows else ""
    return f"{site.count}× {site.kind}" if site.count else site.kind + rows


def _shape(site: Site) -> str:
    return f"[{site.out_features}, {site.in_features}]"
