"""One run in a process of its own: `python -m veneer.study.worker request.json`. Started by `compare`, not by people.

The request holds `recipe` (its settings), `again`, `progress`, `command`, `said` (lines that earlier runs printed, which are
not printed again) and `result`, the file that the outcome and the lines go to.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from veneer.errors import VeneerError
from veneer.study.report import replace_text


def main(request_file: str) -> int:
    """Trains and writes the outcome, or the error that the caller can mend; gives the exit code."""
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    _end_with_parent()
    result = Path(request["result"])
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if line not in request["said"]:
            print(line, flush=True)

    try:
        from veneer.train.recipe import Recipe
        from veneer.train.run import train

        outcome = train(
            Recipe(**request["recipe"]), again=request["again"], progress=request["progress"], say=say, command=request["command"]
        )
    except VeneerError as error:
        replace_text(result, json.dumps({"outcome": {"error": str(error), "code": error.code}, "said": said}))
        return error.code
    except KeyboardInterrupt:
        return 130
    replace_text(result, json.dumps({"outcome": outcome.as_json(), "said": said}))
    return 0


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
