"""The study of a sparse scaling law: runs, or someone else's measurements, to the fitted law and what follows from it.

law, intervals by bootstrap → dense models of equal loss → sparsity of least loss for a budget → extrapolation check
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from veneer.errors import BadFile, BadValue, MissingExtra, nearest
from veneer.maths import scaling_law as maths
from veneer.study import format as show
from veneer.study.report import finite, replace_text
from veneer.study.sparse_runs import RUNS, Design, Trainer, finished, record

COMMON = (0.5, 0.75, 0.875, 0.9375)
"""Sparsities whose factor is shown in any case."""
UNSTRUCTURED = "unstructured"
COLUMNS = {
    "S": ("s", "sparsity"),
    "N": ("n", "nonzero", "nonzeros", "non_zeros", "nnz"),
    "D": ("d", "data", "tokens", "examples", "images", "steps"),
    "L": ("l", "loss", "val_loss", "validation_loss", "eval_loss"),
}
"""What the columns of a file of measurements may be called, in any case, with - for _."""

Run = dict[str, Any]


@dataclass(frozen=True)
class Fitting:
    """How the law is fitted.

    Args:
        log, delta, N_unit, D_unit: as for `maths.scaling_law.fit`. times: samples for the intervals, 0 for none.
    """

    log: bool = True
    delta: float | None = None
    N_unit: float | None = None
    D_unit: float | None = None
    times: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("delta", "N_unit", "D_unit"):
            value = getattr(self, name)
            if value is not None and not 0 < value < np.inf:
                raise BadValue(f"scaling-law: {name}={value:g} is out of range; it must be more than 0 and finite.")
        if self.times < 0:
            raise BadValue(f"scaling-law: {self.times} samples are out of range; the number must be at least 0.")

    @property
    def settings(self) -> dict[str, Any]:
        return {"log": self.log, "delta": self.delta, "N_unit": self.N_unit, "D_unit": self.D_unit, "seed": self.seed}


@dataclass
class Study:
    """The outcome. `data` is what the report shows; `folder` holds the files."""

    folder: Path
    data: dict[str, Any]

    def write(self) -> list[Path]:
        """Writes `study.json`, `report.html` and, where matplotlib is there, the plots as PNG; gives the paths."""
        from veneer.study import scaling_charts

        self.folder.mkdir(parents=True, exist_ok=True)
        replace_text(self.folder / "study.json", json.dumps(self.data, indent=1, allow_nan=False) + "\n")
        replace_text(self.folder / "report.html", scaling_charts.page(self.data))
        paths = [self.folder / "study.json", self.folder / "report.html"]
        with contextlib.suppress(MissingExtra):
            paths += scaling_charts.pictures(self.folder, self.data)
        return paths


def study(
    design: Design,
    out: str | Path,
    fitting: Fitting | None = None,
    *,
    again: bool = False,
    progress: bool = True,
    device: str = "cpu",
    command: str = "the same command",
) -> Study:
    """Trains what is not finished yet, fits the law, writes the report.

    A finished run stands in `runs.jsonl`, whole or not at all; after Ctrl-C only the run under way starts anew.

    Raises:
        VeneerError: before any training, for settings that do not fit; Interrupted: Ctrl-C.
    """
    from veneer.train.interrupt import Interrupted
    from veneer.train.run import _claimed, _quiet

    folder, fitting = Path(out), fitting or Fitting()
    if not again:
        finished(folder, design)
    _quiet()
    trainer = Trainer(design, folder, device)
    trainer.check()
    with _claimed(folder):
        if again:
            (folder / RUNS).unlink(missing_ok=True)
            shutil.rmtree(folder / "bases", ignore_errors=True)
        try:
            runs = _trained(trainer, folder, progress)
        except KeyboardInterrupt:
            done, all_runs = len(finished(folder, design).keys() & set(design.grid())), len(design.grid())
            raise Interrupted(f"Interrupted: {done} of {all_runs} runs are finished in {folder}.\nTo go on: {command}") from None
    what = "tokens" if design.models else "bytes"
    models = f"{len(design.models)} pretrained models" if design.models else f"{design.layers}-block decoders"
    data = analysed(runs, fitting, title=f"Sparse scaling law: {models} on {Path(design.data).name}", unit=what)
    data["facts"] += _facts(design, runs, what)
    made = Study(folder, finite(data))
    made.write()
    return made


def study_of_file(path: str | Path, out: str | Path, fitting: Fitting | None = None) -> Study:
    """The same from someone else's measurements: CSV or JSON lines with S, N (non-zeros), D, L, and perhaps `pattern`."""
    runs = read_runs(Path(path))
    data = analysed(runs, fitting or Fitting(), title=f"Sparse scaling law: {Path(path).name}", unit="data")
    made = Study(Path(out), finite(data))
    made.write()
    return made


def _trained(trainer: Trainer, folder: Path, progress: bool) -> list[Run]:
    """All runs of the design in order, those that are missing trained now."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    design = trainer.design
    done, grid = finished(folder, design), design.grid()
    tokens = {key: design.steps(key[2]) * design.context * design.batch_size for key in grid}
    weights = {size: sum(p.numel() for p in trainer.skeleton(size).parameters()) for size in design.sizes}
    left = [key for key in grid if key not in done]
    bar = Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=Console(), disable=not (progress and left))
    with bar:
        if progress and len(left) < len(grid):
            bar.console.print(f"{len(grid) - len(left)} of {len(grid)} runs were finished before", highlight=False)
        at = bar.add_task("", total=sum(tokens[key] * weights[key[0]] for key in left))
        for size, sparsity, length in left:
            key = size, sparsity, length
            bar.update(at, description=f"{size}, {_label(sparsity)}, {show.short_count(length)}")
            done[key] = trainer.run(*key, functools.partial(_advance, bar, at, weights[size]))
            record(folder, list(done.values()))
            if progress:
                said = f"[{sum(k in done for k in grid)}/{len(grid)}] {size}, {_label(sparsity)}, {length:,}"
                bar.console.print(f"{said}: loss {done[key]['L']:.4f}, {done[key]['seconds']:.1f} s", highlight=False, markup=False)
    return [done[key] for key in grid]


def _advance(bar: Any, at: Any, weights: int, tokens: int) -> None:
    bar.advance(at, tokens * weights)


# -- measurements -----------------------------------------------------------------------------------------------


def read_runs(path: Path) -> list[Run]:
    """Measurements from a file. Raises `BadFile` with the line of what cannot be used."""
    from veneer.tasks.data import read_table

    if not path.is_file():
        near = nearest(path.name, (p.name for p in path.parent.iterdir())) if path.parent.is_dir() else ""
        raise BadFile(f"There is no file {path}.{near}")
    table = read_table(path)
    names = {str(c).lower().replace("-", "_"): c for c in table.columns}
    columns = {key: next((names[word] for word in words if word in names), None) for key, words in COLUMNS.items()}
    lacking = [key for key, name in columns.items() if name is None]
    if lacking:
        raise BadFile(
            f"{path} has no column {' nor '.join(lacking)}; it has {', '.join(table.columns)}. Needed are S (sparsity, 0 to less than 1), "
            "N (non-zero weights), D (data) and L (loss)."
        )
    runs = []
    for i, row in enumerate(table.rows):
        run: Run = {key: _number(row.get(str(name)), key, str(name), table.place(i)) for key, name in columns.items()}
        _check_range(run, table.place(i))
        run["pattern"] = str(row.get(names.get("pattern", "pattern")) or UNSTRUCTURED)
        runs.append(run | {key: row[key] for key in ("model", "sparsity", "length") if key in row and path.suffix == ".jsonl"})
    return runs


def _number(value: Any, key: str, column: str, place: str) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        raise BadFile(f"{place}: {key} ({column!r}) is {value!r}, not a number.") from None


def _check_range(run: Run, place: str) -> None:
    if not 0 <= run["S"] < 1:
        raise BadFile(f"{place}: S={run['S']:g} is not a sparsity; it must be at least 0 and less than 1.")
    for key in "NDL":
        if not 0 < run[key] < np.inf:
            raise BadFile(f"{place}: {key}={run[key]:g} is out of range; it must be more than 0 and finite.")


# -- analysis ---------------------------------------------------------------------------------------------------


def analysed(runs: Sequence[Run], fitting: Fitting, *, title: str, unit: str = "data") -> dict[str, Any]:
    """The study's data: unstructured runs and n:m runs (with the dense ones) fitted apart, and what the laws say."""
    free = [r for r in runs if r["pattern"] == UNSTRUCTURED]
    patterned = [r for r in runs if r["pattern"] != UNSTRUCTURED]
    groups = {UNSTRUCTURED: free}
    if patterned:
        groups[f"n:m ({', '.join(dict.fromkeys(r['pattern'] for r in patterned))})"] = [*(r for r in free if r["S"] == 0), *patterned]
    fits, notes = [], []
    for name, members in groups.items():
        if len(members) < maths.LEAST_RUNS and len(groups) > 1:
            notes.append(f"{name}: {len(members)} runs are too few to fit a law; at least {maths.LEAST_RUNS} are needed.")
        else:
            fits.append(_fitted(name, members, fitting, common=name == UNSTRUCTURED))
    if not fits:
        maths.check_runs(*_arrays(runs))
        raise BadValue(f"{'; '.join(notes)}")
    shown = [r | {"predicted": float(_law_of(r, fits)(r["S"], r["N"], r["D"])), "label": _label_of(r)} for r in runs]
    residual = "logarithms" if fitting.log else "losses"
    facts = [
        ["Law", "L(S, N, D) = (a_S (1 − S)^b_S + c_S) · N^−b_N + (a_D / D)^b_D + c; N counts non-zero weights of pruned matrices"],
        [
            "Fit",
            f"mean Huber loss of the residuals of {residual}, linear beyond {fits[0]['delta']:g}; BFGS from {fits[0]['starts']} starts",
        ],
        ["Intervals", f"95 %, from {fitting.times} samples of the runs with replacement"],
    ]
    return {"title": title, "unit": unit, "runs": shown, "fits": fits, "notes": notes, "facts": facts if fitting.times else facts[:2]}


def law_of(fit: Mapping[str, Any]) -> maths.Law:
    """The law of an entry of `fits`."""
    return maths.Law(**fit["law"])


def _law_of(run: Run, fits: Sequence[Mapping[str, Any]]) -> maths.Law:
    return law_of(fits[-1] if run["pattern"] != UNSTRUCTURED and len(fits) > 1 else fits[0])


def _fitted(name: str, runs: Sequence[Run], fitting: Fitting, *, common: bool) -> dict[str, Any]:
    S, N, D, L = _arrays(runs)
    found = maths.fit(S, N, D, L, **fitting.settings)
    samples = maths.resampled(found, S, N, D, L, times=fitting.times, seed=fitting.seed) if fitting.times else []
    law, most = found.law, found.most_S
    off = np.abs(law(S, N, D) / L - 1)
    seen = [float(s) for s in np.unique(S.round(4)) if s > 0]
    asked = sorted({*(COMMON if common else ()), *(seen if len(seen) <= 8 else ())})
    raw = law.raw
    coefficients = [
        {"name": c, "value": getattr(law, c), "raw": getattr(raw, c), **_interval([getattr(s, c) for s in samples])}
        for c in (*maths.COEFFICIENTS[:4], "a_D", *maths.COEFFICIENTS[5:])
    ]
    return {
        "name": name, "runs": len(runs), "law": {k: getattr(law, k) for k in (*maths.COEFFICIENTS, "N_unit", "D_unit")},
        "coefficients": coefficients, "loss": found.loss, "log": found.log, "delta": found.delta, "agreeing": found.agreeing,
        "starts": found.starts, "most_S": most, "mean_error": float(off.mean()), "largest_error": float(off.max()), "most": law.most,
        "factors": [
            {"S": s, "value": float(law.factor(s)), "beyond": s > most + 1e-3, **_interval([float(x.factor(s)) for x in samples])}
            for s in asked
        ],
        "optimum": [_optimum(law, n, d, most, D) for n in (N.min(), N.max()) for d in (D.min(), D.max(), 10 * D.max())],
        "left_out": _left_out(S, N, D, L, fitting),
        "notes": _notes(found, S, N, D),
    }  # fmt: skip


def _optimum(law: maths.Law, N: float, D0: float, most: float, D: np.ndarray) -> dict[str, Any]:
    best = {cost: float(maths.optimal_sparsity(law, N, D0, cost)) for cost in maths.COSTS}
    beyond = {f"{cost}_beyond": most + 1e-3 < S for cost, S in best.items()}
    return {"N": float(N), "D0": float(D0), "beyond": bool(np.max(D) < D0), **best, **beyond}


def _left_out(S: np.ndarray, N: np.ndarray, D: np.ndarray, L: np.ndarray, fitting: Fitting) -> dict[str, Any] | None:
    found = maths.largest_left_out(S, N, D, L, **fitting.settings)
    if found is None:
        return None
    out, predicted = found
    off = predicted / L[out] - 1
    return {"N": float(N[out].max()), "runs": int(out.sum()), "mean_error": float(np.abs(off).mean()), "bias": float(off.mean())}


def _notes(found: maths.Fit, S: np.ndarray, N: np.ndarray, D: np.ndarray) -> list[str]:
    """What weakens a fit, one sentence each."""
    law, notes = found.law, []
    counts = [len(np.unique(v.round(3))) for v in (S, np.log(N), np.log(D))]
    for count, what in zip(counts, ("sparsities: a_S, b_S and c_S", "sizes: b_N and c", "lengths: a_D, b_D and c")):
        if count < 3:
            name, _, who = what.partition(": ")
            notes.append(f"Only {count} {name} were measured, so {who} trade off; read predictions rather than coefficients.")
    if found.agreeing < found.starts / 5:
        notes.append(f"Only {found.agreeing} of {found.starts} starts ended within 1 % of the best loss; the law may be a local one.")
    if S.max() > 0 and law.a_S <= 1e-6 * law.c_S:
        notes.append("a_S is not above zero: at equal non-zeros sparse models were no better than dense ones, so dense is best throughout.")
    if law.c_S < 1e-6 * law.a_S:
        notes.append("c_S is at zero: no saturation was seen, and the factor has no limit as S goes to 1.")
    if law.c < 1e-6 * law.capacity(0.0):
        notes.append("c is at zero: the runs are too far from the floor of the loss to show it.")
    return notes


def _arrays(runs: Sequence[Run]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    S, N, D, L = (np.array([r[key] for r in runs], np.float64) for key in "SNDL")
    return S, N, D, L


def _interval(values: Sequence[float]) -> dict[str, float | None]:
    known = [v for v in values if np.isfinite(v)]
    if not known:
        return {"low": None, "high": None}
    low, high = np.percentile(known, [2.5, 97.5])
    return {"low": float(low), "high": float(high)}


def _label(sparsity: str) -> str:
    """ "0" → "dense", "0.75" → "S = 0.75", "2:4" → "2:4"."""
    if ":" in sparsity:
        return sparsity
    return "dense" if float(sparsity) == 0 else f"S = {float(sparsity):g}"


def _label_of(run: Run) -> str:
    return run["pattern"] if run["pattern"] != UNSTRUCTURED else _label(f"{round(run['S'], 4):g}")


def _facts(design: Design, runs: Sequence[Run], what: str) -> list[list[str]]:
    steps = f"{design.batch_size} rows of {design.context} {what} a step"
    schedule = "25 % of the steps dense, 50 % on the cubic, 25 % with fixed masks; uniform over matrices"
    start = (
        "pretrained weights" if design.models else f"dense training on {design.pretrain:,} bytes" if design.pretrain else "random weights"
    )
    tables = "1 − √(1 − S)" if design.tables == "auto" else "dense"
    return [
        ["Runs", f"{len(runs)}, each with its own schedules; {steps}, the same order for all; from {start}"],
        ["Pruning", f"{schedule}; embedding and output tables {tables}; n:m by {design.nm}"],
        ["Cost", f"{sum(r['flops'] for r in runs):.2g} operations in pruned matrices if zeros were free (6 N D c_mul); "
                 f"{show.seconds(sum(r['seconds'] for r in runs))} of training"],
    ]  # fmt: skip


# -- tables -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A table for the terminal and the page; all columns but the first `left` are numbers."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: tuple[str, ...] = ()
    left: int = 1


def tables(data: Mapping[str, Any]) -> list[Table]:
    """The results as text: losses, then for each fit the law, dense models of equal loss, the best sparsity."""
    made = [losses] if (losses := _losses(data)) else []
    for fit in data["fits"]:
        made += [_coefficients(fit, data["unit"]), _factors(fit), _best(fit, data["unit"])]
    return made


def _losses(data: Mapping[str, Any]) -> Table | None:
    runs = data["runs"]
    if not all("model" in r and "length" in r for r in runs):
        return None
    lengths = sorted({r["D"] for r in runs})
    rows: dict[tuple[str, str, float], dict[float, float]] = {}
    for r in runs:
        rows.setdefault((r["model"], r["label"], r["N"]), {})[r["D"]] = r["L"]
    body = [
        (*key[:2], show.count(key[2]), *(f"{found[d]:.4f}" if d in found else show.NONE for d in lengths)) for key, found in rows.items()
    ]
    header = ("size", "sparsity", "non-zeros N", *(f"D = {d:,.0f}" for d in lengths))
    return Table(f"Held-out loss after D {data['unit']}", header, body, left=2)


def _coefficients(fit: Mapping[str, Any], unit: str) -> Table:
    N_unit, D_unit = (f"{fit['law'][k]:.3g}" for k in ("N_unit", "D_unit"))
    rows = [(c["name"], _short(c["value"]), _between(c), _short(c["raw"])) for c in fit["coefficients"]]
    header = ("", f"N in {N_unit}, D in {D_unit} {unit}", "95 %", "plain counts")
    said = [
        f"Mean error {100 * fit['mean_error']:.2f} %, largest {100 * fit['largest_error']:.2f} %; Huber loss {fit['loss']:.4g}; "
        f"{fit['agreeing']} of {fit['starts']} starts agree."
    ]
    if fit["left_out"]:
        left = fit["left_out"]
        said.append(
            f"Fitted without its largest size (N = {left['N']:,.0f}), the law misses those {left['runs']} runs by "
            f"{100 * left['mean_error']:.2f} % (mean; bias {100 * left['bias']:+.2f} %)."
        )
    return Table(f"Law, {fit['name']}: {fit['runs']} runs", header, rows, (*said, *fit["notes"]))


def _factors(fit: Mapping[str, Any]) -> Table:
    rows = [(f"{f['S']:g}", f"{_fixed(f['value'])}{'*' if f['beyond'] else ''}", _between(f, ".2f")) for f in fit["factors"]]
    limit = (
        ""
        if fit["most"] is None or fit["law"]["a_S"] <= 0
        else f"As S goes to 1 the factor tends to {_short(fit['most'])}, outside all data."
    )
    return Table(
        f"Dense models of equal loss, {fit['name']}", ("S", "N dense / N", "95 %"), rows, tuple(n for n in (_beyond(rows), limit) if n)
    )


def _best(fit: Mapping[str, Any], unit: str) -> Table:
    rows = []
    for o in fit["optimum"]:
        best = (f"{o[c]:.3f}{'*' if o[f'{c}_beyond'] else ''}" for c in ("dense", "gradual"))
        rows.append((show.count(o["N"]), f"{o['D0']:,.0f}{'*' if o['beyond'] else ''}", *best))
    header = ("non-zeros N", f"budget D0, dense {unit}", "S, zeros computed", "S, zeros skipped")
    return Table(f"Sparsity of least loss, {fit['name']}", header, rows, tuple(n for n in (_beyond(rows),) if n), left=0)


def _beyond(rows: Iterable[Sequence[str]]) -> str:
    return "* beyond what was measured: extrapolated" if any("*" in cell for row in rows for cell in row) else ""


def _short(value: float | None) -> str:
    return show.NONE if value is None else "0" if abs(value) < 1e-6 else f"{value:.4g}"


def _fixed(value: float | None) -> str:
    return show.NONE if value is None else f"{value:.2f}"


def _between(entry: Mapping[str, Any], form: str = ".3g") -> str:
    return (
        show.NONE
        if entry.get("low") is None
        else " – ".join("0" if abs(v) < 1e-6 else f"{v:{form}}" for v in (entry["low"], entry["high"]))
    )
