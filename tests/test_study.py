"""Laws of studies: intervals, marks, the report, comparisons, the demo's own steps."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from itertools import combinations, pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.errors import BadValue, MissingExtra, UnknownName
from veneer.study import charts, compare, plots, report, stats, svg
from veneer.study import format as show

ROOT = Path(__file__).parents[1]
HOSTILE = "</script><img src=x onerror=alert(1)> & \"quotes\" '$\\frac{'"


def row(label: str, right: int, n: int = 400, **extra) -> dict:
    low, high = stats.wilson(right, n)
    answers = [1] * right + [0] * (n - right)
    curve = [{"step": 10 * s, "loss": 1 / s} for s in range(1, 30)] + [{"step": 100 * s, "value": right / n - 0.1 / s} for s in (1, 2, 3)]
    facts = dict(method="lora(r=3)", trained=55_296, total=22_800_000, seconds=60.5, peak_memory=9e8, adapter_bytes=221_000)
    return {"label": label, "value": right / n, "low": low, "high": high, "n": n, "correct": answers, "curve": curve, **facts, **extra}


def study(*rows: dict, **extra) -> dict:
    rows = tuple(dict(r) for r in rows)
    best = stats.best_index(rows)
    for i, (r, mark) in enumerate(zip(rows, stats.indistinguishable(rows))):
        r.update(best=i == best, alike=mark)
    metric = {"name": "accuracy", "fraction": True, "higher": True}
    return {"title": "T", "subtitle": "S", "metric": metric, "facts": [["Machine", "2 cores"]], "rows": list(rows), **extra}


SAMPLE = study(
    row("probe", 300, reference=True, seconds=20.0, trained=770), row("LoRA", 330), row("SSF", 328, seconds=70), row("other", 200)
)


# -- intervals and marks ----------------------------------------------------------------------------------------


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_proportion_and_stays_a_proportion(case):
    right, n = case
    low, high = stats.wilson(right, n)
    assert 0 <= low <= right / n + 1e-12 and right / n - 1e-12 <= high <= 1
    more_low, more_high = stats.wilson(10 * right, 10 * n)
    assert more_high - more_low < high - low


def test_wilson_agrees_with_printed_values():
    assert stats.wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert stats.wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)


@settings(deadline=None)  # the first call imports scipy
@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60))
def test_mcnemar_is_the_exact_sign_test_of_the_pairs_that_differ(pairs):
    binomtest = pytest.importorskip("scipy.stats").binomtest
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    p = stats.mcnemar(first, second)
    assert p == stats.mcnemar(second, first)
    n, k = sum(a != b for a, b in pairs), sum(a and not b for a, b in pairs)
    assert p == pytest.approx(binomtest(k, n).pvalue if n else 1.0)


def test_mcnemar_refuses_different_examples():
    with pytest.raises(ValueError, match="2 and 1 answers"):
        stats.mcnemar([True, False], [True])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_only_raises_and_keeps_the_order(ps):
    adjusted = stats.holm(ps)
    assert all(p <= a <= 1 for p, a in zip(ps, adjusted))
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    assert all(adjusted[a] <= adjusted[b] for a, b in pairwise(order))


def test_bootstrap_holds_the_mean_and_repeats():
    values = [0.0] * 30 + [1.0] * 70
    low, high = stats.bootstrap(values)
    assert low < 0.7 < high and (low, high) == stats.bootstrap(values)


def test_marks_pair_the_answers():
    better, alike, worse = row("a", 330), row("b", 326), row("c", 250)
    assert stats.indistinguishable([worse, better, alike]) == [False, True, True]
    # The same counts, but never right on the same examples: nothing can be said about such rows from counts alone.
    paired = {**row("d", 316), "correct": [1] * 316 + [0] * 84}
    assert stats.indistinguishable([better, paired]) == [True, False], "14 losses without a gain are beyond chance"


def test_marks_fall_back_on_intervals_and_know_the_direction():
    a, b, c = ({"value": v, "low": v - 0.1, "high": v + 0.1} for v in (1.0, 1.15, 1.5))
    assert stats.indistinguishable([a, b, c], higher=False) == [True, True, False]
    assert stats.indistinguishable([a, b, c]) == [False, False, True]
    assert stats.indistinguishable([{"error": "x"}, {"value": None}]) == [False, False]


# -- numbers and geometry ---------------------------------------------------------------------------------------


def test_numbers_read_well():
    assert [show.count(52224), show.short_count(52224), show.count(None)] == ["52,224", "52.2 k", "–"]
    assert [show.share(770, 22_700_000), show.share(55_296, 22_700_000), show.share(1, 2), show.share(0, 5)] == [
        "0.0034 %",
        "0.24 %",
        "50 %",
        "0 %",
    ]
    assert [show.size(12), show.size(221_000), show.size(1.12e9)] == ["12 B", "221 kB", "1.1 GB"]
    assert [show.seconds(s) for s in (0.42, 41.4, 123, 3900)] == ["0.4 s", "41 s", "2 min 3 s", "1 h 5 min"]


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_and_inside(low, span):
    high = low + span
    ticks = svg.linear_ticks(low, high, 5)
    if high > low and span > 1e-9 * abs(low):
        assert 2 <= len(ticks) <= 12
        assert all(low - 1e-6 * span <= t <= high + 1e-6 * span for t in ticks)


@given(st.floats(-8, 8), st.floats(0.3, 9))
def test_logarithmic_ticks_are_few_and_inside(start, decades):
    low, high = 10**start, 10 ** (start + decades)
    ticks = svg.log_ticks(low, high, 4)
    assert 1 <= len(ticks) <= 8 and all(low * 0.99 <= t <= high * 1.01 for t in ticks)


@given(st.lists(st.tuples(st.floats(0, 400), st.floats(0, 300), st.integers(1, 20)), max_size=25))
def test_labels_never_touch_each_other_or_leave_the_chart(points):
    room = svg.Labels(0, 0, 400, 300)
    for x, y, letters in points:
        room.place("m" * letters, x, y, 8)
    for a, b, c, d in room.taken:
        assert a >= 0 and b >= 0 and c <= 400 and d <= 300
    for (a, b, c, d), (e, f, g, h) in combinations(room.taken, 2):
        assert c <= e or g <= a or d <= f or h <= b


@given(st.lists(st.floats(0, 200), min_size=1, max_size=30))
def test_spread_keeps_the_order_and_the_gap(wanted):
    placed = svg.spread(wanted, 13, 0, 200)
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    gap = min(13, 200 / max(len(wanted) - 1, 1))
    assert all(placed[b] - placed[a] >= gap - 1e-6 for a, b in pairwise(order))
    assert all(-1e-6 <= p <= 200 + 1e-6 for p in placed)


# -- the report -------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs


def data_of(text: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="study">(.*?)</script>', text, re.S)[1])


def test_the_page_fetches_nothing():
    text = report.page(SAMPLE)
    found = Tags(text)
    assert not {"link", "img", "iframe", "object", "embed", "base", "form", "audio", "video"} & set(found.tags)
    assert not {"src", "href", "xlink:href", "srcset", "action", "onclick", "onload"} & {name for name, _ in found.attributes}
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttpRequest|//[a-z]", text)


def test_only_our_script_may_run():
    text = report.page(SAMPLE)
    script = re.findall(r"<script>(.*?)</script>", text, re.S)
    assert len(script) == 1
    assert "sha256-" + base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode() in text


def test_text_from_data_is_never_markup():
    hostile = study(
        row(HOSTILE, 300, method=HOSTILE), {"label": HOSTILE, "error": HOSTILE}, title=HOSTILE, subtitle=HOSTILE, facts=[[HOSTILE] * 2]
    )
    text = report.page(hostile)
    found = Tags(text)
    assert "img" not in found.tags and found.tags.count("script") == 2
    assert not any(name.startswith("on") for name, _ in found.attributes)
    assert data_of(text)["title"] == HOSTILE


def test_the_page_holds_the_data_and_every_row():
    text = report.page(SAMPLE)
    data = data_of(text)
    assert [r["label"] for r in data["rows"]] == [r["label"] for r in SAMPLE["rows"]]
    assert data["rows"][1]["correct"] == SAMPLE["rows"][1]["correct"]
    for r in SAMPLE["rows"]:
        assert show.metric_value(r["value"], SAMPLE["metric"]) in text
    assert "LoRA is best: 82.5 % accuracy" in text and "cannot be told apart from SSF" in text


def test_sixty_methods_stay_under_a_megabyte_and_readable():
    many = study(*(row(f"method number {i}", 1200 + 5 * i, 2000, trained=100 * 2 ** (i % 12), seconds=5 + 3.0 * i) for i in range(60)))
    for r in many["rows"]:
        r["curve"] = [{"step": s, "loss": 1 / (s + 1), "value": s / 3000} for s in range(3000)]
    text = report.page(many)
    assert len(text.encode()) < 1_000_000
    styles = [charts.style_of(i) for i in range(56)]
    assert len(set(styles)) == 56, "colour and mark together name a method"


@pytest.mark.parametrize(
    "case",
    [SAMPLE, study(), study({"label": "a", "error": "failed"}), study(row("alone", 200)), study(row("zero", 0), row("all", 400)),
     study({"label": "bare", "value": 0.5}, {"label": "nan", "value": math.nan, "curve": [{"step": 1, "loss": math.inf}]})],
    ids=["usual", "empty", "failed", "single", "ends", "bare"],
)  # fmt: skip
def test_every_chart_is_well_formed_and_described(case, tmp_path):
    text = report.page(case)
    drawings = re.findall(r'<svg class="chart".*?</svg>', text, re.S)
    assert len(drawings) == 6
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        title, desc = root.find("title"), root.find("desc")
        assert root.get("role") == "img" and title is not None and title.text and desc is not None
        assert root.get("aria-labelledby") == f"{title.get('id')} {desc.get('id')}"
        assert not re.search(r"\b(nan|inf|None)\b", re.sub(r">[^<]*<", "><", drawing))
    assert report.write(tmp_path, case).read_text(encoding="utf-8") == text


def test_a_report_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = report.write(tmp_path, SAMPLE)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        report.write(tmp_path, study(row("new", 10)))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_pictures_show_what_is_there(tmp_path):
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    paths = plots.write(tmp_path, study(row(HOSTILE, 300), row("b", 310, low=None, high=None)))
    assert [p.name for p in paths] == [
        "accuracy_parameters.png",
        "accuracy_time.png",
        "accuracy_time_parameters.png",
        "learning_curves.png",
    ]
    assert all(image.open(p).size[0] > 600 for p in paths)
    plots.write(tmp_path, study())


# -- comparisons ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FakeRecipe:
    method: str = "lora"
    out: str | None = None
    base: bool = True

    def check(self) -> None:
        compare.parse_spec(self.method)


def outcome(recipe, right: int) -> dict:
    metric = {"value": right / 400, "low": stats.wilson(right, 400)[0], "high": stats.wilson(right, 400)[1], "n": 400}
    base = {"accuracy": {**metric, "value": 0.5, "low": 0.45, "high": 0.55}} if recipe.base else {}
    return {
        "folder": recipe.out, "method": recipe.method, "main": "accuracy", "trained": 10, "total": 1000, "metrics": {"accuracy": metric},
        "base_metrics": base, "seconds": 3.0, "seconds_per_step": 0.1, "peak_memory": 10**8, "adapter_bytes": 4000,
        "correct": [True] * right + [False] * (400 - right),
        "curve": [{"step": 1, "loss": 0.7, "lr": 1e-3}, {"step": 1, "eval_accuracy": 0.6}],
    }  # fmt: skip


@pytest.fixture
def runs(monkeypatch):
    """Replaces real runs: right answers, or what happens, by spec."""
    table: dict = {"probe": 300, "lora(r=2)": 340, "lora(r=4)": 338, "ssf": {"error": "NaN loss at step 3."}}
    started = []

    def run(recipe, *, again, progress, command, said):
        started.append(recipe)
        found = table[recipe.method]
        if isinstance(found, BaseException):
            raise found
        return found if isinstance(found, dict) else outcome(recipe, found)

    monkeypatch.setattr(compare, "_run", run)
    return table, started


def test_base_and_references_come_first_and_marks_are_set(runs, tmp_path, capsys):
    study = compare.compare(FakeRecipe(), ["lora(r=2)", "ssf", "lora(r=4)"], out=tmp_path, references=["probe"])
    assert [r["label"] for r in study.rows] == ["untouched base", study.rows[1]["label"], "lora(r=2)", study.rows[3]["label"], "lora(r=4)"]
    assert [bool(r.get("reference")) for r in study.rows] == [True, True, False, False, False]
    assert study.best is study.row("lora(r=2)") and study.row("lora(r=4)")["alike"] and not study.rows[1]["alike"]
    assert study.rows[3]["error"] == "NaN loss at step 3."
    assert [r.base for r in runs[1]] == [True, False, False, False], "the untouched base is measured once"
    assert len({r.out for r in runs[1]}) == 4
    assert {"study.json", "report.html"} <= {p.name for p in tmp_path.iterdir()}
    assert json.loads((tmp_path / "study.json").read_text()) == study.data
    assert study.best["curve"] == [{"step": 1, "loss": 0.7}, {"step": 1, "value": 0.6}]


def test_the_table_says_everything(runs, tmp_path):
    from rich.console import Console

    study = compare.compare(FakeRecipe(), ["lora(r=2)", "ssf"], out=tmp_path, references=["probe"], progress=False)
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(study.table())
    text = console.export_text()
    for part in ("untouched base", "85.0 %", "(81.2–88.2)", " 1 ", " 3 ", "100 MB", "4.0 kB", "* LoRA", "NaN loss at step 3."):
        assert part in text


def test_an_interruption_keeps_what_is_finished(runs, tmp_path):
    runs[0]["lora(r=4)"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        compare.compare(FakeRecipe(), ["lora(r=2)", "lora(r=4)"], out=tmp_path, references=["probe"], progress=False)
    assert [r["method"] for r in json.loads((tmp_path / "study.json").read_text())["rows"]] == [None, "probe", "lora(r=2)"]


def test_mistakes_are_told_before_any_run(runs, tmp_path):
    with pytest.raises(UnknownName, match="lora"):
        compare.compare(FakeRecipe(), ["lora(r=2)", "lorra"], out=tmp_path)
    with pytest.raises(BadValue, match="nothing to compare"):
        compare.compare([], out=tmp_path)
    with pytest.raises(BadValue, match="one recipe"):
        compare.compare([FakeRecipe()], ["lora"], out=tmp_path)
    assert runs[1] == [] and list(tmp_path.iterdir()) == []


PARENT = """
import subprocess, sys
from veneer.study.compare import _wait
child = "import signal,sys,time\\nsignal.signal(signal.SIGINT, lambda *_: sys.exit(130))\\nprint('ready', flush=True)\\ntime.sleep(60)"
print(_wait(subprocess.Popen([sys.executable, "-c", child], process_group=0)))
"""


def test_control_c_reaches_the_run_and_waits_for_it():
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout.readline() == "ready\n"
        parent.send_signal(signal.SIGINT)
        assert parent.communicate(timeout=30)[0] == "130\n"


def test_a_run_ends_when_its_parent_is_killed(tmp_path):
    child = "import sys,time\nfrom veneer.study.worker import _end_with_parent\n_end_with_parent()\n" + (
        "try:\n time.sleep(60)\nexcept KeyboardInterrupt:\n open(sys.argv[1], 'w').close()"
    )
    start = f"subprocess.Popen([sys.executable, '-c', {child!r}, sys.argv[1]], process_group=0)"
    parent = f"import subprocess, sys, time\n{start}\ntime.sleep(3)"
    ended = tmp_path / "ended"
    subprocess.run([sys.executable, "-c", parent, str(ended)], cwd=ROOT, timeout=60)
    limit = time.monotonic() + 30
    while not ended.exists() and time.monotonic() < limit:
        os.sched_yield()
    assert ended.exists()


# -- the demo and the two commands ------------------------------------------------------------------------------


def test_the_demo_splits_without_overlap_and_always_alike(tmp_path):
    from veneer.study import demo

    try:
        first = demo.write_data(tmp_path / "a")
    except MissingExtra as missing:
        pytest.skip(str(missing))
    second = demo.write_data(tmp_path / "b")
    parts = {p.stem: p.read_text().splitlines() for p in first.iterdir()}
    assert {name: (second / f"{name}.jsonl").read_text().splitlines() for name in parts} == parts
    texts = {name: {json.loads(line)["text"] for line in lines} for name, lines in parts.items()}
    assert len(parts["test"]) == 2000 and all(not texts[a] & texts[b] for a, b in combinations(texts, 2))


def test_the_demo_budgets_are_comparable():
    from veneer.spec import parse
    from veneer.study import demo

    assert all(parse(spec) for spec in (demo.PROBE, *(spec for spec, _ in demo.METHODS)))
    assert [parse(spec).slug for spec, _ in demo.METHODS] == ["lora", "wegeft", "ssf", "prefix-tuning"]


def test_make_pins_torch_and_never_brings_torchvision():
    text = subprocess.run(["make", "-n", "test", "demo", "VENV=none"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    installs = [line for line in text.splitlines() if "pip" in line and " install" in line]
    assert installs and all("-c constraints.txt" in line or "--no-deps" in line for line in installs)
    assert "torchvision" not in text
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(), re.M)


def test_ci_runs_the_fast_suite():
    path = ROOT / ".ci" / "run"
    assert os.access(path, os.X_OK) and "make test" in path.read_text()
