"""The report's charts: pure functions from a study (see `report`) to SVG text. Colours come from the page's style sheet.

A method keeps one colour, one mark and one dash pattern everywhere, so that no chart needs colour to be read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from veneer.study import format as show
from veneer.study.svg import CHAR, Labels, Scale, esc, number, padded, shape, spread

WIDTH, HEIGHT = 400, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 388, 14, 252
COLOURS = 8
DASHES = ("", "7 3", "2 3", "9 3 2 3", "5 2", "1 2")
MOST_POINTS = 40

Row = Mapping[str, Any]
StudyDict = Mapping[str, Any]


def style_of(index: int) -> tuple[str, int]:
    """Class and mark of the method at this position: 8 colours × 7 marks before one comes again."""
    return f"c{index % COLOURS}", index % 7


def drawn(study: StudyDict) -> list[tuple[int, Row]]:
    """(position, row) of the rows that have a result."""
    return [(i, r) for i, r in enumerate(study["rows"]) if r.get("value") is not None]


def parameters_chart(study: StudyDict) -> str:
    """Metric against trained parameters, on a logarithmic axis, with interval whiskers."""
    rows = [(i, r) for i, r in drawn(study) if r.get("trained")]
    return _scatter(study, rows, "parameters", lambda r: float(r["trained"]), "trained parameters (log)", show.short_count, log=True)


def time_chart(study: StudyDict) -> str:
    """Metric against training time, with interval whiskers."""
    rows = [(i, r) for i, r in drawn(study) if r.get("seconds")]
    return _scatter(study, rows, "time", lambda r: float(r["seconds"]), "training time", show.seconds, log=_wide(rows, "seconds"))


def bubble_chart(study: StudyDict) -> str:
    """Metric against training time; the bubble's area is the number of trained parameters."""
    rows = [(i, r) for i, r in drawn(study) if r.get("seconds") and r.get("trained")]
    most = max((r["trained"] for _, r in rows), default=1)

    def radius(r: Row) -> float:
        return max(3.0, 24.0 * math.sqrt(r["trained"] / most))

    return _scatter(
        study, rows, "bubble", lambda r: float(r["seconds"]), "training time", show.seconds,
        log=_wide(rows, "seconds"), radius=radius, whiskers=False, note=f"largest bubble: {show.count(most)} parameters",
    )  # fmt: skip


def forest_chart(study: StudyDict) -> str:
    """One line a method: the value and its interval; the band is the best method's interval."""
    rows = drawn(study)
    metric = study["metric"]
    height = max(HEIGHT, 60 + 26 * len(rows))
    bottom = height - 48
    name_width = min(150.0, 12 + CHAR * max((len(_short(r["label"])) for _, r in rows), default=4))
    scale = Scale(*padded([v for _, r in rows for v in _ends(r)]), name_width + 8, RIGHT)
    parts = [_vertical_grid(scale, TOP, bottom, lambda v: _tick(v, metric), about=4)]
    best = next((r for _, r in rows if r.get("best")), None)
    if best:
        low, high = _ends(best)
        x0, x1 = scale(low), scale(high)
        parts.append(f'<rect class="band" x="{number(x0)}" y="{TOP}" width="{number(x1 - x0)}" height="{number(bottom - TOP)}"/>')
    step = (bottom - TOP) / max(len(rows), 1)
    for place, (i, r) in enumerate(rows):
        y = TOP + step * (place + 0.5)
        low, high = _ends(r)
        marks = _bar(scale(low), y, scale(high), y) + _mark(i, scale(r["value"]), y, 5)
        name = f'<text x="{number(name_width)}" y="{number(y + 4)}" text-anchor="end">{esc(_short(r["label"]))}</text>'
        parts.append(_group(i, r, metric, name + marks))
    parts.append(_x_title(metric["name"] + ", 95 % interval", (name_width + 8 + RIGHT) / 2, height))
    described = "; ".join(_said(r, metric) for _, r in rows)
    return _svg("forest", f"{metric['name']} of every method with its 95 % interval", described, parts, height)


def curves_chart(study: StudyDict, key: str, title: str, axis: str) -> str:
    """Learning curves: `key` of every curve point against the step. Names stand at the ends of the lines."""
    metric = study["metric"]
    fraction = bool(metric.get("fraction")) and key == "value"
    lines = [(i, r, _thinned([(p["step"], p[key]) for p in r.get("curve") or [] if p.get(key) is not None])) for i, r in drawn(study)]
    lines = [(i, r, pts) for i, r, pts in lines if len(pts) > 1]
    slug = f"curve-{key}"
    if not lines:
        return _svg(
            slug,
            title,
            "No curve was recorded.",
            [f'<text class="muted" x="{WIDTH / 2}" y="{HEIGHT / 2}" text-anchor="middle">no curve</text>'],
        )
    right = RIGHT - min(120.0, CHAR * max(len(_short(r["label"], 16)) for _, r, _ in lines) + 16)
    x = Scale(0, max(p[0] for *_, pts in lines for p in pts), LEFT, right)
    y = Scale(*padded([p[1] for *_, pts in lines for p in pts]), BOTTOM, TOP)
    parts = [
        _vertical_grid(x, TOP, BOTTOM, show.short_count, about=4),
        _horizontal_grid(y, LEFT, right, lambda v: _tick(v, {"fraction": fraction})),
        _x_title("optimiser step", (LEFT + right) / 2, HEIGHT),
        _y_title(axis),
    ]
    heights = spread([y(pts[-1][1]) for *_, pts in lines], 13, TOP + 4, BOTTOM - 2)
    for (i, r, pts), label_y in zip(lines, heights):
        path = "M" + "L".join(f"{number(x(a))} {number(y(b))}" for a, b in pts)
        dash = DASHES[i % len(DASHES)]
        attribute = f' stroke-dasharray="{dash}"' if dash else ""
        end = pts[-1]
        name = f'<text x="{number(right + 16)}" y="{number(label_y + 4)}">{esc(_short(r["label"], 16))}</text>'
        lead = f'<path class="lead" d="M{number(x(end[0]) + 4)} {number(y(end[1]))}L{number(right + 13)} {number(label_y)}"/>'
        inner = f'<path class="line" d="{path}"{attribute}/>{lead}{_mark(i, x(end[0]), y(end[1]), 3.5)}{name}'
        parts.append(_group(i, r, metric, inner))
    said = "; ".join(
        f"{r['label']}: {pts[0][1]:.4g} at step {pts[0][0]:g} to {pts[-1][1]:.4g} at step {pts[-1][0]:g}" for _, r, pts in lines
    )
    return _svg(slug, title, said, parts)


def glyph(index: int) -> str:
    """The method's mark alone, for legends and table rows; decoration beside a written name."""
    name, kind = style_of(index)
    return f'<svg class="glyph {name}" viewBox="0 0 16 16" aria-hidden="true"><g class="mark">{shape(kind, 8, 8, 5)}</g></svg>'


def _scatter(
    study: StudyDict, rows: Sequence[tuple[int, Row]], slug: str, x_of: Callable[[Row], float], axis: str, tick: Callable[[float], str],
    *, log: bool, radius: Callable[[Row], float] | None = None, whiskers: bool = True, note: str = "",
) -> str:  # fmt: skip
    metric = study["metric"]
    x = Scale(*padded([x_of(r) for _, r in rows], log=log, part=0.12), LEFT, RIGHT, log)
    seen = [v for _, r in rows for v in (_ends(r) if whiskers else (r["value"],))]
    y = Scale(*padded(seen, part=0.08 if whiskers else 0.25), BOTTOM, TOP)
    room = Labels(LEFT + 2, TOP - 6, RIGHT + 8, BOTTOM - 2)
    size = {i: radius(r) if radius else 5.5 for i, r in rows}
    for i, r in rows:
        cx, cy, s = x(x_of(r)), y(r["value"]), size[i]
        room.block(cx - s, cy - s, cx + s, cy + s)
        if whiskers:
            low, high = _ends(r)
            room.block(cx - 2, y(high), cx + 2, y(low))
    parts = [
        _vertical_grid(x, TOP, BOTTOM, tick, about=4),
        _horizontal_grid(y, LEFT, RIGHT, lambda v: _tick(v, metric)),
        _x_title(axis, (LEFT + RIGHT) / 2, HEIGHT),
        _y_title(metric["name"]),
    ]
    if note:
        parts.append(f'<text class="muted" x="{RIGHT}" y="{BOTTOM - 6}" text-anchor="end">{esc(note)}</text>')
        room.block(RIGHT - CHAR * len(note), BOTTOM - 20, RIGHT, BOTTOM)
    # Large bubbles first, so that small ones stay reachable.
    for i, r in sorted(rows, key=lambda pair: -size[pair[0]]):
        cx, cy = x(x_of(r)), y(r["value"])
        low, high = _ends(r)
        bar = _bar(cx, y(low), cx, y(high)) if whiskers else ""
        mark = _mark(i, cx, cy, size[i]) if radius is None else _bubble(i, cx, cy, size[i])
        label = room.place(_short(r["label"]), cx, cy, size[i] + 4)
        name = (
            f'<text x="{number(label[0])}" y="{number(label[1])}" text-anchor="{label[2]}">{esc(_short(r["label"]))}</text>'
            if label
            else ""
        )
        parts.append(_group(i, r, metric, bar + mark + name))
    described = "; ".join(f"{_said(r, metric)} at {tick(x_of(r))}" for _, r in rows)
    return _svg(slug, f"{metric['name']} against {axis}", described, parts)


def _svg(slug: str, title: str, description: str, parts: Sequence[str], height: float = HEIGHT) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {number(height)}" role="img" aria-labelledby="{slug}-t {slug}-d">'
        f'<title id="{slug}-t">{esc(title)}</title><desc id="{slug}-d">{esc(description)}</desc>{"".join(parts)}</svg>'
    )


def _group(index: int, row: Row, metric: Mapping[str, Any], inner: str) -> str:
    return f'<g class="series {style_of(index)[0]}" data-m="{index}" tabindex="0" data-tip="{esc(tip(row, metric))}">{inner}</g>'


def tip(row: Row, metric: Mapping[str, Any]) -> str:
    """What a point says when it is pointed at: one fact a line."""
    lines = [
        row["label"], row.get("method") if row.get("method") != row["label"] else None,
        f"{metric['name']} {show.metric_value(row.get('value'), metric)} ({show.interval(row.get('low'), row.get('high'), metric)})",
        f"{show.count(row.get('trained'))} trained parameters ({show.share(row.get('trained'), row.get('total'))})",
        f"{show.seconds(row.get('seconds'))}, peak memory {show.size(row.get('peak_memory'))}" if row.get("seconds") else None,
    ]  # fmt: skip
    return "\n".join(str(line) for line in lines if line)


def _said(row: Row, metric: Mapping[str, Any]) -> str:
    return f"{row['label']} {show.metric_value(row['value'], metric)} ({show.interval(row.get('low'), row.get('high'), metric)})"


def _mark(index: int, x: float, y: float, r: float) -> str:
    return f'<g class="mark">{shape(style_of(index)[1], x, y, r)}</g>'


def _bubble(index: int, x: float, y: float, r: float) -> str:
    return f'<circle class="bubble" cx="{number(x)}" cy="{number(y)}" r="{number(r)}"/>{_mark(index, x, y, 2.5)}'


def _bar(x0: float, y0: float, x1: float, y1: float) -> str:
    across = 4
    cap = (f"M{number(x0 - across)} {number(y0)}h{2 * across}M{number(x1 - across)} {number(y1)}h{2 * across}" if x0 == x1 else
           f"M{number(x0)} {number(y0 - across)}v{2 * across}M{number(x1)} {number(y1 - across)}v{2 * across}")  # fmt: skip
    return f'<path class="whisker" d="M{number(x0)} {number(y0)}L{number(x1)} {number(y1)}{cap}"/>'


def _vertical_grid(scale: Scale, top: float, bottom: float, text: Callable[[float], str], about: int) -> str:
    lines = [f'<path class="grid" d="M{number(scale(t))} {number(top)}V{number(bottom)}"/>'
             f'<text class="tick" x="{number(scale(t))}" y="{number(bottom + 16)}" text-anchor="middle">{esc(text(t))}</text>'
             for t in scale.ticks(about)]  # fmt: skip
    return "".join(lines)


def _horizontal_grid(scale: Scale, left: float, right: float, text: Callable[[float], str]) -> str:
    lines = [f'<path class="grid" d="M{number(left)} {number(scale(t))}H{number(right)}"/>'
             f'<text class="tick" x="{number(left - 6)}" y="{number(scale(t) + 4)}" text-anchor="end">{esc(text(t))}</text>'
             for t in scale.ticks(5)]  # fmt: skip
    return "".join(lines)


def _x_title(text: str, x: float, height: float) -> str:
    return f'<text class="axis" x="{number(x)}" y="{number(height - 10)}" text-anchor="middle">{esc(text)}</text>'


def _y_title(text: str) -> str:
    middle = number((TOP + BOTTOM) / 2)
    return f'<text class="axis" x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">{esc(text)}</text>'


def _tick(value: float, metric: Mapping[str, Any]) -> str:
    return f"{100 * value:.3g} %" if metric.get("fraction") else f"{value:.3g}"


def _ends(row: Row) -> tuple[float, float]:
    value = row["value"]
    return (value if row.get("low") is None else row["low"]), (value if row.get("high") is None else row["high"])


def _short(text: str, most: int = 22) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _wide(rows: Sequence[tuple[int, Row]], key: str) -> bool:
    """A logarithmic axis is worth it from a factor of 20."""
    values = [r[key] for _, r in rows]
    return bool(values) and max(values) > 20 * min(values)


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS points: means over equal stretches, each at its last step."""
    points = [p for p in points if math.isfinite(p[1])]
    stretch = math.ceil(len(points) / MOST_POINTS) or 1
    parts = [points[k : k + stretch] for k in range(0, len(points), stretch)]
    return [(part[-1][0], sum(p[1] for p in part) / len(part)) for part in parts]
