"""Tables and pictures of what `speed.py` measured: the section between its marks in RESULTS.md, and speed.png.

python benchmarks/speed_page.py
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from speed import HEAD, NUMBERS, line, stored

from veneer.study.report import replace_text

RESULTS, PICTURE = NUMBERS.with_name("RESULTS.md"), NUMBERS.with_name("speed.png")
START, END = "<!-- speed -->", "<!-- /speed -->"


def ratios(rows: list[dict[str, Any]], what: str) -> list[float]:
    """Ours over PEFT's, for the methods that both have."""
    both = [r for r in rows if "veneer" in r and "peft" in r]
    return [r["ratio"] if what == "step" else r["veneer"][what] / r["peft"][what] for r in both]


def summary(tables: dict[str, Any]) -> Iterator[str]:
    yield "| shape / dtype / threads | methods | with peft | step: median ours / peft | least | most | saved: median | most |"
    yield "|" + "---|" * 8
    for key, table in tables.items():
        rows = list(table["rows"].values())
        step, saved = ratios(rows, "step"), ratios(rows, "saved")
        if step:
            numbers = (statistics.median(step), min(step), max(step), statistics.median(saved), max(saved))
            measured = sum("veneer" in r for r in rows)
            yield f"| {key} | {measured} | {len(step)} | " + " | ".join(f"{n:.2f}" for n in numbers) + " |"


def section(tables: dict[str, Any]) -> str:
    """The tables in Markdown, the methods that PEFT has too first."""
    lines = list(summary(tables))
    for key, table in tables.items():
        shape, dtype, threads = key.split("/")
        batch = "×".join(str(n) for n in table["batch"])
        lines += ["", f"### {shape}, {dtype}, {threads} thread{'s' if threads != '1' else ''}, batch {batch}", ""]
        lines += [HEAD, *(line(row) for row in table["rows"].values())]
    return "\n".join(lines)


def draw(tables: dict[str, Any], path: Path) -> None:
    """Step time and saved activations over the floor: a dot for ours, a ring for PEFT's, a row a method; the longest table."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chosen = dict([max(tables.items(), key=lambda item: len(item[1]["rows"]))])
    most = max(len(t["rows"]) for t in chosen.values())
    figure = Figure(figsize=(9, 1.5 + 0.17 * most), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, 2 * len(chosen), squeeze=False)[0]
    for n, (key, table) in enumerate(chosen.items()):
        rows = sorted((r for r in table["rows"].values() if "veneer" in r), key=lambda r: -r["veneer"]["step"])
        for axes, what, title in ((grid[2 * n], "step", "step time"), (grid[2 * n + 1], "saved", "saved activations")):
            at = range(len(rows))
            axes.scatter([r["veneer"][what] for r in rows], at, s=18, color="#0b6e99", label="veneer", zorder=3)
            both = [(r["peft"][what], y) for y, r in zip(at, rows) if "peft" in r]
            axes.scatter(*zip(*both), s=26, facecolors="none", edgecolors="#c2410c", label="peft") if both else None
            axes.axvline(1, color="#888", linewidth=0.8)
            axes.set_xscale("log")
            axes.set_title(f"{key}: {title} × floor", fontsize=9)
            axes.set_yticks(
                at, [line(r).split(" | ")[0].removeprefix("| ") for r in rows] if what == "step" else [""] * len(rows), fontsize=7
            )
            axes.grid(axis="x", alpha=0.3, which="both")
            axes.legend(fontsize=7, loc="upper right")
    figure.savefig(path)


def main() -> None:
    tables = stored(NUMBERS)
    page = RESULTS.read_text("utf-8")
    head, _, rest = page.partition(START)
    _, _, tail = rest.partition(END)
    replace_text(RESULTS, f"{head}{START}\n{section(tables)}\n{END}{tail}")
    draw(tables, PICTURE)
    print("\n".join(summary(tables)))


if __name__ == "__main__":
    main()
