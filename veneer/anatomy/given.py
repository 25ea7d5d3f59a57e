"""Roles that the user names, to add or to correct."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from veneer.errors import NoMatch, UnknownName, nearest
from veneer.site import ROLES, Site


class Given:
    """Name → role, and which of the names the model has."""

    def __init__(self, roles: Mapping[str, str]) -> None:
        for key, wanted in roles.items():
            for role in wanted.split() or [wanted]:
                if role not in ROLES:
                    raise UnknownName(
                        f"roles: {role!r}, given for {key!r}, is no role.{nearest(role, ROLES) or ' Roles: ' + ', '.join(ROLES) + '.'}"
                    )
        self.roles = {key: tuple(wanted.split()) for key, wanted in roles.items()}
        self.unused = set(roles)

    def wanted(self, *called: str, most: int | None = None) -> tuple[str, ...]:
        """The first roles given for something of these names, () when there are none; more than `most` do not count."""
        for key, roles in self.roles.items():
            if (most is None or len(roles) <= most) and any(_names(key, name) for name in called):
                self.unused.discard(key)
                return roles
        return ()

    def refuse_unused(self, found: Sequence[Site]) -> None:
        """Raises NoMatch for a name that no layer of the model has."""
        for key in self.roles:
            if key in self.unused:
                known = {s.name for s in found} | {s.name.rsplit(".", 1)[-1] for s in found}
                raise NoMatch(f"roles: {key!r} names no layer of the model.{nearest(key, known)}")


def _names(key: str, name: str) -> bool:
    if name == key or name.endswith("." + key):
        return True
    try:
        return re.fullmatch(key, name) is not None
    except re.error:
        return False
