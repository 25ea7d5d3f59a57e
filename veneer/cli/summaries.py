"""`veneer summaries`: a page on this machine that shows events and the summary a run writes of them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated, Any

from veneer.cli.command import Flag
from veneer.cli.use import Run, run_folder
from veneer.errors import BadValue, MissingExtra

HOST = "127.0.0.1"


def summaries(
    run: Run,
    pairs: Annotated[Path | None, Flag("file that the page's buttons add preference pairs to; without it nothing is kept")] = None,
    port: Annotated[int, Flag("on this machine's loopback address")] = 8765,
    count: Annotated[int, Flag("made-up stays to choose from")] = 5,
) -> Any:
    """Show a stay's events and the summary that a finished run writes of them, on a page of this machine."""
    if not 0 <= port <= 65535:
        raise BadValue(f"--port {port} must be between 0 and 65535.")
    try:
        import uvicorn
    except ModuleNotFoundError as error:
        raise MissingExtra("The page needs FastAPI and uvicorn: pip install 'veneer[serve]'") from error
    from veneer.tasks.stays import drawn, rendered
    from veneer.train.use import rebuild
    from veneer.web.summaries import app

    folder = run_folder(run)
    model, tokenizer, task = rebuild(folder)
    draw = random.Random("page")
    made = [rendered(drawn(draw)) for _ in range(count)]
    server = app(lambda prompt: task.predict(model, tokenizer, [prompt])[0]["text"], made, pairs, folder.name)
    print(f"http://{HOST}:{port} (Ctrl-C ends it)")
    uvicorn.run(server, host=HOST, port=port, log_level="warning")
    return {"folder": folder, "pairs": pairs}
