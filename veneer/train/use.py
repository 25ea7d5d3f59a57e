"""Using a finished run: predictions and evaluations with the base rebuilt from its record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from veneer.errors import BadFile
from veneer.tasks.data import Splits, read
from veneer.tasks.metric import Metric
from veneer.tasks.task import Options, Task, prepare, task_class
from veneer.train.outcome import read_run
from veneer.train.recipe import Recipe, check_model


def rebuild(folder: str | Path, *, adapter: bool = True) -> tuple[Any, Any, Task]:
    """The model of a run with its adapter, ready for use; its tokenizer or image processor; its task.

    `adapter=False` gives the base alone. Raises `BadFile` if the folder holds no run, or the run no adapter yet.
    """
    record = read_run(folder)
    recipe = Recipe.of(record["recipe"])
    check_model(recipe.model)
    if adapter and not (Path(folder) / "adapter").is_dir():
        raise BadFile(f"The run in {folder} has no adapter yet. The command that started it goes on with it.")
    kept = record["task"]
    task = task_class(kept["name"])(Options(**kept["options"]), None, kept["facts"])

    import veneer
    from veneer.train.run import load, pick

    device, precision = pick(recipe)
    model, processor = load(recipe, task, device, precision)
    if adapter:
        veneer.load(model, Path(folder) / "adapter")
    model.eval()
    return model, processor, task


def predict(folder: str | Path, inputs: Sequence[Any]) -> list[dict[str, Any]]:
    """Answers of a finished run for bare inputs: texts, pictures, questions or conversations, as its task has them."""
    model, processor, task = rebuild(folder)
    return task.predict(model, processor, inputs)


def evaluate(folder: str | Path, data: str | None = None) -> dict[str, Metric]:
    """Metrics of a finished run on other data (its test split, or all of it), or on its own test rows.

    Raises `VeneerError`s that name the place of rows that cannot be used, before the model is loaded.
    """
    record = read_run(folder)
    recipe = Recipe.of(record["recipe"])
    kept = record["task"]
    if data is None:
        task, _ = prepare(recipe.data, recipe.task or kept["name"], recipe.options)
        table = task.splits.test
    else:
        given = read(data)
        table = given.tables.get("test", given.train)
        checker = task_class(kept["name"])(Options(**kept["options"]), None, dict(kept["facts"]))
        checker.columns(table, checker.options)
        checker.check(table, "test")
    model, processor, task = rebuild(folder)
    task.splits = Splits(table, table, table)
    return measure(model, processor, task).metrics


def measure(model: Any, processor: Any, task: Task, batch_size: int = 32) -> Any:
    """The task's metrics of a model on its test rows."""
    import numpy as np
    import torch

    from veneer.tasks.metric import Measured

    rows = task.splits.test.rows
    encoded = task.encode(rows, processor)
    collate = task.collator(processor)
    first = next(model.parameters())
    order = sorted(range(len(rows)), key=lambda i: len(encoded[i].get("input_ids", ())))
    kept: list[Any] = [None] * len(rows)
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = {k: v.to(first.device) for k, v in collate([encoded[i] for i in chosen]).items()}
            labels = batch.pop("labels")
            found = task.reduce(model(**batch).logits, labels).float().cpu().numpy()
            for i, row in zip(chosen, found):
                kept[i] = row
    measured = task.measure(np.stack(kept), rows)
    further = task.generate(model, processor, rows, batch_size)
    if further is None:
        return measured
    return Measured({**further.metrics, **measured.metrics}, measured.correct if further.correct is None else further.correct)
