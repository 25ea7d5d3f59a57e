"""`veneer evaluate` and `veneer predict`: a finished run on data and on bare inputs."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from veneer.cli.command import Argument, Flag
from veneer.cli.output import existing, plain, table
from veneer.errors import BadFile, BadValue
from veneer.train.outcome import RUN_FILE, read_run

if TYPE_CHECKING:
    from veneer.tasks.metric import Metric

Run = Annotated[Path, Argument("RUN", "the folder of a finished run")]


def evaluate(
    run: Run,
    data: Annotated[str | None, Flag("other data: a file, a folder or a data set; the run's own test rows if not given")] = None,
) -> Any:
    """Measure a finished run on its test rows or on other data."""
    folder = run_folder(run)
    from veneer.train.use import evaluate as measured

    found = measured(folder, data)
    base = {} if data else read_run(folder).get("base") or {}
    names = list(found)
    rows = [["untouched base", *(_said(base[n]) if n in base else "–" for n in names)]] if base else []
    table(
        ("model", *(f"{n} [95 %]" for n in names)),
        [*rows, [read_run(folder)["recipe"]["method"], *(_said(plain(found[n])) for n in names)]],
    )
    print(f"{next(iter(found.values())).n} rows of {data or 'the test split'}")
    return {"run": folder, "data": data, "metrics": found, "base_metrics": base}


def _said(metric: dict[str, Any] | Metric) -> str:
    values = plain(metric)
    return f"{values['value']:.4g} [{values['low']:.4g}, {values['high']:.4g}]"


def predict(
    run: Run,
    inputs: Annotated[list[str], Argument("INPUT", "texts or picture files; lines of standard input if none is given")] = [],  # noqa: B006
    data: Annotated[str | None, Flag("rows to answer: a file, a folder or a data set")] = None,
    out: Annotated[Path | None, Flag("write one JSON object a line to this file")] = None,
) -> Any:
    """Answer bare inputs with a finished run."""
    folder = run_folder(run)
    items = _items(inputs, data, folder)
    from veneer.train.use import predict as answers

    found = [_in_files(one, folder / "predictions", i) for i, one in enumerate(answers(folder, items))]
    if out is not None:
        from veneer.store import write_text

        write_text(out, "".join(json.dumps(plain(one), ensure_ascii=False) + "\n" for one in found))
        print(f"{len(found)} answers in {out}")
    else:
        for item, one in zip(items, found):
            print(f"{_short(one)}\t{item if isinstance(item, str) else json.dumps(plain(item), ensure_ascii=False)}")
    return {"run": folder, "answers": found}


def run_folder(folder: Path) -> Path:
    """The run's folder, also from that of its adapter. Raises `BadFile` if there is no run, naming those nearby."""
    existing(folder, "The run")
    for place in (folder, folder.parent):
        if (place / RUN_FILE).is_file():
            return place
    inside = sorted(str(p.parent) for p in folder.glob(f"*/{RUN_FILE}"))[:3]
    said = f" Runs in it: {', '.join(inside)}." if inside else " `veneer train` makes one; for an adapter without a run use veneer.load."
    raise BadFile(f"{folder} is not the folder of a run: it holds no {RUN_FILE}.{said}")


def _in_files(answer: dict[str, Any], folder: Path, number: int) -> dict[str, Any]:
    """The answer with its pictures as files, named after the prompt or the file it answers, and numbered."""
    from veneer.study.contact_sheet import save_png

    pictures = {key: value for key, value in answer.items() if hasattr(value, "getbands")}
    words = re.sub(r"\W+", "-", str(answer.get("prompt") or answer.get("file", "")).lower()).strip("-")[:60]
    files = {key: folder / f"{words}-{answer.get('seed', number)}.png" for key in pictures}
    for key, file in files.items():
        save_png(pictures[key], file)
    return {**answer, **{key: str(file) for key, file in files.items()}}


def _items(inputs: list[str], data: str | None, run: Path) -> list[Any]:
    if data is not None and inputs:
        raise BadValue("`veneer predict`: give inputs or --data, not both.")
    if data is not None:
        from veneer.tasks.data import read
        from veneer.tasks.task import task_class

        read_data = read(data)
        rows = read_data.tables.get("test", read_data.train).rows
        bare = task_class(read_run(run)["task"]["name"]).bare
        return [bare(row) for row in rows]
    items = inputs or ([] if sys.stdin.isatty() else [line.rstrip("\n") for line in sys.stdin if line.strip()])
    if not items:
        raise BadValue("`veneer predict`: there is nothing to answer. Give texts or picture files, --data, or lines on standard input.")
    return items


def _short(answer: dict[str, Any]) -> str:
    """An answer on one line: "positive 0.97" """
    return " ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in answer.values() if not isinstance(v, dict | list))
