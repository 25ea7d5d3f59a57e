"""The page of summaries: its server, and in a real browser what a person sees and clicks."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from veneer.tasks.preferences import Pairs
from veneer.tasks.stays import ASK
from veneer.web.summaries import app, linked, timeline

STAYS = [
    "40 years, man, planned, stroke\n[day 1 00:00] ADMISSION: planned with weakness\n"
    "[day 1 02:00] TEST: glucose 120 mg/dL\n[day 3 11:00] DISCHARGE: home",
    "50 years, woman, emergency, pneumonia\n[day 1 00:00] ADMISSION: emergency with cough\n"
    "[day 2 10:00] MEDICATION: ceftriaxone 2 mg started",
]
WRITTEN = "Admitted with weakness. Glucose was 120 mg/dL. Discharged home."
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def write(prompt: str) -> str:
    assert prompt.startswith(ASK)
    return WRITTEN


def test_lines_and_links() -> None:
    events = timeline(STAYS[0] + "\n\nfree words")
    assert [e["kind"] for e in events] == ["", "ADMISSION", "TEST", "DISCHARGE", ""]
    assert events[2] == {"when": "day 1 02:00", "kind": "TEST", "text": "glucose 120 mg/dL"}
    assert [s["events"] for s in linked(WRITTEN, events)] == [[1], [2], [3]]


def test_the_server_keeps_pairs_only_where_it_was_told_to(tmp_path: Path) -> None:
    file = tmp_path / "new" / "pairs.jsonl"
    client = TestClient(app(write, STAYS, file, "run"))
    page = client.get("/")
    assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
    assert client.get("/stays").json() == {"name": "run", "stays": STAYS, "keeps": True}
    assert client.post("/summary", json={"text": STAYS[0]}).json()["summary"] == WRITTEN
    for n in (1, 2):
        body = {"text": STAYS[0], "chosen": f"better {n}", "rejected": WRITTEN}
        assert client.post("/pairs", json=body).json() == {"kept": n}
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows[0] == {"prompt": ASK + STAYS[0], "chosen": "better 1", "rejected": WRITTEN}
    silent = TestClient(app(write, STAYS, None))
    assert silent.post("/pairs", json={"text": "x", "chosen": "a", "rejected": "b"}).status_code == 403


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/timeline", {"text": " "}, "no events"),
        ("/summary", {"text": "x" * 20_001}, "20,001 characters"),
        ("/pairs", {"text": "x", "chosen": "a", "rejected": " a"}, "Two different answers"),
        ("/pairs", {"text": "x", "chosen": "", "rejected": "a"}, "Two different answers"),
    ],
)
def test_what_it_refuses(path: str, body: dict[str, Any], said: str, tmp_path: Path) -> None:
    answer = TestClient(app(write, STAYS, tmp_path / "p.jsonl")).post(path, json=body)
    assert answer.status_code == 422 and said in answer.json()["detail"]
    assert not (tmp_path / "p.jsonl").exists()


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """The page on a port of its own."""
    import uvicorn

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app(write, STAYS, tmp_path / "pairs.jsonl", "my-run"), port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(5)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: apt-get install chromium")
def test_in_a_browser(address: str, tmp_path: Path) -> None:
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page()
        wrong: list[str] = []
        outside: list[str] = []
        page.on("console", lambda line: wrong.append(line.text) if line.type == "error" and "422" not in line.text else None)
        page.on("request", lambda request: None if request.url.startswith(address) else outside.append(request.url))
        page.goto(address)
        expect(page.locator("#name")).to_have_text("my-run")
        expect(page.locator("#timeline li")).to_have_count(4)
        page.select_option("#stay", index=1)
        expect(page.locator("#timeline li").nth(2)).to_contain_text("ceftriaxone 2 mg started")
        page.select_option("#stay", index=0)
        page.get_by_role("button", name="Write the summary").click()
        expect(page.locator("#summary")).to_contain_text(WRITTEN)
        page.locator(".sentence").nth(1).click()
        expect(page.locator("#timeline li.lit")).to_have_count(1)
        expect(page.locator("#timeline li.lit")).to_contain_text("glucose 120")
        page.get_by_role("button", name="Mine is better").click()
        expect(page.locator("#said")).to_contain_text("Two different answers")
        page.fill("#other", "A fuller summary.")
        page.get_by_role("button", name="Mine is better").click()
        expect(page.locator("#said")).to_have_text("Kept: 1 pair in the file.")
        page.fill("#events", "")
        page.get_by_role("button", name="Write the summary").click()
        expect(page.locator("#said")).to_contain_text("There are no events")
        browser.close()
    assert not wrong and not outside
    row = json.loads((tmp_path / "pairs.jsonl").read_text())
    assert row["chosen"] == "A fuller summary." and row["rejected"] == WRITTEN
    more = [{**row, "prompt": f"{row['prompt']} {i}"} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, more)))
    assert len(Pairs.read(str(tmp_path / "pairs.jsonl")).splits.train.rows) > 0  # the file is what `veneer prefer` reads
