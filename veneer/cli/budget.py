"""`veneer budget`: every method with the hyper-parameters that land nearest to a number of trained parameters."""

from __future__ import annotations

from typing import Annotated, Any

from veneer import registry
from veneer.cli.command import Argument, Flag
from veneer.cli.output import table
from veneer.errors import BadValue, VeneerError
from veneer.spec import parse_spec


def budget(
    params: Annotated[str, Flag("How many parameters to train: 300k, 1.2M, 250000, or 0.05% of the model.", metavar="N")],
    model: Annotated[str, Flag("Folder or hub name; only its configuration is read where that suffices.")],
    methods: Annotated[list[str] | None, Argument("METHOD", "Methods, or specs whose hyper-parameters stay; all unless given.")] = None,
    targets: Annotated[str | None, Flag("Roles or module names, instead of each method's own.")] = None,
) -> Any:
    """Match methods by size: the hyper-parameters of each that land nearest to a number of trained parameters."""
    from veneer.train.recipe import check_model

    for spec in methods or ():
        parse_spec(spec)
    check_model(model)
    specs = list(methods or (c.slug for c in registry.methods() if c.family != "strategy"))
    from veneer import anatomy, assets
    from veneer.study.budget import Nearest, budget_of, nearest

    skeleton = anatomy.skeleton(assets.resolve(model))
    total = sum(p.numel() for p in skeleton.parameters())
    wanted = budget_of(params, total)
    sites = anatomy.sites(skeleton)
    heavy = _Heavy(skeleton, model)
    found: list[Nearest] = []
    for spec in specs:
        slug = parse_spec(spec)[0][0]
        try:
            base = heavy.model() if registry.load(slug).weighs else skeleton
            found.append(nearest(spec, sites, wanted, model=base, targets=targets))
        except VeneerError as error:
            found.append(Nearest(slug, wanted, why=str(error).splitlines()[0]))
    _refuse_if_all_larger(found, params, wanted)
    print(
        f"On {model} ({total:,} parameters): nearest to {wanted:,} trained ({100 * wanted / total:.2g} %); a task's own head comes on top\n"
    )
    table(("method", "spec", "trained", "off", ""), [_row(n) for n in found], right=(2, 3))
    return {"model": model, "total": total, "budget": wanted, "methods": [_document(n, total) for n in found]}


class _Heavy:
    """The model with its weights, loaded when first asked for; a failure is remembered, too."""

    def __init__(self, skeleton: Any, name: str) -> None:
        self.skeleton, self.name = skeleton, name
        self.loaded: Any = None
        self.error: VeneerError | None = None

    def model(self) -> Any:
        from veneer.cli.base import with_weights

        if self.error is not None:
            raise self.error
        if self.loaded is None:
            try:
                self.loaded = with_weights(self.skeleton, self.name)
            except VeneerError as error:
                self.error = error
                raise
        return self.loaded


def _refuse_if_all_larger(found: list[Any], params: str, wanted: int) -> None:
    counted = [n for n in found if n.trained is not None]
    least = min(counted, key=lambda n: n.trained, default=None)
    if least is not None and least.trained > 2 * wanted:
        raise BadValue(f"{params} is below the smallest of these: {least.spec} trains {least.trained:,}. Give more, or fewer targets.")


def _row(n: Any) -> tuple[Any, ...]:
    if n.trained is None:
        return n.slug, "–", "–", "–", n.why
    note = "" if n.within(2) else "the nearest it reaches"
    return n.slug, f'"{n.spec}"', f"{n.trained:,}", f"{100 * n.distance:+.1f} %", note


def _document(n: Any, total: int) -> dict[str, Any]:
    share = None if n.trained is None else n.trained / total
    return {"slug": n.slug, "spec": n.spec, "trained": n.trained, "distance": n.distance, "share": share, "why": n.why}
