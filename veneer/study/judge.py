"""A model as judge: every answer against another one's, in both orders, told by use case (the protocol of arXiv:2305.14314's
evaluation, over domains as in arXiv:2505.07877).

A judge is any function from a prompt to a text. It is asked for its reasons first and then one line of JSON; what cannot be read
is asked once more and then counted as missing, never dropped silently.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from veneer.errors import BadValue
from veneer.tasks.metric import Metric, bootstrap

Judge = Callable[[str], str]

PROMPT = """Two assistants answered a question about {domain}. Judge which answer is better: correct facts first, then whether it does
what was asked, then clarity. Longer is not better. Do not let the order decide.

Question:
{question}

Reference answer:
{reference}

Answer A:
{a}

Answer B:
{b}

Write one sentence of reasons. Then write one line of JSON and nothing after it:
{{"verdict": "A" or "B" or "tie", "instruction_following": [A's mark 1-10, B's mark 1-10], "quality": [A's mark 1-10, B's mark 1-10]}}"""

MARKS = ("instruction_following", "quality")


@dataclass(frozen=True)
class Item:
    """One question with two answers. `first` is the one on trial, `second` what it is measured against."""

    use_case: str
    question: str
    reference: str
    first: str
    second: str


@dataclass(frozen=True)
class Judgement:
    """What a judge said of one item in both orders; None where an order could not be read.

    Args:
        wins: of the answer on trial: 1, ½ for a tie, 0, for each order.
        marks: instruction following and quality of (first, second), for each order.
    """

    item: Item
    wins: tuple[float | None, float | None]
    marks: tuple[dict[str, tuple[float, float]] | None, dict[str, tuple[float, float]] | None]

    @property
    def win(self) -> float | None:
        """The mean over both orders; None if one is missing, which would leave the judge's liking for a place in it."""
        a, b = self.wins
        return None if a is None or b is None else (a + b) / 2


def read(text: str) -> tuple[str, dict[str, tuple[float, float]]] | None:
    """Verdict and marks of a judge's reply: the last JSON object of it that has both. None if there is none."""
    for found in reversed(re.findall(r"\{[^{}]*\}", text)):
        try:
            said = json.loads(found)
            verdict = str(said["verdict"]).strip().lower()
            marks = {name: (float(said[name][0]), float(said[name][1])) for name in MARKS}
        except (ValueError, KeyError, TypeError, IndexError):
            continue
        if verdict in ("a", "b", "tie") and all(1 <= mark <= 10 for pair in marks.values() for mark in pair):
            return verdict, marks
    return None


def judged(judge: Judge, item: Item, domain: str) -> Judgement:
    """One item in both orders; an unreadable reply is asked for once more."""
    wins: list[float | None] = []
    marks: list[dict[str, tuple[float, float]] | None] = []
    for swapped in (False, True):
        a, b = (item.second, item.first) if swapped else (item.first, item.second)
        prompt = PROMPT.format(domain=domain, question=item.question, reference=item.reference, a=a, b=b)
        found = read(judge(prompt)) or read(judge(prompt))
        if found is None:
            wins.append(None)
            marks.append(None)
            continue
        verdict, given = found
        wins.append(0.5 if verdict == "tie" else float((verdict == "a") is not swapped))
        marks.append({name: (y, x) if swapped else (x, y) for name, (x, y) in given.items()})
    return Judgement(item, (wins[0], wins[1]), (marks[0], marks[1]))


@dataclass
class Verdict:
    """All judgements put together.

    Args:
        wins: use case → share that the answer on trial wins, ties half; bootstrap over items.
        overall: the unweighted mean over use cases, resampled within each.
        marks: mark → means of (first, second) over all orders that could be read.
        missing: replies that could not be read, of `asked`. first_place: share of readable orders in which place A won.
        words: mean length of both sides' answers in words. agreement: of repeated judgements, how many agree (None: none repeated).
    """

    wins: dict[str, Metric]
    overall: Metric
    marks: dict[str, tuple[float, float]]
    missing: int
    asked: int
    first_place: float
    words: tuple[float, float]
    agreement: float | None = None
    judgements: list[Judgement] = field(default_factory=list, repr=False)


def compare(judge: Judge, items: Sequence[Item], domain: str, repeat: float = 0.05, seed: int = 0) -> Iterator[Judgement | Verdict]:
    """Gives every judgement as it is made, for progress, and at the end the `Verdict`.

    Args:
        repeat: share of the items that are judged a second time, for the judge's agreement with itself.

    Raises:
        BadValue: no items, or an answer on either side that is empty everywhere.
    """
    if not items:
        raise BadValue("There is nothing to judge: no questions were given.")
    made = []
    for item in items:
        made.append(judged(judge, item, domain))
        yield made[-1]
    again = random.Random(seed).sample(range(len(items)), math.ceil(repeat * len(items))) if repeat > 0 else []
    same = [judged(judge, items[i], domain).wins == made[i].wins for i in again]
    yield verdict(made, sum(same) / len(same) if same else None)


def verdict(made: list[Judgement], agreement: float | None = None) -> Verdict:
    """Shares of wins by use case and over all, marks, and what is to be known of the judge."""
    cases: dict[str, list[float]] = {}
    for one in made:
        cases.setdefault(one.item.use_case, [])
        if one.win is not None:
            cases[one.item.use_case].append(one.win)
    read_orders = [(win, swapped) for one in made for swapped, win in enumerate(one.wins) if win is not None]
    place = [win if not swapped else 1 - win for win, swapped in read_orders]
    marks = {name: tuple(_mean([m[name][side] for one in made for m in one.marks if m is not None]) for side in (0, 1)) for name in MARKS}
    return Verdict(
        wins={name: bootstrap(lambda rows: float(rows.mean()), wins) for name, wins in cases.items()},
        overall=_overall([wins for wins in cases.values() if wins]),
        marks=marks,  # type: ignore[arg-type]
        missing=2 * len(made) - len(read_orders),
        asked=2 * len(made),
        first_place=_mean(place),
        words=(_mean([len(o.item.first.split()) for o in made]), _mean([len(o.item.second.split()) for o in made])),
        agreement=agreement,
        judgements=made,
    )


def _overall(cases: list[list[float]], resamples: int = 1000) -> Metric:
    """The mean of the use cases' means, its interval from resampling items within each."""
    n = sum(map(len, cases))
    if not n:
        return Metric(math.nan, 0.0, 1.0, 0)
    draw = random.Random(0)
    found = sorted(_mean([_mean(draw.choices(wins, k=len(wins))) for wins in cases]) for _ in range(resamples))
    return Metric(_mean([_mean(wins) for wins in cases]), found[int(0.025 * resamples)], found[int(0.975 * resamples) - 1], n)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def facts_found(answer: str, facts: Sequence[str]) -> float:
    """Share of the facts that stand in the answer, whatever their case: what can be measured without a judge."""
    told: Any = " ".join(answer.lower().split())
    return sum(" ".join(fact.lower().split()) in told for fact in facts) / len(facts) if facts else math.nan
