"""Tests for a given function, run against it, as in the study of PEFT for unit tests (arXiv:2411.02462), in Python."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from veneer.tasks.code import FENCE, Code, codebleu_metric, parses
from veneer.tasks.data import Row
from veneer.tasks.metric import Measured, bootstrap, proportion


@dataclass(frozen=True)
class Judged:
    """One answer: repaired code ("" if nothing is left), whether its tests held, and the share of the function's lines they ran."""

    code: str
    passed: bool = False
    coverage: float | None = None


class UnitTestGeneration(Code):
    """Tests for a function. Metrics: valid syntax after repair, CodeBLEU, tests that hold (pass@1), line coverage of those that do."""

    slug: ClassVar[str] = "unit-test-generation"
    asks: ClassVar[tuple[str, ...]] = ("source", "focal", "function")
    answers: ClassVar[tuple[str, ...]] = ("target", "test", "tests")

    def question(self, text: str) -> str:
        return f"### Function:\n{FENCE}python\n{text.strip()}\n{FENCE}\n### Tests:\n{FENCE}python\n"

    def score(self, rows: Sequence[Row], answers: Sequence[Sequence[str]]) -> Measured:
        found = [self.judged(row[self.options.text or ""], made[0]) for row, made in zip(rows, answers)]
        references, n = [row[self.options.label or ""].rstrip() for row in rows], len(rows)
        metrics = {
            "syntax": proportion(sum(bool(one.code) for one in found), n),
            "codebleu": codebleu_metric(references, [one.code for one in found], self.own.published),
        }
        if self.own.execute:
            covered = [one.coverage for one in found if one.passed and one.coverage is not None]
            metrics["pass@1"] = proportion(sum(one.passed for one in found), n)
            if covered:
                metrics["coverage"] = bootstrap(lambda shares: float(shares.mean()), covered)
        return Measured(metrics, [one.passed for one in found])

    def judged(self, source: str, answer: str) -> Judged:
        """An answer repaired and, unless it is not to be run, run against the function; tests that assert nothing do not hold."""
        code = repaired(answer)
        if not code or not self.own.execute:
            return Judged(code)
        from veneer.tools.sandbox import run

        called = "\n".join(f"{name}()" for name in named_tests(code))
        done = run(f"{code}\n{called}", measured=source, seconds=self.own.seconds, megabytes=self.own.megabytes)
        return Judged(code, done.passed and bool(called) and asserts(code), done.coverage)


def repaired(code: str) -> str:
    """The longest beginning, by lines, that is Python and holds a whole statement; "" if there is none. Valid code is unchanged."""
    lines = code.rstrip().splitlines()
    while lines and not parses("\n".join(lines)):
        lines.pop()
    return "\n".join(lines)


def named_tests(code: str) -> list[str]:
    """Functions at the top whose names say that they are tests and that need no arguments."""
    functions = [node for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)]
    return [f.name for f in functions if f.name.startswith("test") and not f.args.args and not f.args.kwonlyargs]


def asserts(code: str) -> bool:
    """Whether anything is asserted: a test without an assertion holds for every function."""
    return any(
        isinstance(node, ast.Assert) or (isinstance(node, ast.Attribute) and node.attr.startswith("assert"))
        for node in ast.walk(ast.parse(code))
    )
