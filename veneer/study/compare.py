"""Several methods on the same data, each run in a process of its own; one table, one report."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import BadValue, VeneerError
from veneer.registry import card
from veneer.spec import parse_spec
from veneer.study import format as show
from veneer.study import report
from veneer.study.stats import best_index, indistinguishable

if TYPE_CHECKING:
    from rich.table import Table

    from veneer.train.recipe import Recipe

BASE = "untouched base"
LOWER_IS_BETTER = ("loss", "perplexity", "error", "mae", "mse", "rmse", "wer", "cer")


@dataclass
class Study:
    """The outcome of a comparison. `data` is what the report shows (its form stands in `report`); `folder` holds the files."""

    folder: Path
    data: dict[str, Any]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.data["rows"]

    @property
    def best(self) -> dict[str, Any] | None:
        """The best row, or None while no method has a result."""
        return next((r for r in self.rows if r.get("best")), None)

    def row(self, label: str) -> dict[str, Any]:
        """The row of this label."""
        return next(r for r in self.rows if r["label"] == label)

    def table(self) -> Table:
        """The results for a terminal."""
        return table(self.data)

    def write(self, *, pictures: bool = True) -> list[Path]:
        """Writes `study.json`, `report.html` and, where matplotlib is there, the plots as PNG; gives the paths."""
        self.folder.mkdir(parents=True, exist_ok=True)
        report.replace_text(self.folder / "study.json", json.dumps(self.data, indent=1, allow_nan=False) + "\n")
        paths = [self.folder / "study.json", report.write(self.folder, self.data)]
        if pictures:
            from veneer.errors import MissingExtra
            from veneer.study import plots

            try:
                paths += plots.write(self.folder, self.data)
            except MissingExtra:
                return paths
        return paths


def compare(
    recipes: Recipe | Sequence[Recipe],
    specs: Sequence[str] | None = None,
    *,
    out: str | Path,
    title: str = "Comparison",
    subtitle: str = "",
    references: Iterable[str] = (),
    facts: Sequence[tuple[str, str]] = (),
    metric: str | None = None,
    again: bool = False,
    progress: bool = True,
    command: str | None = None,
) -> Study:
    """Trains every recipe and shows which one won.

    Each runs in a fresh process, so that its seconds and its peak memory are its own. Finished runs are reused and
    interrupted ones go on; a run that fails becomes a row with its error, and the others still run. The report is
    written anew after each run.

    Args:
        recipes: the recipes, or one that is tried with each of `specs`.
        specs: method specs, e.g. "lora(r=8)".
        out: folder of `study.json`, `report.html`, the PNGs and one folder a run.
        references: specs shown first, as what the others have to beat.
        facts: (name, text) lines added to the report.
        metric: which metric decides; the task's main one unless given.
        again: trains also what is finished.
        progress: whether runs show progress bars.
        command: what the user typed, for the advice on how to go on.
    Raises:
        VeneerError: before any work, for recipes or specs that are wrong.
        Interrupted: Ctrl-C; the running method has saved its state.
    """
    folder = Path(out)
    plan = _plan(recipes, specs, folder, tuple(references))
    for recipe in plan:
        recipe.check()
    outcomes: list[dict[str, Any]] = []
    said: set[str] = set()
    study = Study(folder, {})
    for done, recipe in enumerate(plan):
        if progress:
            print(f"\n[{done + 1}/{len(plan)}] {recipe.method}", flush=True)
        outcomes.append(_run(recipe, again=again, progress=progress, command=command, said=said))
        study.data = gather(plan, outcomes, title=title, subtitle=subtitle, references=references, facts=facts, metric=metric)
        study.write(pictures=done == len(plan) - 1)
    return study


def gather(
    recipes: Sequence[Recipe],
    outcomes: Sequence[Mapping[str, Any]],
    *,
    title: str,
    subtitle: str = "",
    references: Iterable[str] = (),
    facts: Sequence[tuple[str, str]] = (),
    metric: str | None = None,
) -> dict[str, Any]:
    """The study's data from finished runs: the untouched base first, then the references, then the others as given."""
    good = [o for o in outcomes if "error" not in o]
    chosen = metric or (good[0]["main"] if good else "accuracy")
    firsts = set(references)
    names = labels([r.method for r in recipes])
    rows: list[dict[str, Any]] = [
        _row(name, r.method, o, chosen, reference=r.method in firsts) for name, r, o in zip(names, recipes, outcomes)
    ]
    rows.sort(key=lambda row: not row["reference"])
    based = next((o for o in good if (o.get("base_metrics") or {}).get(chosen)), None)
    if based:
        rows.insert(0, _base_row(based, chosen))
    rows = report.finite(rows)
    data: dict[str, Any] = {"title": title, "subtitle": subtitle, "metric": _metric(chosen, rows), "rows": rows}
    higher = data["metric"]["higher"]
    best = best_index(rows, higher)
    for i, (row, mark) in enumerate(zip(rows, indistinguishable(rows, higher=higher))):
        row["best"], row["alike"] = i == best, mark
    data["facts"] = [*([name, text] for name, text in facts), *_machine(rows)]
    return data


def labels(specs: Sequence[str]) -> list[str]:
    """A short name for every spec: the methods' titles; the spec itself where two would be called the same."""
    titles = [" + ".join(card(slug).title for slug, _ in parse_spec(spec)) for spec in specs]
    return [title if titles.count(title) == 1 else spec for title, spec in zip(titles, specs)]


def table(data: Mapping[str, Any]) -> Table:
    """The results for a terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    metric = data["metric"]
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, title=data["title"], title_justify="left", title_style="bold")
    shown.add_column("  method", no_wrap=True)
    for heading in ("trained", "% model", f"{metric['name']} (95 %)", "seconds", "memory", "disk"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in data["rows"]:
        mark = "*" if row.get("best") else "≈" if row.get("alike") else " "
        name = Text(f"{mark} {row['label']}", style="bold" if row.get("best") else "dim" if row.get("reference") else "")
        if row.get("error"):
            shown.add_row(name, "failed")
            continue
        value = (
            f"{show.metric_value(row.get('value'), metric)} ({show.interval(row.get('low'), row.get('high'), metric).removesuffix(' %')})"
        )
        spent = show.NONE if row.get("seconds") is None else f"{row['seconds']:.0f}"
        shown.add_row(
            name, show.count(row.get("trained")), show.share(row.get("trained"), row.get("total")).removesuffix(" %"), value,
            spent, show.size(row.get("peak_memory")), show.size(row.get("adapter_bytes")),
        )  # fmt: skip
    notes = ["* best; ≈ cannot be told apart from the best on these test examples"]
    notes += [f"{row['label']}: {row['error'].splitlines()[0]}" for row in data["rows"] if row.get("error")]
    shown.caption, shown.caption_justify = Text("\n".join(notes)), "left"
    return shown


def _plan(recipes: Recipe | Sequence[Recipe], specs: Sequence[str] | None, folder: Path, references: tuple[str, ...]) -> list[Recipe]:
    """The recipes in order, each with a folder of its own under `folder`; all specs checked."""
    if specs is not None:
        if isinstance(recipes, Sequence):
            raise BadValue("compare: `specs` goes with one recipe; give either several recipes or one recipe and several specs.")
        ordered = [*references, *(s for s in specs if s not in references)]
        # The untouched base is the same for all; it is measured with the first.
        plan = [dataclasses.replace(recipes, method=spec, base=recipes.base and i == 0) for i, spec in enumerate(ordered)]
    else:
        plan = list(recipes) if isinstance(recipes, Sequence) else [recipes]
    if not plan:
        raise BadValue("compare: there is nothing to compare; give at least one recipe or spec.")
    names = labels([r.method for r in plan])
    taken: set[str] = set()
    placed = []
    for recipe, name in zip(plan, names):
        place = _folder_name(name)
        while place in taken:
            place += "-2"
        taken.add(place)
        placed.append(dataclasses.replace(recipe, out=str(folder / place)))
    return placed


def _folder_name(label: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", label.lower()).strip("-")[:80] or "run"


def _run(recipe: Recipe, *, again: bool, progress: bool, command: str | None, said: set[str]) -> dict[str, Any]:
    """One run in a fresh process → its outcome as a dict, or {"error": …}. A finished run is only read.

    `said` collects the lines that the runs printed, so that none prints what stands there already.
    """
    from veneer.train.interrupt import Interrupted

    finished = None if again else _finished(recipe)
    if finished is not None:
        if progress:
            print(f"finished before; {recipe.folder}", flush=True)
        return finished
    with tempfile.TemporaryDirectory(prefix="veneer-") as work:
        result, request = Path(work) / "result.json", Path(work) / "request.json"
        asked = {
            "recipe": recipe.settings,
            "again": again,
            "progress": progress,
            "command": command,
            "said": sorted(said),
            "result": str(result),
        }
        request.write_text(json.dumps(asked), encoding="utf-8")
        code = _wait(subprocess.Popen([sys.executable, "-m", "veneer.study.worker", str(request)], process_group=0))
        found = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {"outcome": None, "said": []}
    said.update(found["said"])
    outcome = found["outcome"]
    if code in (130, -signal.SIGINT):
        raise Interrupted(outcome["error"] if outcome else f"Interrupted.\nTo go on: {command or 'the same command'}")
    return outcome or {"error": f"The run ended with exit code {code} and left no result; its log is in {recipe.folder}.", "code": code}


def _finished(recipe: Recipe) -> dict[str, Any] | None:
    """The outcome of an earlier run of the same recipe in the same folder."""
    from veneer.train.outcome import RUN_FILE, Outcome, read_run

    if not (recipe.folder / RUN_FILE).is_file():
        return None
    record = read_run(recipe.folder)
    same = record["recipe"] == json.loads(json.dumps(recipe.identity))
    return Outcome.load(recipe.folder).as_json() if same and record.get("outcome") else None


def _wait(process: subprocess.Popen) -> int:
    """Waits for the run. Ctrl-C is passed on once a press, and the run may save its state before it ends."""
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)


def _row(label: str, spec: str, outcome: Mapping[str, Any], metric: str, *, reference: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"label": label, "method": spec, "reference": reference}
    if "error" in outcome:
        return {**row, "error": outcome["error"]}
    keys = ("folder", "trained", "total", "seconds", "seconds_per_step", "peak_memory", "adapter_bytes")
    return {
        **row,
        **{k: outcome.get(k) for k in keys},
        **_value(outcome["metrics"], metric),
        "correct": [int(c) for c in outcome.get("correct") or []],
        "curve": [_point(p, metric) for p in outcome.get("curve") or [] if "step" in p],
    }


def _base_row(outcome: Mapping[str, Any], metric: str) -> dict[str, Any]:
    return {
        "label": BASE,
        "method": None,
        "reference": True,
        "trained": 0,
        "total": outcome.get("total"),
        **_value(outcome["base_metrics"], metric),
    }


def _value(metrics: Mapping[str, Any], metric: str) -> dict[str, Any]:
    found = metrics.get(metric)
    if found is None:
        raise VeneerError(f"There is no metric {metric!r} in this run. It has: {', '.join(metrics)}.")
    return {k: found.get(k) for k in ("value", "low", "high", "n")}


def _point(point: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """A curve point as the report reads it: the step, and the training loss or the held-out metric."""
    held_out = next((point[k] for k in (f"eval_{metric}", metric) if point.get(k) is not None), None)
    kept = {"step": point["step"], "loss": point.get("loss"), "value": held_out}
    return {k: v for k, v in kept.items() if v is not None}


def _metric(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    higher = name.lower() not in LOWER_IS_BETTER
    values = [r[k] for r in rows for k in ("value", "low", "high") if r.get(k) is not None]
    return {"name": name, "higher": higher, "fraction": higher and bool(values) and all(0 <= v <= 1 for v in values)}


def _machine(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """What the numbers depend on."""
    from importlib.metadata import version

    examples = next((r["n"] for r in rows if r.get("n")), None)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return [
        *([["Test examples", show.count(examples)]] if examples else []),
        ["Processor", f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"],
        ["Software", f"Python {platform.python_version()}, {versions}"],
        ["Written", datetime.datetime.now().astimezone().isoformat(" ", "minutes")],
        ["Peak memory", "of the run's whole process, libraries included"],
    ]
