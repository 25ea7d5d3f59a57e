"""One page: the events of a stay on the left, the summary a finished run writes of them on the right, each sentence with the events
it speaks of; and two buttons that add a pair to a file for the next round of preference training (after arXiv:2402.11882)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from veneer.errors import MissingExtra
from veneer.tasks.stays import ASK

PAGE = Path(__file__).with_name("summaries.html")
LINE = re.compile(r"^\[(?P<when>[^\]]+)\] (?P<kind>[A-Z]+): (?P<text>.*)$")
LONGEST = 20_000
"""Characters of pasted events that are taken."""

SMALL = {"with", "from", "after", "this", "that", "were", "was", "and", "the", "days", "started", "discharged", "treated", "admitted"}
"""Words that link nothing."""

Write = Callable[[str], str]


def timeline(text: str) -> list[dict[str, str]]:
    """The lines of a stay: `when`, `kind` and `text` of an event; a header or free line has only `text`."""
    found = []
    for line in text.strip().splitlines():
        event = LINE.match(line.strip())
        found.append(event.groupdict() if event else {"when": "", "kind": "", "text": line.strip()})
    return [event for event in found if event["text"]]


def linked(summary: str, events: list[dict[str, str]]) -> list[dict[str, Any]]:
    """The summary's sentences, each with the numbers of the events that share a telling word or number with it."""
    sentences = [s for s in re.split(r"(?<=[.!?;])\s+", summary.strip()) if s]
    told = [_words(event["text"]) for event in events]
    return [{"text": s, "events": [i for i, words in enumerate(told) if words & _words(s)]} for s in sentences]


def _words(text: str) -> set[str]:
    return {w for w in re.findall(r"[^\W_]+", text.lower()) if (len(w) > 3 or w.isdigit()) and w not in SMALL}


def app(write: Write, stays: list[str], pairs: Path | None, name: str = "") -> Any:
    """The page's server (FastAPI).

    Args:
        write: the prompt → a summary.
        stays: rendered stays to choose from.
        pairs: file that the buttons add to; None: there are no buttons.
        name: of the run, for the page's head.

    Raises:
        MissingExtra: FastAPI is not installed.
    """
    try:
        from fastapi import Body, FastAPI, HTTPException
        from fastapi.responses import HTMLResponse
    except ModuleNotFoundError as error:
        raise MissingExtra("The page needs FastAPI and uvicorn: pip install 'veneer[serve]'") from error
    made = FastAPI(title="veneer: summaries", docs_url=None, redoc_url=None, openapi_url=None)
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'"

    @made.get("/", response_class=HTMLResponse)
    def page() -> Any:
        return HTMLResponse(PAGE.read_text("utf-8"), headers={"Content-Security-Policy": policy})

    @made.get("/stays")
    def listed() -> dict[str, Any]:
        return {"name": name, "stays": stays, "keeps": pairs is not None}

    @made.post("/timeline")
    def shown(text: str = Body(embed=True)) -> dict[str, Any]:
        return {"events": timeline(_taken(text))}

    @made.post("/summary")
    def summary(text: str = Body(embed=True)) -> dict[str, Any]:
        found = write(ASK + _taken(text))
        return {"summary": found, "sentences": linked(found, timeline(text))}

    @made.post("/pairs")
    def keep(text: str = Body(embed=True), chosen: str = Body(embed=True), rejected: str = Body(embed=True)) -> dict[str, Any]:
        if pairs is None:
            raise HTTPException(403, "This page keeps nothing: it was started without --pairs.")
        if not chosen.strip() or not rejected.strip() or chosen.strip() == rejected.strip():
            raise HTTPException(422, "Two different answers are needed: write one again, or change it.")
        row = {"prompt": ASK + _taken(text), "chosen": chosen.strip(), "rejected": rejected.strip()}
        pairs.parent.mkdir(parents=True, exist_ok=True)
        with pairs.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return {"kept": sum(1 for _ in pairs.open(encoding="utf-8"))}

    def _taken(text: str) -> str:
        if not text.strip():
            raise HTTPException(422, "There are no events: choose a stay or paste some.")
        if len(text) > LONGEST:
            raise HTTPException(422, f"The events are {len(text):,} characters; at most {LONGEST:,} are taken.")
        return text.strip()

    return made
