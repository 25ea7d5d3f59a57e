"""Pictures of a sparse scaling law: loss over non-zeros, predicted over measured, contours of the best sparsity.

A picture is a `Chart`, plain data; it is drawn as SVG for the report, and as PNG where matplotlib is there.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from veneer.maths.scaling_law import contour, optimal_sparsity
from veneer.study import format as show
from veneer.study.charts import glyph, style_of
from veneer.study.page import SCRIPT, STYLE
from veneer.study.scaling_law import Table, law_of, tables
from veneer.study.svg import Labels, Scale, esc, number, padded, shape

WIDTH, HEIGHT = 400, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 388, 14, 252
LEVELS = (0.0, 0.1, 0.25, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999)
MOST_LEVELS = 6


@dataclass(frozen=True)
class Series:
    """Points, or a line through them, of one colour; `dashed` and `named` (at its end) are for lines."""

    label: str
    index: int
    x: tuple[float, ...]
    y: tuple[float, ...]
    line: bool = False
    dashed: bool = False
    named: bool = False


@dataclass(frozen=True)
class Chart:
    """One picture."""

    slug: str
    title: str
    hint: str
    x_title: str
    y_title: str
    series: tuple[Series, ...]
    log_x: bool = False
    log_y: bool = False


# -- what is drawn ----------------------------------------------------------------------------------------------


def charts(data: Mapping[str, Any]) -> list[Chart]:
    """The three pictures."""
    return [_sizes(data), _predictions(data), _contours(data)]


def groups(data: Mapping[str, Any]) -> list[str]:
    """Labels of the sparsities, dense first; the place in this list is the colour."""
    least = {r["label"]: (r["pattern"] != "unstructured", r["S"]) for r in data["runs"]}
    return sorted(least, key=lambda label: least[label])


def _sizes(data: Mapping[str, Any]) -> Chart:
    runs = data["runs"]
    counts = {d: sum(r["D"] == d for r in runs) for d in {r["D"] for r in runs}}
    D = max(counts, key=lambda d: (counts[d], d))
    series = []
    for i, label in enumerate(groups(data)):
        own = [r for r in runs if r["label"] == label and r["D"] == D]
        if not own:
            continue
        law = law_of(data["fits"][-1] if own[0]["pattern"] != "unstructured" else data["fits"][0])
        N = np.geomspace(min(r["N"] for r in own) / 1.3, max(r["N"] for r in own) * 1.3, 40)
        series.append(Series(label, i, tuple(N), tuple(law(own[0]["S"], N, D)), line=True))
        series.append(Series(label, i, tuple(r["N"] for r in own), tuple(r["L"] for r in own)))
    hint = f"at D = {D:,.0f} {data['unit']}; marks measured, lines the law"
    return Chart("sizes", "Loss and non-zero weights", hint, "non-zero weights N (log)", "loss L", tuple(series), log_x=True)


def _predictions(data: Mapping[str, Any]) -> Chart:
    runs = data["runs"]
    ends = padded([v for r in runs for v in (r["L"], r["predicted"])])
    series = [Series("equal", 6, ends, ends, line=True, dashed=True)]
    for i, label in enumerate(groups(data)):
        own = [r for r in runs if r["label"] == label]
        series.append(Series(label, i, tuple(r["predicted"] for r in own), tuple(r["L"] for r in own)))
    return Chart("predictions", "Predicted and measured loss", "on the line both are equal", "predicted", "measured", tuple(series))


def _contours(data: Mapping[str, Any]) -> Chart:
    """Lines of equal best sparsity over (N, D0), with the budgets that were measured as marks."""
    law, runs = law_of(data["fits"][0]), data["runs"]
    N, D = np.array([r["N"] for r in runs]), np.array([r["D"] for r in runs])
    xs, ys = (N.min() / 2, N.max() * 2), (D.min() / 3, D.max() * 30)
    grid = np.geomspace(*xs, 60)
    found: list[Series] = []
    corners = np.array([xs[1], xs[0]]), np.array([ys[0], ys[1]])  # the densest and the sparsest of the picture
    ranges = {cost: optimal_sparsity(law, *corners, cost) for cost in ("gradual", "dense")}
    levels = [s for s in LEVELS if any(low <= s <= high for low, high in ranges.values())]
    for i, s in enumerate(levels[:: -(-len(levels) // MOST_LEVELS) or 1]):
        beyond = "*" if s > data["fits"][0]["most_S"] + 1e-3 else ""
        for cost in ranges:
            D0 = contour(law, s, grid, cost)
            inside = (ys[0] <= D0) & (ys[1] >= D0)
            if inside.sum() > 1:
                line = tuple(grid[inside]), tuple(D0[inside])
                found.append(Series(f"{s:g}{beyond}", i, *line, line=True, dashed=cost == "dense", named=True))
    marks = Series("measured", 6, tuple(N), tuple(D))
    hint = "solid: zeros skipped; dashed: zeros computed" if found else "dense is best everywhere here"
    hint += f"; marks: runs; * beyond S = {data['fits'][0]['most_S']:.4g}"
    titles = "non-zero weights N (log)", f"budget D0 in dense {data['unit']} (log)"
    return Chart("contours", "Sparsity of least loss", hint, *titles, (*found, marks), log_x=True, log_y=True)


# -- SVG --------------------------------------------------------------------------------------------------------


def svg(chart: Chart) -> str:
    """A chart as SVG text."""
    right = RIGHT - (30 if any(s.named for s in chart.series) else 0)
    x = Scale(*padded([v for s in chart.series for v in s.x], log=chart.log_x, part=0.05), LEFT, right, chart.log_x)
    y = Scale(*padded([v for s in chart.series for v in s.y], log=chart.log_y, part=0.05), BOTTOM, TOP, chart.log_y)
    parts = [
        f'<path class="grid" d="M{number(x(t))} {TOP}V{BOTTOM}"/><text class="tick" x="{number(x(t))}" y="{BOTTOM + 16}" '
        f'text-anchor="middle">{esc(_tick(t, chart.log_x))}</text>'
        for t in x.ticks(4)
    ]
    parts += [
        f'<path class="grid" d="M{LEFT} {number(y(t))}H{right}"/><text class="tick" x="{LEFT - 6}" y="{number(y(t) + 4)}" '
        f'text-anchor="end">{esc(_tick(t, chart.log_y))}</text>'
        for t in y.ticks(5)
    ]
    middle = number((TOP + BOTTOM) / 2)
    parts.append(f'<text class="axis" x="{(LEFT + right) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{esc(chart.x_title)}</text>')
    parts.append(
        f'<text class="axis" x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">{esc(chart.y_title)}</text>'
    )
    parts += [_drawn(s, chart, x, y) for s in chart.series]
    room = Labels(LEFT, TOP - 8, RIGHT + 8, BOTTOM)
    for s in (s for s in chart.series if s.named):
        spot = room.place(s.label, x(s.x[-1]), y(s.y[-1]), 4)
        if spot:
            name = f'<text x="{number(spot[0])}" y="{number(spot[1])}" text-anchor="{spot[2]}">{esc(s.label)}</text>'
            parts.append(f'<g class="{style_of(s.index)[0]}">{name}</g>')
    said = "; ".join(f"{s.label}: {len(s.x)} {'points of a line' if s.line else 'marks'}" for s in chart.series)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{chart.slug}-t {chart.slug}-d">'
        f'<title id="{chart.slug}-t">{esc(chart.title)}</title><desc id="{chart.slug}-d">{esc(said)}</desc>{"".join(parts)}</svg>'
    )


def _drawn(s: Series, chart: Chart, x: Scale, y: Scale) -> str:
    colour, mark = style_of(s.index)
    if s.line:
        path = "M" + "L".join(f"{number(x(a))} {number(y(b))}" for a, b in zip(s.x, s.y))
        dash = ' stroke-dasharray="6 4"' if s.dashed else ""
        inner = f'<path class="line" d="{path}"{dash}/>'
    else:
        inner = "".join(f'<g class="mark">{shape(mark, x(a), y(b), 4.5)}</g>' for a, b in zip(s.x, s.y))
    own = s.index if chart.slug != "contours" else f"{chart.slug}-{s.label}"
    tip = esc(f"{s.label}\n{len(s.x)} runs" if not s.line else s.label)
    return f'<g class="series {colour}" data-m="{own}" tabindex="0" data-tip="{tip}">{inner}</g>'


def _tick(value: float, log: bool) -> str:
    return show.short_count(value) if log or value >= 1000 else f"{value:.3g}"


# -- the page ---------------------------------------------------------------------------------------------------


def page(data: Mapping[str, Any]) -> str:
    """The report: one file that fetches nothing."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    buttons = "".join(
        f'<button type="button" aria-pressed="true" data-of="{i}">{glyph(i)}{esc(label)}</button>' for i, label in enumerate(groups(data))
    )
    figures = "".join(f"<figure><figcaption>{esc(c.title)}<span>{esc(c.hint)}</span></figcaption>{svg(c)}</figure>" for c in charts(data))
    facts = "".join(f"<dt>{esc(name)}</dt><dd>{esc(text)}</dd>" for name, text in data["facts"])
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><title>{esc(data["title"])}</title><style>{STYLE}</style></head>'
        f'<body><main><header><h1>{esc(data["title"])}</h1><p class="verdict">{esc(verdict(data))}</p></header>'
        f'<div class="chips" role="group" aria-label="Show or hide sparsities in the charts">{buttons}</div>'
        f'<div class="charts">{figures}</div>{"".join(map(_section, [*tables(data), _runs(data)]))}'
        f'<section aria-label="How it was measured"><h2>How it was measured</h2><dl>{facts}</dl></section></main>'
        f'<div id="tip" role="status"></div><script>{SCRIPT}</script></body></html>\n'
    )


def verdict(data: Mapping[str, Any]) -> str:
    """The outcome in two sentences."""
    fit = data["fits"][0]
    text = f"The law fits {fit['runs']} runs with a mean error of {100 * fit['mean_error']:.2f} %."
    known = [f for f in fit["factors"] if not f["beyond"] and f["value"] is not None]
    if known:
        said = ", ".join(f"{f['value']:.2f} at S = {f['S']:g}" for f in known)
        text += f" A dense model of the same loss has this many times the non-zeros: {said}."
    return text


def _runs(data: Mapping[str, Any]) -> Table:
    rows = [
        (
            r["label"],
            show.count(r["N"]),
            f"{r['D']:,.6g}",
            f"{r['L']:.4f}",
            f"{r['predicted']:.4f}",
            f"{100 * (r['predicted'] / r['L'] - 1):+.2f}",
        )
        for r in data["runs"]
    ]
    return Table("Runs", ("sparsity", "non-zeros N", f"D, {data['unit']}", "loss", "predicted", "off, %"), rows)


def _section(table: Table) -> str:
    head = "".join(f'<th scope="col"><button type="button">{esc(h)}</button></th>' for h in table.header)
    body = "".join(
        "<tr>"
        + "".join(f'<td data-name="{esc(h)}" data-v="{esc(_sorted_by(c))}">{esc(c)}</td>' for h, c in zip(table.header, row))
        + "</tr>"
        for row in table.rows
    )
    notes = "".join(f'<p class="note">{esc(note)}</p>' for note in table.notes)
    return (
        f'<section aria-label="{esc(table.title)}"><h2>{esc(table.title)}</h2><div class="wrap"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{notes}</section>"
    )


def _sorted_by(cell: str) -> str:
    return cell.replace(",", "").replace("*", "").replace("+", "")


# -- PNG --------------------------------------------------------------------------------------------------------


def pictures(folder: str | Path, data: Mapping[str, Any]) -> list[Path]:
    """Writes `sizes.png`, `predictions.png` and `contours.png` and gives their paths. Raises `MissingExtra` without matplotlib."""
    from veneer.study.plots import _figure_class

    make = _figure_class()
    return [_picture(make(), Path(folder) / f"{chart.slug}.png", chart) for chart in charts(data)]


def _picture(figure: Any, path: Path, chart: Chart) -> Path:
    from veneer.study.plots import COLOURS, MARKS

    axes = figure.add_subplot()
    for s in chart.series:
        colour = COLOURS[s.index % len(COLOURS)]
        if s.line:
            axes.plot(s.x, s.y, "--" if s.dashed else "-", color=colour, linewidth=1.4)
        else:
            axes.plot(s.x, s.y, MARKS[s.index % len(MARKS)], color=colour, markersize=5, label=s.label)
        if s.named:
            axes.annotate(s.label, (s.x[-1], s.y[-1]), xytext=(4, 0), textcoords="offset points", color=colour, fontsize=9, va="center")
    for log, axis, scale in ((chart.log_x, axes.xaxis, axes.set_xscale), (chart.log_y, axes.yaxis, axes.set_yscale)):
        if log:
            scale("log")
            axis.set_major_formatter(lambda v, _: show.short_count(v))
            axis.set_minor_formatter(lambda v, _: "")
    axes.set_title(chart.title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(f"{chart.x_title}\n{chart.hint}", fontsize=9)
    axes.set_ylabel(chart.y_title)
    axes.legend(frameon=False, fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for text in figure.findobj(lambda artist: hasattr(artist, "set_parse_math")):
        text.set_parse_math(False)
    part = path.with_name(f".{path.stem}.part.png")
    figure.savefig(part)
    part.replace(path)
    return path
