"""The settings of two studies on code models, repeated on one's own model and data: code generation (arXiv:2308.10462) and unit
tests (arXiv:2411.02462). Every row is an ordinary run, or the untouched model with and without examples in its prompt."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.errors import BadValue, MissingExtra, UnknownName, nearest
from veneer.train.recipe import Recipe

FILE = "study.json"
LORA = "targets='attn.q attn.k attn.v attn.qkv?'"
MLP = "mlp.up mlp.gate mlp.down"
WORDS = "Generate Python code given a natural language instruction."
QUERY_VALUE = "targets='attn.q attn.v attn.qkv?'"


@dataclass(frozen=True)
class Row:
    """One line of a study: a method with its rate, the packing of the base; no method: the untouched model with so many examples.

    `words` stand in the method as the tokenizer's numbers for them, at {ids}.
    """

    method: str | None = None
    lr: float | None = None
    quantise: str = "none"
    shots: int = 0
    words: str = ""


@dataclass(frozen=True)
class Plan:
    """A study: its task, data, rows and what all of its runs share."""

    task: str
    data: str
    rows: dict[str, Row]
    shared: dict[str, Any]


CODE_LORA = Row(f"lora(r=16, alpha=32, dropout=0.05, {LORA})", 3e-4)
TEST_LORA = Row(f"lora(r=16, alpha=32, dropout=0.1, {QUERY_VALUE})", 3e-4)

STUDIES = {
    "code-generation": Plan(
        "code-generation",
        "human-eval",
        {
            "none": Row(),
            "icl": Row(shots=3),
            "lora": CODE_LORA,
            "ia3": Row(f"ia3({LORA[:-1]} {MLP}', feedforward='{MLP}')", 3e-3),
            "prompt": Row("prompt-tuning(length=20, start=text, text_ids={ids})", 3e-3, words=WORDS),
            "prefix": Row("prefix-tuning(length=10)", 3e-2),
            "qlora8": dataclasses.replace(CODE_LORA, quantise="int8"),
            "qlora4": dataclasses.replace(CODE_LORA, quantise="nf4"),
            "full": Row("full", 5e-5),
        },
        {"epochs": 5.0, "batch_size": 8, "warmup": 0.05, "seed": 42},
    ),
    "unit-tests": Plan(
        "unit-test-generation",
        "human-eval-tests",
        {
            "none": Row(),
            "icl": Row(shots=1),
            "lora": TEST_LORA,
            "ia3": Row("ia3", 3e-4),
            "prompt": Row("prompt-tuning(length=20)", 3e-3),
            "prefix": Row("prefix-tuning(length=10)", 3e-2),
            "qlora4": dataclasses.replace(TEST_LORA, quantise="nf4"),
            "full": Row("full", 5e-5),
        },
        {"epochs": 3.0, "batch_size": 16, "warmup": 0.1, "seed": 42},
    ),
}
"""Names → plans. Theirs take Adafactor or Adam, ours AdamW."""


def plan_of(name: str) -> Plan:
    """The study of this name. Raises `UnknownName`."""
    if name not in STUDIES:
        raise UnknownName(f"There is no study {name!r}.{nearest(name, STUDIES)} There are: {', '.join(STUDIES)}.")
    return STUDIES[name]


class CodeStudy:
    """Rows of a study on a model and data, one after the other; what is measured is kept in the folder and not measured again.

    Args:
        plan: of `STUDIES`. settings: of the runs, as a recipe has them; they win over the plan's.
        rows: names of the rows. out: the folder. shots: examples of the row icl.

    Raises:
        UnknownName: a row that the study has not. BadValue: the folder holds a study with other settings.
    """

    def __init__(self, plan: Plan, rows: Sequence[str], settings: dict[str, Any], out: Path, shots: int | None = None) -> None:
        for name in rows:
            if name not in plan.rows:
                raise UnknownName(f"This study has no row {name!r}.{nearest(name, plan.rows)} It has: {', '.join(plan.rows)}.")
        given = {name: value for name, value in settings.items() if value is not None}
        shared = {k: v for k, v in plan.shared.items() if not (k == "epochs" and "steps" in given)}
        self.plan, self.names, self.out = plan, list(rows), out
        self.settings = {"data": plan.data, "task": plan.task, **shared, **given}
        self.shots = shots
        self.found: dict[str, Any] = self._kept()

    def recipe(self, name: str) -> Recipe:
        """The run of a row; for rows without a method, the recipe whose base is measured."""
        row = self.plan.rows[name]
        method = (row.method or "lora").replace("{ids}", str(self._ids(row.words)) if row.words else "")
        changes: dict[str, Any] = {"method": method, "base": False, "out": str(self.out / name)}
        if row.lr is not None:
            changes["lr"] = row.lr
        if row.quantise != "none":
            changes["quantise"] = row.quantise
        return Recipe.of({**self.settings, **changes})

    def _ids(self, words: str) -> tuple[int, ...]:
        """The tokenizer's numbers for some words."""
        from veneer.cli.base import processor_of

        tokenizer = processor_of(str(self.settings.get("model")))
        if tokenizer is None:
            raise BadValue(f"{self.settings.get('model')} has no tokenizer. Choose a language model.")
        return tuple(tokenizer(words, add_special_tokens=False)["input_ids"])

    def check(self) -> None:
        """Everything that can be told before a model is loaded; rows that a missing package keeps from running are left to `go`."""
        for name in self.names:
            try:
                self.recipe(name).check()
            except MissingExtra:
                if self.plan.rows[name].quantise == "none":
                    raise

    def go(self, say: Callable[[str], None] = print, progress: bool = True) -> dict[str, Any]:
        """Measures what is missing and gives all rows: metrics, trained numbers, seconds, peak memory; or why a row was left out."""
        for name in self.names:
            if name in self.found and "left_out" not in self.found[name]:
                continue
            say(f"{name}: {self.plan.rows[name].method or 'the untouched model'}")
            try:
                self.found[name] = self._untouched(name) if self.plan.rows[name].method is None else self._trained(name, say, progress)
            except MissingExtra as error:
                self.found[name] = {"left_out": str(error)}
                say(f"{name} is left out: {error}")
            self._keep()
        return {name: self.found[name] for name in self.names}

    def _trained(self, name: str, say: Callable[[str], None], progress: bool) -> dict[str, Any]:
        from veneer.train.run import train

        outcome = train(self.recipe(name), progress=progress, say=say)
        return {
            "metrics": {k: dataclasses.asdict(m) for k, m in outcome.metrics.items()},
            "trained": outcome.trained,
            "seconds": outcome.seconds,
            "peak_memory": outcome.peak_memory,
        }

    def _untouched(self, name: str) -> dict[str, Any]:
        """The model as it is, with the row's examples in front of every question."""
        from veneer.tasks.task import named, prepare
        from veneer.train.run import load, pick
        from veneer.train.use import measure

        recipe = self.recipe(name)
        recipe.check()
        slug, own = named(recipe.task or self.plan.task)
        shots = self.plan.rows[name].shots and (self.shots or self.plan.rows[name].shots)
        words = ", ".join(f"{k}={v!r}" for k, v in {**own, "shots": shots}.items())
        task, _ = prepare(recipe.data, f"{slug}({words})", recipe.options)
        device, precision = pick(recipe)
        model, processor = load(recipe, task, device, precision)
        measured = measure(model, processor, task, recipe.eval_batch_size or 2 * recipe.batch_size)
        return {"metrics": {k: dataclasses.asdict(m) for k, m in measured.metrics.items()}, "trained": 0, "shots": shots}

    def _kept(self) -> dict[str, Any]:
        file = self.out / FILE
        if not file.is_file():
            return {}
        held = json.loads(file.read_text("utf-8"))
        if held["settings"] != json.loads(json.dumps(self.settings)):
            other = [k for k in {*held["settings"], *self.settings} if held["settings"].get(k) != self.settings.get(k)]
            raise BadValue(f"{self.out} holds a study with other settings ({', '.join(sorted(other))}). Choose another folder with --out.")
        return dict(held["rows"])

    def _keep(self) -> None:
        from veneer.store import write_text

        self.out.mkdir(parents=True, exist_ok=True)
        write_text(self.out / FILE, json.dumps({"settings": self.settings, "rows": self.found}, indent=1) + "\n")
