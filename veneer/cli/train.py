"""`veneer train`: one run, from a recipe or from flags."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated, Any

from veneer.cli.command import Argument, Flag, Settings
from veneer.train.recipe import Recipe


def train(
    recipe: Annotated[Path | None, Argument("RECIPE.yaml", "a recipe; flags override what stands there")] = None,
    again: Annotated[bool, Flag("start anew, also if the run is finished or was interrupted")] = False,
    **settings: Annotated[Any, Settings(Recipe)],
) -> Any:
    """Adapt a model to data. The same command goes on with an interrupted run."""
    plan = plan_of(recipe, settings)
    from veneer.train.run import train as run

    outcome = run(plan, again=again, progress=True, command=typed("train", recipe, settings))
    if os.environ.get("RANK", "0") == "0":
        print(f"To use it: veneer predict {shlex.quote(str(outcome.folder))} INPUT …")
    return outcome.as_json()


def typed(command: str, recipe: Path | None, settings: dict[str, Any]) -> str:
    """The command that goes on with this run."""
    words = ["veneer", command, *([str(recipe)] if recipe else [])]
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool) and name != "head":
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            words += [f"--{flag}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return shlex.join(words)


def plan_of(recipe: Path | None, settings: dict[str, Any]) -> Recipe:
    """The recipe, with everything about it checked that needs no torch: settings, spec, model, data."""
    plan = Recipe.read(recipe, settings) if recipe else Recipe.of(settings)
    plan.check()
    return plan
