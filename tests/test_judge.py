"""The model as judge: fair to both places, open about what it could not read; a real server; and the synthetic networks."""

from __future__ import annotations

import collections
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from veneer.errors import BadValue
from veneer.study.judge import Item, Judgement, Verdict, compare, facts_found, judged, read, verdict
from veneer.study.judges import JudgeFailed, remote
from veneer.tasks.task import Options, prepare
from veneer.tasks.telecom import USE_CASES, samples


def reply(which: str, a: int = 7, b: int = 5) -> str:
    return f'Because.\n{{"verdict": "{which}", "instruction_following": [{a}, {b}], "quality": [{a}, {b}]}}'


def item(case: str, first: str, second: str) -> Item:
    return Item(case, "q?", "r", first, second)


def better(prompt: str) -> str:
    """A judge that likes the word "right", wherever it stands."""
    a, b = prompt.split("Answer A:\n")[1].split("\n\nAnswer B:\n")
    b = b.split("\n\nWrite one")[0]
    if ("right" in a) == ("right" in b):
        return reply("tie", 5, 5)
    return reply("A", 9, 2) if "right" in a else reply("B", 2, 9)


def final(judge: Any, items: list[Item], **options: Any) -> Verdict:
    *made, last = compare(judge, items, "tests", **options)
    assert len(made) == len(items) and all(isinstance(one, Judgement) for one in made) and isinstance(last, Verdict)
    return last


def test_swapping_the_answers_swaps_the_verdict() -> None:
    one, other = judged(better, item("x", "right", "wrong"), "tests"), judged(better, item("x", "wrong", "right"), "tests")
    assert one.wins == (1, 1) and other.wins == (0, 0)
    assert one.marks[0] == one.marks[1] == {"instruction_following": (9, 2), "quality": (9, 2)}
    assert judged(better, item("x", "wrong", "wrong"), "tests").wins == (0.5, 0.5)


def test_a_judge_of_places_gives_exactly_half() -> None:
    found = final(lambda prompt: reply("A"), [item("x", "a", "b"), item("y", "c", "d")])
    assert found.overall.value == 0.5 and found.wins["x"].value == 0.5 and found.first_place == 1.0


def test_what_cannot_be_read_is_asked_again_then_counted() -> None:
    asked: list[str] = []

    def rude(prompt: str) -> str:
        asked.append(prompt)
        return "No." if len(asked) % 2 else reply("tie")

    found = final(rude, [item("x", "a", "b")], repeat=0)
    assert len(asked) == 4 and found.missing == 0 and found.overall.value == 0.5
    found = final(lambda prompt: "no idea", [item("x", "a", "b"), item("y", "c", "d")], repeat=0)
    assert (found.missing, found.asked, found.overall.n) == (4, 4, 0)


def test_shares_are_put_together_by_use_case() -> None:
    items = [item("x", "right", "wrong"), item("x", "wrong", "right"), item("x", "right", "wrong"), item("y", "wrong wrong", "wrong")]
    found = final(better, items, repeat=1.0)
    assert found.wins["x"].value == pytest.approx(2 / 3) and found.wins["y"].value == 0.5
    assert found.overall.value == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert found.marks["quality"] == (pytest.approx((9 + 2 + 9 + 5) / 4), pytest.approx((2 + 9 + 2 + 5) / 4))
    assert found.words == (1.25, 1.0) and found.agreement == 1.0
    assert found.overall.low <= found.overall.value <= found.overall.high


def test_an_item_of_one_readable_order_is_no_win_but_is_told() -> None:
    half = Judgement(item("x", "a", "b"), (1.0, None), ({"instruction_following": (8, 2), "quality": (8, 2)}, None))
    found = verdict([half])
    assert found.overall.n == 0 and found.missing == 1 and found.marks["quality"] == (8, 2)


@pytest.mark.parametrize(
    "text",
    ["", "A", '{"verdict": "A"}', reply("C"), reply("A", 11, 1), '{"verdict": "A", "instruction_following": 3, "quality": [1, 2]}', "{}"],
)
def test_replies_that_say_nothing(text: str) -> None:
    assert read(text) is None


def test_the_last_document_of_a_reply_counts() -> None:
    assert read(reply("A") + "\nNo, wait.\n" + reply("B", 2, 8)) == ("b", {"instruction_following": (2, 8), "quality": (2, 8)})


def test_nothing_to_judge() -> None:
    with pytest.raises(BadValue, match="nothing to judge"):
        list(compare(better, [], "tests"))


def test_facts() -> None:
    assert facts_found("The NEXT hop\nis Fir, cost 31.", ["next hop is fir", "31", "32"]) == pytest.approx(2 / 3)


# -- a server -----------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An address that speaks the chat protocol and judges by the word "right"."""
    seen: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append({"path": self.path, **body})
            text = better(body["messages"][-1]["content"])
            answer = {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
                "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
            }
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    made = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{made.server_port}/v1", seen
    made.shutdown()


def test_a_judge_behind_an_address(server: tuple[str, list[dict[str, Any]]]) -> None:
    address, seen = server
    found = final(remote(address, "big-judge"), [item("x", "right", "wrong")], repeat=0)
    assert found.overall.value == 1.0 and len(seen) == 2
    assert seen[0]["path"] == "/v1/chat/completions" and seen[0]["model"] == "big-judge" and seen[0]["temperature"] == 0


def test_an_address_without_a_judge() -> None:
    with pytest.raises(JudgeFailed, match=r"127\.0\.0\.1:9"):
        remote("http://127.0.0.1:9/v1", "m", timeout=2)("hello")


# -- networks -----------------------------------------------------------------------------------------------------


def test_the_networks_are_balanced_unique_and_the_same_every_time() -> None:
    rows = samples(40, seed=3)
    assert collections.Counter(row["use_case"] for row in rows) == dict.fromkeys(USE_CASES, 40)
    assert len({row["id"] for row in rows}) == len(rows) == len({row["messages"][1]["content"] for row in rows})
    assert json.dumps(rows) == json.dumps(samples(40, seed=3)) != json.dumps(samples(40, seed=4))
    for row in rows:
        assert facts_found(row["messages"][2]["content"], row["facts"]) == 1.0


def test_no_scenario_is_shared_by_splits() -> None:
    task, _ = prepare("telecom", None, Options())
    parts = [{row["scenario"] for row in table.rows} for _, table in task.splits.items()]
    assert all(parts) and not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]


def test_a_use_case_that_is_exhausted_says_so() -> None:
    with pytest.raises(BadValue, match="'coin' has about 2 scenarios"):
        samples(5, use_cases={"coin": lambda draw: ([f"{draw.randrange(2)}?"], "yes", [])})
