"""The report: one HTML file that opens from a mail, fetches nothing and prints well.

A study is a plain dict, so that any caller (a live board too) can render one:

    title, subtitle     text
    metric              {"name": "accuracy", "fraction": True, "higher": True}
    facts               [[name, text], …]: how it was measured
    rows                one dict a method: label, method (its spec), trained, total, value, low, high, n, seconds, seconds_per_step,
                        peak_memory, adapter_bytes, curve [{"step", "loss"?, "value"?}], correct [0 | 1, …],
                        best, alike (cannot be told apart from the best), reference, error

Everything but `label` may be missing or None. All functions here but `write` are pure.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.study import charts
from veneer.study import format as show
from veneer.study.page import SCRIPT, STYLE
from veneer.study.svg import esc

MOST_DATA = 500_000
"""Bytes of data in the page; the whole page stays under a megabyte."""

COLUMNS = (
    ("method", "method", "method"),
    ("trained", "trained parameters", "parameters"),
    ("share", "% of model", "share"),
    ("value", "", ""),
    ("interval", "95 % interval", "interval"),
    ("seconds", "time", "time"),
    ("peak_memory", "peak memory", "memory"),
    ("adapter_bytes", "adapter on disk", "on disk"),
)
"""Key, heading, and the short name that stands beside each value on a narrow screen; "" is the metric's name."""


def write(folder: str | Path, study: Mapping[str, Any]) -> Path:
    """Writes `report.html` into the folder and gives its path; an old report stays until the new one is complete."""
    path = Path(folder) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, page(study))
    return path


def replace_text(path: Path, text: str) -> None:
    """Writes a file in one step: a reader, or a crash, sees the old text or the new one."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def page(study: Mapping[str, Any]) -> str:
    """The whole page."""
    study = _whole(study)
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    subtitle = f'<p class="sub">{esc(study["subtitle"])}</p>' if study.get("subtitle") else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><title>{esc(study["title"])}</title><style>{STYLE}</style></head>'
        f'<body><main><header><h1>{esc(study["title"])}</h1>{subtitle}<p class="verdict">{esc(verdict(study))}</p></header>'
        f"{table(study)}{chips(study)}{figures(study)}{facts(study)}</main>"
        f'<div id="tip" role="status"></div><script type="application/json" id="study">{embedded(study)}</script>'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def verdict(study: Mapping[str, Any]) -> str:
    """The outcome in at most three sentences: the winner, how far it is from the reference, who cannot be told apart."""
    metric, rows = study["metric"], study["rows"]
    best = next((r for r in rows if r.get("best")), None)
    if best is None:
        return "No method has a result yet."
    text = f"{best['label']} is best: {show.metric_value(best['value'], metric)} {metric['name']}"
    if best.get("low") is not None:
        text += f" (95 % interval {show.interval(best['low'], best['high'], metric)})"
    share = show.share(best.get("trained"), best.get("total"))
    text += f", training {share} of the model." if share != show.NONE else "."
    known = [r for r in rows if r.get("reference") and r.get("value") is not None and r is not best]
    if known:
        reference = max(known, key=lambda r: r["value"] if metric.get("higher", True) else -r["value"])
        text += f" {_difference(best, reference, metric)}"
    alike = [r["label"] for r in rows if r.get("alike") and r is not best]
    if alike:
        text += f" On this test split it cannot be told apart from {_listed(alike)}."
    elif len(rows) > 1:
        text += " Every other row is worse beyond chance."
    return text


def table(study: Mapping[str, Any]) -> str:
    """The results, sortable when scripts run and complete when they don't."""
    metric = study["metric"]
    head = "".join(f'<th scope="col"><button type="button">{esc(name or metric["name"])}</button></th>' for _, name, _ in COLUMNS)
    body = "".join(_table_row(i, r, metric) for i, r in enumerate(study["rows"]))
    note = ("≈ best: cannot be told apart from the best row on the same test examples (exact McNemar test, 5 %, Holm-adjusted; "
            "rows without single answers: overlapping intervals).")  # fmt: skip
    return (f'<section aria-label="Results"><div class="wrap"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
            f'<p class="note">{note}</p></section>')  # fmt: skip


def chips(study: Mapping[str, Any]) -> str:
    """The legend: one button a method, which hides and shows it in all charts."""
    buttons = "".join(
        f'<button type="button" aria-pressed="true" data-of="{i}">{charts.glyph(i)}{esc(r["label"])}</button>'
        for i, r in charts.drawn(study)
    )
    return f'<div class="chips" role="group" aria-label="Show or hide methods in the charts">{buttons}</div>'


def figures(study: Mapping[str, Any]) -> str:
    """All charts with their captions."""
    name = study["metric"]["name"]
    drawings = (
        (f"{name.capitalize()} of every method", "whiskers: 95 % interval; band: interval of the best", charts.forest_chart(study)),
        (f"{name.capitalize()} and trained parameters", "up and left is better" if _higher(study) else "down and left is better",
         charts.parameters_chart(study)),
        (f"{name.capitalize()} and time", "training, with the evaluations during it", charts.time_chart(study)),
        (f"{name.capitalize()}, time and parameters", "bubble area: trained parameters", charts.bubble_chart(study)),
        (f"Held-out {name} while training", "evaluated on the validation split",
         charts.curves_chart(study, "value", f"Held-out {name} by step", name)),
        ("Training loss", "mean over short stretches of steps", charts.curves_chart(study, "loss", "Training loss by step", "loss")),
    )  # fmt: skip
    return '<div class="charts">' + "".join(
        f"<figure><figcaption>{esc(title)}<span>{esc(hint)}</span></figcaption>{drawing}</figure>" for title, hint, drawing in drawings
    ) + "</div>"  # fmt: skip


def facts(study: Mapping[str, Any]) -> str:
    """How it was measured."""
    items = "".join(f"<dt>{esc(name)}</dt><dd>{esc(text)}</dd>" for name, text in study.get("facts") or [])
    return f'<section aria-label="How it was measured"><h2>How it was measured</h2><dl>{items}</dl></section>' if items else ""


def embedded(study: Mapping[str, Any]) -> str:
    """The study as JSON that cannot end the script element it stands in; what is too long for a page is left out."""
    for left_out in ((), ("correct",), ("correct", "curve")):
        rows = [{k: _few(v) if k == "curve" else v for k, v in r.items() if k not in left_out} for r in study["rows"]]
        text = json.dumps({**study, "rows": rows}, separators=(",", ":"), allow_nan=False, default=str)
        if len(text) < MOST_DATA:
            break
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _whole(study: Mapping[str, Any]) -> dict[str, Any]:
    """The study with defaults filled in and without numbers that JSON cannot hold."""
    metric = {"name": "accuracy", "fraction": True, "higher": True, **(study.get("metric") or {})}
    clean = finite({"title": "Study", **study, "metric": metric})
    clean["rows"] = [{"label": str(r.get("method") or "?"), **r} for r in clean.get("rows") or []]
    return clean


def finite(value: Any) -> Any:
    """The value with None for every number that JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


def _few(curve: Sequence[Any], most: int = 200) -> list[Any]:
    every = max(1, math.ceil(len(curve) / most))
    return [p for k, p in enumerate(curve) if k % every == 0 or k == len(curve) - 1]


def _table_row(index: int, row: Mapping[str, Any], metric: Mapping[str, Any]) -> str:
    kinds = " ".join(k for k in ("best", "reference") if row.get(k))
    badge = "best" if row.get("best") else "≈ best" if row.get("alike") else ""
    spec = row.get("method")
    first = (f'{charts.glyph(index)} {esc(row["label"])}' + (f'<span class="badge">{badge}</span>' if badge else "")
             + (f"<code>{esc(spec)}</code>" if spec and spec != row["label"] else ""))  # fmt: skip
    cells = [f'<td class="name" data-v="{esc(row["label"])}">{first}</td>']
    if row.get("error"):
        cells.append(f'<td class="fail" colspan="{len(COLUMNS) - 1}">{esc(row["error"])}</td>')
    else:
        for key, _, name in COLUMNS[1:]:
            value, text = _cell(key, row, metric)
            cells.append(f'<td data-name="{esc(name or metric["name"])}" data-v="{esc("" if value is None else value)}">{esc(text)}</td>')
    return f'<tr class="{kinds}">{"".join(cells)}</tr>'


def _cell(key: str, row: Mapping[str, Any], metric: Mapping[str, Any]) -> tuple[Any, str]:
    """(what the column sorts by, what it shows)."""
    if key == "share":
        trained, total = row.get("trained"), row.get("total")
        return (trained / total if trained is not None and total else None), show.share(trained, total)
    if key == "interval":
        return row.get("low"), show.interval(row.get("low"), row.get("high"), metric)
    value = row.get(key)
    forms = {"trained": show.count, "seconds": show.seconds, "peak_memory": show.size, "adapter_bytes": show.size}
    return value, show.metric_value(value, metric) if key == "value" else forms[key](value)


def _difference(best: Mapping[str, Any], reference: Mapping[str, Any], metric: Mapping[str, Any]) -> str:
    gap = abs(best["value"] - reference["value"])
    amount = f"{100 * gap:.1f} points" if metric.get("fraction") else f"{gap:.3g}"
    apart = reference.get("low") is not None and (reference["high"] < best["low"] or best["high"] < reference["low"])
    beyond = ", beyond both intervals" if apart else ""
    return f"That is {amount} {'above' if metric.get('higher', True) else 'below'} {reference['label']}{beyond}."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _higher(study: Mapping[str, Any]) -> bool:
    return bool(study["metric"].get("higher", True))
