"""Python from an instruction, as in the study of PEFT for code generation (arXiv:2308.10462)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from veneer.tasks.code import FENCE, Code, codebleu_metric, parses
from veneer.tasks.data import Row
from veneer.tasks.metric import Measured, proportion

SETUP, TEST = "setup", "test"
"""Optional columns: imports in front of an answer, and code behind it that raises if the answer is wrong."""


class CodeGeneration(Code):
    """Python code for an instruction. Metrics: exact match within the first k beams, CodeBLEU, valid syntax, tests passed (pass@1)."""

    slug: ClassVar[str] = "code-generation"
    asks: ClassVar[tuple[str, ...]] = ("instruction", "intent", "prompt")
    answers: ClassVar[tuple[str, ...]] = ("response", "snippet", "code", "completion", "output")

    def question(self, text: str) -> str:
        return f"### Instruction:\n{text.strip()}\n### Response:\n{FENCE}python\n"

    def score(self, rows: Sequence[Row], answers: Sequence[Sequence[str]]) -> Measured:
        references = [row[self.options.label or ""].rstrip() for row in rows]
        first, n = [made[0] for made in answers], len(rows)
        metrics = {}
        for k in (1, 2, 5, 10):
            if k <= self.own.beams:
                hits = sum(reference in made[:k] for reference, made in zip(references, answers))
                metrics[f"em@{k}"] = proportion(hits, n)
        metrics["codebleu"] = codebleu_metric(references, first, self.own.published)
        metrics["syntax"] = proportion(sum(map(parses, first)), n)
        correct = [reference == made for reference, made in zip(references, first)]
        if self.own.execute and all(row.get(TEST) for row in rows):
            correct = [self.passes(row, code) for row, code in zip(rows, first)]
            metrics["pass@1"] = proportion(sum(correct), n)
        return Measured(metrics, correct)

    def passes(self, row: Row, code: str) -> bool:
        """Whether an answer holds against the row's own tests."""
        from veneer.tools.sandbox import run

        if not parses(code):
            return False
        program = "\n".join((row.get(SETUP) or "", code, row[TEST]))
        return run(program, seconds=self.own.seconds, megabytes=self.own.megabytes).passed
