"""One run in a process of its own: `python -m veneer.study.worker request.json`. Started by `compare`, not by people.

The request holds `recipe` (its fields), `again`, `progress` and `result`, the file that the outcome goes to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from veneer.errors import VeneerError
from veneer.study.report import replace_text


def main(request_file: str) -> int:
    """Trains and writes the outcome, or the error that the caller can mend; gives the exit code."""
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    _end_with_parent()
    result = Path(request["result"])
    try:
        from veneer.train.recipe import Recipe
        from veneer.train.run import train

        outcome = train(Recipe(**request["recipe"]), again=request["again"], progress=request["progress"])
    except VeneerError as error:
        replace_text(result, json.dumps({"error": str(error), "code": error.code}))
        return error.code
    except KeyboardInterrupt:
        return 130
    replace_text(result, json.dumps(plain(outcome)))
    return 0


def plain(value: Any) -> Any:
    """Dataclasses, paths and tuples as JSON has them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value.item() if hasattr(value, "item") else value


def _end_with_parent() -> None:
    """Interrupts this process, which saves its state, when the one that started it is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        with contextlib.suppress(ProcessLookupError):
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
