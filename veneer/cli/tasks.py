"""`veneer tasks`: the kinds of problems, and what each alone has to be told."""

from __future__ import annotations

from typing import Annotated, Any

from veneer.cli.command import Argument
from veneer.cli.output import table
from veneer.tasks.task import TASKS, card


def tasks(task: Annotated[str | None, Argument("TASK", "show the settings of this one")] = None) -> Any:
    """List the kinds of problems `--task` takes, or one's own settings."""
    found = [card(name) for name in ([task] if task else TASKS)]
    if task is None:
        table(("task", "what it does"), [(c.slug, c.summary) for c in found])
        print("\nSettings that one task alone has stand in brackets: --task 'NAME(setting=value)'; `veneer tasks NAME` shows them.")
    elif found[0].options:
        print(found[0].summary)
        table(("setting", "default", "legal", "what it is"), [(o.name, repr(o.default), o.legal, o.help) for o in found[0].options])
    else:
        print(f"{found[0].summary}\nIt has no settings of its own.")
    return {"tasks": [{"name": c.slug, "summary": c.summary, "settings": {o.name: o.default for o in c.options}} for c in found]}
