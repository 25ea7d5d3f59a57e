"""Made-up hospital stays: events drawn from a few courses of illness, and the summary a careful reader would write of them.

No patient's data are in here; the forms follow the event tables of hospital databases, as in arXiv:2402.11882.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, NamedTuple

KINDS = ("admission", "visit", "medication", "test", "procedure", "note", "discharge")
ASK = "Write the discharge summary of this hospital stay.\n\n"


class Course(NamedTuple):
    """An illness: two drugs; a test, its unit and the range of the first value; a procedure; what brings the patient in."""

    drugs: tuple[str, str]
    test: tuple[str, str, int, int]
    procedure: str
    sign: str


COURSES = {
    "pneumonia": Course(("ceftriaxone", "azithromycin"), ("CRP", "mg/L", 60, 240), "chest X-ray", "cough and fever"),
    "appendicitis": Course(("cefuroxime", "metronidazole"), ("leukocytes", "G/L", 11, 22), "appendectomy", "pain on the right"),
    "atrial fibrillation": Course(("bisoprolol", "apixaban"), ("heart rate", "/min", 110, 170), "cardioversion", "palpitations"),
    "hip fracture": Course(("enoxaparin", "paracetamol"), ("creatine kinase", "U/L", 300, 900), "hip replacement", "a fall"),
    "diabetic ketoacidosis": Course(("insulin", "potassium"), ("glucose", "mg/dL", 320, 680), "central line", "thirst and nausea"),
    "stroke": Course(("aspirin", "atorvastatin"), ("blood pressure", "mmHg", 150, 210), "head CT", "weakness of one arm"),
}


@dataclass(frozen=True)
class Event:
    """Something that happened: minutes after admission, one of `KINDS`, and words."""

    minute: int
    kind: str
    text: str


@dataclass(frozen=True)
class Stay:
    """One hospital stay.

    Args:
        header: age, sex, way of admission, diagnosis.
        events: in any order. summary: what is to be written. facts: phrases that a complete summary holds.
    """

    header: str
    events: tuple[Event, ...]
    summary: str
    facts: tuple[str, ...]


def rendered(stay: Stay, budget: int | None = None) -> str:
    """The stay as text: the header, then a line an event, by time and kind, same ones within a minute once.

    What was written after the discharge is left out: it would give the summary away. Over `budget` characters the oldest
    tests go first, then the oldest visits.
    """
    end = min((e.minute for e in stay.events if e.kind == "discharge"), default=None)
    seen = [e for e in stay.events if end is None or e.minute <= end]
    order = sorted(dict.fromkeys(seen), key=lambda e: (e.minute, KINDS.index(e.kind)))
    for kind in ("test", "visit"):
        while budget is not None and len(_text(stay, order)) > budget and any(e.kind == kind for e in order):
            order.remove(next(e for e in order if e.kind == kind))
    return _text(stay, order)


def _text(stay: Stay, events: list[Event]) -> str:
    return "\n".join([stay.header, *(line(e) for e in events)])


def line(event: Event) -> str:
    """[day d hh:mm] KIND: text"""
    day, rest = divmod(event.minute, 24 * 60)
    return f"[day {day + 1} {rest // 60:02}:{rest % 60:02}] {event.kind.upper()}: {event.text}"


def drawn(draw: random.Random) -> Stay:
    """A stay of two to six days."""
    name = draw.choice(list(COURSES))
    course, days, age = COURSES[name], draw.randint(2, 6), draw.randint(19, 93)
    sex, way = draw.choice(("woman", "man")), draw.choice(("emergency", "planned", "transferred"))
    what, unit, low, high = course.test
    first = draw.randint(low, high)
    last = round(first * draw.uniform(0.3, 0.8))
    doses = [draw.choice((1, 2, 5, 10, 40)) for _ in course.drugs]
    home = draw.choice(("home", "to rehabilitation", "to a nursing home"))
    events = [Event(0, "admission", f"{way} with {course.sign}"), Event(draw.randint(20, 90), "test", f"{what} {first} {unit}")]
    events += [
        Event(draw.randint(90, 400), "medication", f"{drug} {dose} mg started") for drug, dose in zip(course.drugs, doses, strict=True)
    ]
    events.append(Event(draw.randint(120, 1300), "procedure", course.procedure))
    for day in range(1, days):
        events.append(Event(day * 1440 + draw.randint(480, 600), "visit", draw.choice(("stable", "better", "slept badly", "eats well"))))
    events.append(Event((days - 1) * 1440 + draw.randint(0, 420), "test", f"{what} {last} {unit}"))
    events.append(Event((days - 1) * 1440 + draw.randint(660, 900), "discharge", home))
    facts = (
        f"{age}-year-old {sex}",
        name,
        course.procedure,
        " and ".join(course.drugs),
        f"{what} fell from {first} to {last} {unit}",
        f"after {days} days {home}",
    )
    summary = (
        f"A {facts[0]} was admitted with {course.sign}: {facts[1]}. Procedure: {facts[2]}. Treated with {facts[3]}; {facts[4]}. "
        f"Discharged {facts[5]}."
    )
    draw.shuffle(events)
    return Stay(f"{age} years, {sex}, {way}, {name}", tuple(events), summary, facts)


def worse(stay: Stay, draw: random.Random) -> str:
    """The summary with one fact left out or told wrongly."""
    parts = stay.summary.split(" ")
    if draw.random() < 0.5:
        at = draw.choice([i for i, word in enumerate(parts) if any(c.isdigit() for c in word)])
        number = "".join(c for c in parts[at] if c.isdigit())
        parts[at] = parts[at].replace(number, str(int(number) + draw.choice((1, 2, 10))))
        return " ".join(parts)
    sentences = stay.summary.split(". ")
    del sentences[draw.randrange(1, len(sentences))]
    return ". ".join(s.rstrip(".") for s in sentences) + "."


def stays(count: int = 600, seed: int = 0) -> list[dict[str, Any]]:
    """Rows for supervised training: messages, facts."""
    draw, rows = random.Random(seed), []
    for i in range(count):
        stay = drawn(draw)
        told = [{"role": "user", "content": ASK + rendered(stay)}, {"role": "assistant", "content": stay.summary}]
        rows.append({"messages": told, "facts": list(stay.facts), "use_case": stay.facts[1], "id": i})
    return rows


def pairs(count: int = 300, seed: int = 1) -> list[dict[str, Any]]:
    """Rows for preference training: the complete summary against one with a fault, of other stays than `stays` draws."""
    draw, rows = random.Random(f"pairs {seed}"), []
    for _ in range(count):
        stay = drawn(draw)
        rows.append({"prompt": ASK + rendered(stay), "chosen": stay.summary, "rejected": worse(stay, draw)})
    return rows
