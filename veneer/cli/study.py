"""`veneer study`: a published comparison of methods, repeated on one's own model and data by one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from veneer.cli.command import Argument, Flag, Settings
from veneer.cli.output import table
from veneer.errors import BadValue
from veneer.study.code_study import CodeStudy, plan_of
from veneer.train.recipe import Recipe


def study(
    name: Annotated[str, Argument("STUDY", "code-generation or unit-tests")],
    methods: Annotated[
        list[str] | None, Flag("rows, such as none icl lora ia3 prompt prefix qlora4 full; all if not given", metavar="ROW")
    ] = None,
    out: Annotated[Path | None, Flag("folder of the runs and the table; runs/STUDY if not given")] = None,
    shots: Annotated[int | None, Flag("examples in the prompt of the row icl")] = None,
    **settings: Annotated[Any, Settings(Recipe, without=("method", "out", "quantise", "lr", "base", "slim"))],
) -> Any:
    """Repeat a published comparison on your model and data: code-generation or unit-tests. The same command goes on."""
    plan = plan_of(name)
    if shots is not None and shots < 1:
        raise BadValue(f"--shots {shots} must be at least 1.")
    made = CodeStudy(plan, methods or list(plan.rows), settings, out or Path("runs") / name, shots)
    made.check()
    rows = made.go()
    metrics = list(dict.fromkeys(metric for row in rows.values() for metric in row.get("metrics", {})))
    table(("row", "trained", *metrics, "peak", "seconds"), [_line(label, row, metrics) for label, row in rows.items()])
    print(f"95 % intervals and all else: {made.out / 'study.json'}")
    return {"study": name, "settings": made.settings, "rows": rows}


def _line(label: str, row: dict[str, Any], metrics: list[str]) -> list[Any]:
    if "left_out" in row:
        return [label, "left out", *("–" for _ in metrics), "–", row["left_out"]]
    values = [f"{row['metrics'][m]['value']:.3g}" if m in row["metrics"] else "–" for m in metrics]
    peak, seconds = row.get("peak_memory"), row.get("seconds")
    return [label, f"{row['trained']:,}", *values, f"{peak / 1e9:.2f} GB" if peak else "–", f"{seconds:.0f}" if seconds else "–"]
