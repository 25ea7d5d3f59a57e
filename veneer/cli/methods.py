"""`veneer methods` and `veneer show`: what there is, and one method in full."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from veneer import registry
from veneer.cli.command import Argument, Flag
from veneer.cli.output import table
from veneer.errors import BadFile, BadValue, nearest
from veneer.names import note

MATRIX = Path(registry.__file__).with_name("matrix.json")
"""Written by the conformance suite: {"features": […], "methods": {slug: {feature: true | false | "why it cannot be"}}}."""


def methods(
    family: Annotated[str | None, Flag("Only this family: weight, activation, prompt, selection or strategy.")] = None,
    matrix: Annotated[bool, Flag("Method × feature, as the conformance suite measured it.")] = False,
) -> Any:
    """List the methods."""
    found = registry.methods()
    if family is not None:
        families = sorted({c.family for c in found} | set(registry.FAMILIES))
        if family not in families:
            raise BadValue(f"There is no family {family!r}.{nearest(family, families)} Families: {', '.join(families)}.")
        found = [c for c in found if c.family == family]
    if matrix:
        return _matrix([c.slug for c in found])
    rows = [(c.slug, c.family, c.year, c.arxiv and f"arXiv:{c.arxiv}", f"{c.title}: {c.summary}") for c in found]
    table(("method", "family", "year", "source", "what it does"), rows)
    return {"methods": [_short(c) for c in found]}


def _short(card: registry.Card) -> dict[str, Any]:
    names = ("slug", "family", "title", "year", "arxiv", "summary")
    return {name: getattr(card, name) for name in names} | {"options": [o.name for o in card.options]}


def _matrix(slugs: list[str]) -> dict[str, Any]:
    if not MATRIX.exists():
        print("No table yet: the conformance suite writes it (pytest tests/conformance).")
        return {"features": [], "methods": {}}
    try:
        found = json.loads(MATRIX.read_text("utf-8"))
        features, cells = list(found["features"]), dict(found["methods"])
    except (ValueError, KeyError, TypeError) as error:
        raise BadFile(f"{MATRIX}: not the table that the conformance suite writes ({error}). Run the suite again.") from error
    cells = {slug: cells.get(slug, {}) for slug in slugs}
    marks = {True: "✓", False: "✗", None: "?"}
    rows = [[slug, *(marks.get(row.get(f), "–") for f in features)] for slug, row in cells.items()]
    table(("method", *features), rows)
    reasons = sorted({f"{slug}, {f}: {why}" for slug, row in cells.items() for f, why in row.items() if isinstance(why, str)})
    print("\n✓ holds   – cannot be, by the method's nature   ✗ fails   ? not measured")
    for reason in reasons:
        print(f"  – {reason}")
    return {"features": features, "methods": cells}


def show(
    method: Annotated[str, Argument("METHOD", "A method, or a spec such as 'lora(r=4)'.")],
    model: Annotated[str | None, Flag("Count its parameters on this model (folder or hub name).")] = None,
) -> Any:
    """Show one method: formula, tensors, hyper-parameters, and the count for a model."""
    from veneer.spec import parse_spec

    (slug, given), *more = parse_spec(method)
    if more:
        raise BadValue("`veneer show` explains one method; give them one by one. `veneer train` takes several joined by +.")
    if model is not None:
        from veneer.train.recipe import check_model

        check_model(model)
    card = registry.card(slug)
    source = ", ".join(str(part) for part in (card.year, card.arxiv and f"arXiv:{card.arxiv}") if part)
    print(f"{card.title} ({card.slug}, {card.family}){f' · {source}' if source else ''}\n{card.summary}\n")
    print(f"    {card.formula}\n\n{card.text}\n")
    if other_papers := note(card.slug, registry.cards()):
        print(f"{other_papers}\n")
    other = {o: [a for a, real in card.aliases.items() if real == o] for o in (x.name for x in card.options)}
    helps = {o.name: o.help + (f" (also: {', '.join(other[o.name])})" if other[o.name] else "") for o in card.options}
    table(("option", "default", "legal", "meaning"), [(o.name, _default(card, o, given), o.legal, helps[o.name]) for o in card.options])
    for feature, reason in card.limits.items():
        print(f"\nNo {feature}: {reason}")
    document: dict[str, Any] = {"card": card, "given": given}
    if model is not None:
        document["count"] = _count(method, model)
    return document


def _default(card: registry.Card, option: registry.Option, given: dict[str, Any]) -> str:
    if option.name in given:
        return f"{given[option.name]!r} (given)"
    return f"{card.targets!r}" if option.name == "targets" and option.default is None else repr(option.default)


def _count(spec: str, model: str) -> dict[str, Any]:
    """Trained parameters on a model; its weights are loaded only for methods whose count depends on them."""
    from veneer import anatomy, assets, attach
    from veneer.cli.base import with_weights
    from veneer.spec import parse

    base = anatomy.skeleton(assets.resolve(model))
    weighs = any(part.weighs for part in parse(spec).parts)
    if weighs:
        print("\nIts shapes depend on the weights, so the model is loaded to count.")
        base = with_weights(base, model)
    summary = attach(base, spec, head=False).summary()
    print(f"\non {model}: {summary}")
    counted = {"trained": summary.trained, "total": summary.total, "sites": summary.sites, "roles": summary.roles}
    return {"model": model, **counted, "weights_read": weighs}
