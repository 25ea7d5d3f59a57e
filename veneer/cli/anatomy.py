"""`veneer anatomy MODEL`: the roles that methods can act on, found without loading the weights."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

from veneer.cli.command import Argument, Flag
from veneer.errors import BadValue, nearest
from veneer.site import ROLES


def anatomy(
    model: Annotated[str, Argument("MODEL", "a model folder, a hub name, or a short name such as minilm")],
    role: Annotated[list[str] | None, Flag("add or correct roles", metavar="MODULE=ROLE")] = None,
) -> Any:
    """Print a model's tree of roles with shapes."""
    from veneer.train.recipe import check_model

    roles = roles_of(role or [])
    check_model(model)
    from veneer import anatomy, assets

    skeleton = anatomy.skeleton(assets.resolve(model))
    sites = anatomy.sites(skeleton, roles)
    counts = Counter(s.role for s in sites)
    print(anatomy.layout(skeleton, roles))
    print("\n" + ", ".join(f"{n}× {role}" for role, n in counts.items()))
    return {"model": model, "roles": counts, "sites": sites}


def roles_of(pairs: list[str]) -> dict[str, str]:
    """Module (or regular expression) → role, from MODULE=ROLE. Raises `BadValue` with the nearest roles."""
    found = {}
    for pair in pairs:
        module, mark, role = pair.rpartition("=")
        if not mark or not module:
            raise BadValue(f"--role {pair!r}: write MODULE=ROLE, such as encoder.proj=attn.o.")
        wrong = next((r for r in role.split() if r not in ROLES), None)
        if wrong is not None:
            raise BadValue(f"--role {pair!r}: there is no role {wrong!r}.{nearest(wrong, ROLES) or ' Roles: ' + ', '.join(ROLES) + '.'}")
        found[module] = role
    return found
