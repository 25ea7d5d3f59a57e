"""The report's plots as PNG files, through matplotlib (the extra `veneer[report]`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from veneer.errors import MissingExtra
from veneer.study import format as show
from veneer.study.charts import drawn
from veneer.study.svg import Labels

COLOURS = ("#0a66a8", "#c24a00", "#00795a", "#a3457f", "#8a6a00", "#5a57c2", "#4b5563", "#b01f3c")
MARKS = ("o", "s", "^", "D", "P", "v", "h")
DPI = 150
POINT = DPI / 72
"""Pixels of a typographic point."""
UNIT = 9 * POINT / 12
"""Pixels of one unit of the report's charts, whose labels are 12 units high and 9 points here."""
LINES = ("-", "--", ":", "-.")


def write(folder: str | Path, study: Mapping[str, Any]) -> list[Path]:
    """Writes `accuracy_parameters.png`, `accuracy_time.png`, `accuracy_time_parameters.png` and `learning_curves.png`
    (named by the study's metric) and gives their paths. Raises `MissingExtra` without matplotlib."""
    figure = _figure_class()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() else "_" for c in study["metric"]["name"])
    drawings: dict[str, Callable[[Any, Mapping[str, Any]], None]] = {
        f"{name}_parameters": _parameters,
        f"{name}_time": _time,
        f"{name}_time_parameters": _bubble,
        "learning_curves": _curves,
    }
    return [_save(figure, folder / f"{stem}.png", draw, study) for stem, draw in drawings.items()]


def _figure_class() -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("PNG plots need matplotlib. Install it with: pip install 'veneer[report]'") from error

    def make() -> Any:
        figure = Figure(figsize=(6.4, 4.4), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        return figure

    return make


def _save(make: Callable[[], Any], path: Path, draw: Callable[[Any, Mapping[str, Any]], None], study: Mapping[str, Any]) -> Path:
    figure = make()
    axes = figure.add_subplot()
    draw(axes, study)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    _name_points(axes)
    # Labels from data must not be read as formulas.
    for text in figure.findobj(lambda artist: hasattr(artist, "set_parse_math")):
        text.set_parse_math(False)
    part = path.with_name(f".{path.stem}.part.png")
    figure.savefig(part)
    part.replace(path)
    return path


def _parameters(axes: Any, study: Mapping[str, Any]) -> None:
    _points(axes, study, "trained")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda v, _: show.short_count(v))
    axes.set_xlabel("trained parameters (log)")


def _time(axes: Any, study: Mapping[str, Any]) -> None:
    _points(axes, study, "seconds")
    axes.xaxis.set_major_formatter(lambda v, _: show.seconds(v))
    axes.set_xlabel("training time")


def _bubble(axes: Any, study: Mapping[str, Any]) -> None:
    rows = [(i, r) for i, r in drawn(study) if r.get("seconds") and r.get("trained")]
    most = max((r["trained"] for _, r in rows), default=1)
    for i, r in rows:
        area = max(20.0, 1600.0 * r["trained"] / most)
        axes.scatter([r["seconds"]], [_scaled(r["value"], study)], s=area, color=_colour(i), alpha=0.25, edgecolors=_colour(i))
        value = _scaled(r["value"], study)
        _name(axes, r, r["seconds"], value, math.sqrt(area / math.pi) * POINT / UNIT, (value, value))
    axes.margins(0.2)
    axes.xaxis.set_major_formatter(lambda v, _: show.seconds(v))
    axes.set_xlabel("training time (bubble area: trained parameters)")
    axes.set_ylabel(_axis(study))


def _curves(axes: Any, study: Mapping[str, Any]) -> None:
    for i, r in drawn(study):
        points = [(p["step"], _scaled(p["value"], study)) for p in r.get("curve") or [] if p.get("value") is not None]
        if len(points) > 1:
            axes.plot(*zip(*points), LINES[i % len(LINES)], color=_colour(i), marker=MARKS[i % len(MARKS)], markersize=4, label=r["label"])
    if axes.lines:
        axes.legend(frameon=False, fontsize=9)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(f"held-out {_axis(study)}")


def _points(axes: Any, study: Mapping[str, Any], key: str) -> None:
    for i, r in drawn(study):
        if not r.get(key):
            continue
        value = _scaled(r["value"], study)
        low, high = (_scaled(r[k], study) if r.get(k) is not None else value for k in ("low", "high"))
        axes.errorbar(
            [r[key]], [value], yerr=[[value - low], [high - value]], fmt=MARKS[i % len(MARKS)], color=_colour(i), capsize=3, markersize=7
        )
        _name(axes, r, r[key], value, 5.5, (low, high))
    axes.margins(0.15)
    axes.set_ylabel(_axis(study) + " (whiskers: 95 % interval)")


def _name(axes: Any, row: Mapping[str, Any], x: float, y: float, radius: float, ends: tuple[float, float]) -> None:
    """Remembers a point to be named; where there is room is known only when the axes are laid out."""
    axes.named = [*getattr(axes, "named", []), (str(row["label"]), x, y, radius, ends)]


def _name_points(axes: Any) -> None:
    """Writes the names beside the points, with the report's own rules; `UNIT` pixels are one of its units."""
    points = getattr(axes, "named", [])
    axes.figure.draw_without_rendering()
    box = axes.get_window_extent()
    place = Labels(box.x0 / UNIT, -box.y1 / UNIT, box.x1 / UNIT, -box.y0 / UNIT)
    spots = []
    for text, x, y, radius, ends in points:
        (px, py), (_, low), (_, high) = (axes.transData.transform((x, v)) / UNIT for v in (y, *ends))
        place.block(px - radius, -py - radius, px + radius, -py + radius)
        place.block(px - 2, -high, px + 2, -low)
        spots.append((text, px, -py, radius))
    for text, px, py, radius in spots:
        spot = place.place(text, px, py, radius + 4)
        if spot:
            anchor = {"start": "left", "end": "right", "middle": "center"}[spot[2]]
            axes.annotate(text, (spot[0] * UNIT, -spot[1] * UNIT), xycoords="figure pixels", ha=anchor, va="baseline", fontsize=9)


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _axis(study: Mapping[str, Any]) -> str:
    metric = study["metric"]
    return f"{metric['name']}, %" if metric.get("fraction") else str(metric["name"])


def _scaled(value: float, study: Mapping[str, Any]) -> float:
    return 100 * value if study["metric"].get("fraction") else value
