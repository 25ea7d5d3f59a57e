"""Hyper-parameters of methods: a default with its legal range, readable without importing torch."""

from __future__ import annotations

import dataclasses
from typing import Any

from veneer.errors import BadValue


def option(
    default: Any,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: tuple | None = None,
) -> Any:
    """A dataclass field with its legal range.

    Arguments must be literals, so that the registry can read them from the source without running it.
    """
    limits = {k: v for k, v in {"ge": ge, "gt": gt, "le": le, "lt": lt, "choices": choices}.items() if v is not None}
    return dataclasses.field(default=default, metadata={"help": help, **limits})


_SIGNS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


def check(who: str, name: str, value: Any, default: Any, limits: dict[str, Any], annotation: str = "") -> None:
    """Raises `BadValue` in one sentence if `value` is of the wrong type or outside its limits."""
    if value is None:
        if default is None or "None" in annotation:
            return
        raise BadValue(f"{who}: {name}=None is not allowed; the default is {default!r}.")
    choices = limits.get("choices")
    if choices is not None:
        if value not in choices:
            raise BadValue(f"{who}: {name}={value!r} is not one of {', '.join(repr(c) for c in choices)}.")
        return
    parts = [part.strip() for part in annotation.split("|")]
    kinds, several = [k for k in _TYPES if k in parts], [k for k in _TYPES if f"tuple[{k}, ...]" in parts]
    if several and isinstance(value, tuple):
        if not value and default != ():
            raise BadValue(f"{who}: {name}=() is empty; the default is {default!r}.")
        for one in value:  # each within the same limits
            check(who, name, one, default, limits, " | ".join(several))
        return
    if kinds and not any(_is(value, kind) for kind in kinds):
        said = [("an " if kind == "int" else "a ") + kind for kind in kinds] + [f"a tuple of {kind}s" for kind in several]
        raise BadValue(f"{who}: {name}={value!r} must be {' or '.join(said)}; the default is {default!r}.")
    if isinstance(value, int | float) and not isinstance(value, bool):
        bad = value != value or any(
            not {"ge": value >= v, "gt": value > v, "le": value <= v, "lt": value < v}[k]
            for k, v in limits.items() if k in _SIGNS
        )  # fmt: skip
        if bad:
            legal = " and ".join(f"{_SIGNS[k]} {v}" for k, v in limits.items() if k in _SIGNS)
            raise BadValue(f"{who}: {name}={value!r} is out of range; it must be {legal or 'a number'}.")


_TYPES: dict[str, Any] = {"bool": bool, "int": int, "float": (int, float), "str": str}


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, _TYPES[kind]) and (kind == "bool" or not isinstance(value, bool))
