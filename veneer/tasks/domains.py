"""Rows of several domains: some are trained on, all are tested on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from veneer.errors import BadValue, UnknownName, nearest
from veneer.tasks.data import Data, Row, Splits, Table, _cap
from veneer.tasks.task import Options

Parts = dict[str, Table]


def domain_of(row: Row) -> str:
    """The row's domain; "" in data without domains."""
    return str(row.get("domain") or "")


def firsts(rows: Sequence[Row], n: int) -> list[Row]:
    """The first n rows of each domain."""
    return [row for domain in dict.fromkeys(map(domain_of, rows)) for row in [r for r in rows if domain_of(r) == domain][:n]]


def divided(data: Data, options: Options, split: Callable[[Data], Splits]) -> Splits:
    """Training and validation rows of the sources; test rows of the sources, and of every other domain at most `test_rows`.

    Sources are `options.source`, else what the data say, else all domains with training rows that are not `unlabelled`. Training
    rows of `options.unlabelled` are added, marked "unlabelled", at most half as many as there are others. Another domain is tested
    on its test rows, else its validation rows, else all it has; an unlabelled one never on rows that were trained on.

    Args:
        split: divides the rows of one domain, or of all sources.

    Raises `UnknownName` for a name that has no training rows, `BadValue` for one that is both.
    """
    domains = _by_domain(data)
    able = [domain for domain, parts in domains.items() if "train" in parts]
    bare = _named(able, options.unlabelled, "--unlabelled", data.source)
    given = _named(able, options.source or data.hints.get("source"), "--source", data.source)
    trained = given or [domain for domain in able if domain not in bare]
    if not trained or set(trained) & set(bare):
        raise BadValue(
            f"--unlabelled {options.unlabelled} leaves nothing, or is itself, to train on with masks. Name others with --source."
        )
    tables = {name: _joined([domains[d][name] for d in trained if name in domains[d]]) for name in data.tables}
    made = split(dataclasses.replace(data, tables={name: table for name, table in tables.items() if table.rows}))
    others = {domain: parts for domain, parts in domains.items() if domain not in trained}
    for domain in bare:
        others[domain] = _held_out(data, others[domain], options.label or "", split)
    tested = [_tested(parts, domain in bare) for domain, parts in others.items()]
    more = _cap(_joined([others[domain]["train"] for domain in bare]), max(1, len(made.train) // 2))
    rows = [{**row, "unlabelled": True} for row in more.rows]
    test = _joined([made.test, *(_cap(table, options.test_rows) for table in tested)])
    return dataclasses.replace(made, train=_joined([made.train, Table(rows, more.source)]), test=test)


def _held_out(data: Data, parts: Parts, answer: str, split: Callable[[Data], Splits]) -> Parts:
    """An unlabelled domain with rows to test on, where it has any with answers."""
    if len(parts) > 1 or all(row.get(answer) is None for row in parts["train"].rows):
        return parts
    made = split(dataclasses.replace(data, tables=parts))
    return {"train": made.train, "test": made.test}


def _tested(parts: Parts, unlabelled: bool) -> Table:
    names = ("test", "validation") if unlabelled else ("test", "validation", "train")
    return next((parts[name] for name in names if name in parts), _joined([]))


def _by_domain(data: Data) -> dict[str, Parts]:
    domains: dict[str, Parts] = {}
    for name, table in data.tables.items():
        for domain in dict.fromkeys(map(domain_of, table.rows)):
            chosen = [i for i, row in enumerate(table.rows) if domain_of(row) == domain]
            domains.setdefault(domain, {})[name] = table.pick(chosen)
    return domains


def _named(able: Sequence[str], given: str | None, flag: str, source: str) -> list[str]:
    wanted = [name.strip() for name in (given or "").split(",") if name.strip()]
    for name in wanted:
        if name not in able:
            have = ", ".join(filter(None, able)) or "no domains"
            raise UnknownName(f"{flag} {name}: {source} has no such domain with training rows.{nearest(name, able)} It has: {have}.")
    return wanted


def _joined(tables: Sequence[Table]) -> Table:
    return Table([row for table in tables for row in table.rows], tables[0].source if tables else "")
