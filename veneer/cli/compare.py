"""`veneer compare`: several methods on the same data, one table and one report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from veneer.cli.command import Argument, Flag, Settings
from veneer.cli.train import plan_of, typed
from veneer.errors import BadValue
from veneer.spec import parse_spec
from veneer.train.recipe import Recipe


def compare(
    recipe: Annotated[Path | None, Argument("RECIPE.yaml", "a recipe; flags override what stands there")] = None,
    methods: Annotated[list[str] | None, Flag("method specs, each in quotes", metavar="SPEC")] = None,
    references: Annotated[list[str] | None, Flag("specs shown first, as what the others have to beat", metavar="SPEC")] = None,
    out: Annotated[Path, Flag("folder of the table, the report and the runs")] = Path("runs/compare"),
    again: Annotated[bool, Flag("train also what is finished")] = False,
    **settings: Annotated[Any, Settings(Recipe, without=("method", "out"))],
) -> Any:
    """Train several methods on the same data and show which one won."""
    specs = methods or []
    if not specs:
        raise BadValue("`veneer compare`: name the methods to compare: --methods 'lora(r=8)' ssf prefix-tuning")
    for spec in (*specs, *(references or ())):
        parse_spec(spec)
    plan = plan_of(recipe, {**settings, "method": specs[0]})
    from veneer.study.compare import compare as study

    found = study(
        plan,
        specs,
        out=out,
        title=f"{Path(plan.data).name} on {plan.model}",
        references=references or (),
        again=again,
        command=typed("compare", recipe, {"methods": specs, "references": references, "out": out, **settings}),
    )
    _show(found)
    return {**found.data, "folder": found.folder}


def _show(found: Any) -> None:
    from rich.console import Console

    Console().print(found.table())
    print(f"Report: {found.folder / 'report.html'}")
