"""`veneer judge`: a run's answers against the untouched base's or another run's, judged by a model and by the facts they hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from veneer.cli.command import Flag
from veneer.cli.output import table
from veneer.cli.use import Run, run_folder
from veneer.errors import BadValue
from veneer.study.judge import Item, Verdict, compare, facts_found
from veneer.train.outcome import read_run

FILE = "judged.json"


def judge(
    run: Run,
    by: Annotated[str | None, Flag("the judge: http(s)://…/v1, a model folder, or a hub name; none: only facts are counted")] = None,
    judge_model: Annotated[str, Flag("name of the model at a remote judge")] = "default",
    against: Annotated[Path | None, Flag("another finished run on the same data; the untouched base if not given")] = None,
    rows: Annotated[int | None, Flag("at most so many test rows, evenly over the use cases")] = None,
    group: Annotated[str, Flag("column of the use case")] = "use_case",
    facts: Annotated[str, Flag("column with a list of words that a right answer holds")] = "facts",
    domain: Annotated[str, Flag("what the questions are about, for the judge")] = "a technical domain",
    repeat: Annotated[float, Flag("share of the questions that are judged twice")] = 0.05,
) -> Any:
    """Compare a run's answers with the untouched base's or another run's: by a judge, and by the facts they hold."""
    folder = run_folder(run)
    other = run_folder(against) if against else None
    if rows is not None and rows < 1:
        raise BadValue(f"--rows {rows} must be at least 1.")
    if not 0 <= repeat <= 1:
        raise BadValue(f"--repeat {repeat} must be between 0 and 1.")
    told, texts = _answers(folder, other, rows, group)
    sides = ("this run", other.name if other else "untouched base")
    found: dict[str, Any] = {"rows": len(told), "sides": sides, "facts": _facts(told, texts, facts, group, sides)}
    if by is not None:
        items = [Item(str(r.get(group, "all")), *_asked(r), *pair) for r, pair in zip(told, zip(*texts))]
        found["verdict"] = _judged(by, judge_model, items, domain, repeat, sides)
    from veneer.store import write_text

    record = [{"use_case": r.get(group), "question": _asked(r)[0], sides[0]: a, sides[1]: b} for r, a, b in zip(told, *texts)]
    write_text(folder / FILE, json.dumps({**found, "answers": record}, indent=1, default=vars, ensure_ascii=False) + "\n")
    print(f"All answers: {folder / FILE}")
    return found


def _answers(folder: Path, other: Path | None, rows: int | None, group: str) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """The test rows and both sides' answers to them."""
    import veneer
    from veneer.tasks.task import prepare
    from veneer.train.recipe import Recipe
    from veneer.train.use import rebuild

    kept = read_run(folder)
    recipe = Recipe.of(kept["recipe"])
    if kept["task"]["name"] != "chat":
        raise BadValue(f"{folder}: its task is {kept['task']['name']}; only answers of the task chat are judged.")
    task: Any = prepare(recipe.data, recipe.task or "chat", recipe.options)[0]
    told = _evenly(task.splits.test.rows, rows, group)
    asked = [task.messages(row)[:-1] for row in told]
    model, processor, task = rebuild(folder)
    texts = [[a["text"] for a in task.predict(model, processor, asked)]]
    if other is None:
        with veneer.of(model).disabled():
            texts.append([a["text"] for a in task.predict(model, processor, asked)])
    else:
        del model
        texts.append([a["text"] for a in task.predict(*rebuild(other)[:2], asked)])
    for row in told:
        row["messages"] = task.messages(row)
    return told, texts


def _evenly(rows: list[dict[str, Any]], most: int | None, group: str) -> list[dict[str, Any]]:
    """At most so many rows, in turn from every use case."""
    cases: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault(row.get(group), []).append(dict(row))
    turns = [row for i in range(max(map(len, cases.values()), default=0)) for case in cases.values() for row in case[i : i + 1]]
    return turns[:most]


def _asked(row: dict[str, Any]) -> tuple[str, str]:
    """The last question and the reference answer."""
    messages = row["messages"]
    return messages[-2]["content"], messages[-1]["content"]


def _facts(told: list[dict[str, Any]], texts: list[list[str]], column: str, group: str, sides: tuple[str, str]) -> dict[str, Any]:
    """Share of the facts in the answers, by use case; {} where the rows name none."""
    if not any(row.get(column) for row in told):
        return {}
    cases: dict[str, list[list[float]]] = {}
    for i, row in enumerate(told):
        if row.get(column):
            pair = cases.setdefault(str(row.get(group, "all")), [[], []])
            for side in (0, 1):
                pair[side].append(facts_found(texts[side][i], row[column]))
    found = {name: [sum(side) / len(side) for side in pair] for name, pair in cases.items()}
    rows = [(name, len(cases[name][0]), *(f"{100 * share:.0f} %" for share in pair)) for name, pair in found.items()]
    mean = [sum(pair[side] for pair in found.values()) / len(found) for side in (0, 1)]
    table(("facts found", "n", *sides), [*rows, ("mean", sum(r[1] for r in rows), *(f"{100 * m:.0f} %" for m in mean))], right=(1, 2, 3))
    return {**found, "mean": mean}


def _judged(by: str, name: str, items: list[Item], domain: str, repeat: float, sides: tuple[str, str]) -> Verdict:
    from rich.progress import track

    from veneer.study.judges import local, remote

    ask = remote(by, name) if by.startswith(("http://", "https://")) else local(by)
    found: Any = None
    for found in track(compare(ask, items, domain, repeat), "judging", total=len(items) + 1, transient=True):  # noqa: B007
        pass
    said: Verdict = found
    shown = [(case, m.n, f"{100 * m.value:.0f} % ({100 * m.low:.0f}–{100 * m.high:.0f})") for case, m in said.wins.items()]
    mean = said.overall
    shown.append(("mean", mean.n, f"{100 * mean.value:.0f} % ({100 * mean.low:.0f}–{100 * mean.high:.0f})"))
    print()
    table((f"{sides[0]} wins against {sides[1]}", "n", "ties half, 95 %"), shown, right=(1, 2))
    marks = "; ".join(f"{k.replace('_', ' ')} {a:.1f} against {b:.1f}" for k, (a, b) in said.marks.items())
    print(f"Marks of 10: {marks}. Words an answer: {said.words[0]:.0f} against {said.words[1]:.0f}.")
    agrees = "" if said.agreement is None else f" It agrees with itself on {100 * said.agreement:.0f} % of what it judged twice."
    print(
        f"The judge chose the first place in {100 * said.first_place:.0f} % (50 is fair); "
        f"{said.missing} of {said.asked} replies could not be read.{agrees}"
    )
    return said
