"""`veneer prefer`: preference training (DPO and its relatives) of a finished run's adapter or of a fresh one."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

from veneer.cli.command import Argument, Settings
from veneer.cli.use import run_folder
from veneer.train.prefer import Preference, PreferenceRun


def prefer(
    run: Annotated[Path | None, Argument("RUN", "a finished run whose adapter goes on; its copy is the reference")] = None,
    **settings: Annotated[Any, Settings(Preference)],
) -> Any:
    """Train on pairs of better and worse answers (DPO), any method. The same command goes on with an interrupted run."""
    made = PreferenceRun(Preference.of(settings), run_folder(run) if run else None)
    found = made.go()
    print(f"To use it: veneer predict {shlex.quote(str(made.folder))} INPUT …")
    return {"folder": made.folder, **found}
