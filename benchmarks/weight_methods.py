"""Weight methods side by side: equal budgets, the same sentences, heads and steps, on a real encoder.

    python benchmarks/weight_methods.py [--workers 2] [--only lora wegeft] [--budgets 25k 150k] [--write]

Every method of `METHODS` gets the sizes that `veneer budget` finds for each budget of trained parameters (the task's head
comes on top, the same for all) and adapts all-MiniLM-L6-v2 to film-review sentences. The head starts fitted to the frozen
features of sentences of its own, so that what a method adds to it is seen after few steps. The learning rate is the best of
three, by loss on validation sentences with seed 0: the method's own default, and from there up, as so few steps want more
(of five where three hardly move the loss). With it every seed is trained and tested on the same test sentences.

Each finished run is a file under `--out`, whole or not there; the same command goes on with the rest. `--write` puts the
table into benchmarks/RESULTS.md, the numbers beside it, and the picture into docs.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import hashlib
import json
import logging
import math
import multiprocessing
import os
import platform
import queue
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS, NUMBERS, PICTURE = (
    ROOT / "benchmarks" / "RESULTS.md",
    ROOT / "benchmarks" / "weight_methods.json",
    ROOT / "docs" / "weight-methods.png",
)
START, END = "<!-- weight-methods -->", "<!-- /weight-methods -->"

REFERENCES = ("probe", "full")
"""The lower and the upper end: the head alone, and everything."""
METHODS = (
    "lora", "dora", "adalora", "wegeft", "melora", "s2-lora", "mola", "1lora", "sara", "mo-sara", "alore", "vera", "randlora", "delora",
    "gralora", "loha", "lokr(decompose_factor=4)", "lorta", "loretta", "loretta(variant='adp')", "tlora", "wara", "hut",
    "bone(structure='bat')", "miss", "quantum-adapter", "nera", "fourierft", "waveft", "c3a", "oft", "boft", "hra", "road", "shira",
)  # fmt: skip
"""Specs; what is given here stays, the sizes follow from the budget. LoKr's small factor is fixed, as with none it would be
LoRA; Bone is its first form, since MiSS is the later one."""
LABELS = {"loretta": "loretta (rep)", "loretta(variant='adp')": "loretta (adp)", "bone(structure='bat')": "bone (bat)"}
REACH = 1.25
"""Counts within this factor of a budget belong to it; others are listed by their own count."""


@dataclass(frozen=True)
class Settings:
    """What decides a run besides method, seed and rate; another value gives other files."""

    steps: int = 32
    batch: int = 16
    length: int = 32
    validation: int = 200
    test: int = 600
    head: int = 2000
    ridge: float = 0.3
    warmup: float = 0.1
    head_lr: float = 5e-3
    clip: float = 1.0
    rounds: int = 5


@dataclass(frozen=True)
class Cell:
    """One method at one budget; budget None where it reaches none."""

    label: str
    spec: str
    trained: int
    budget: int | None
    lr: float

    def folder(self, out: Path, settings: Settings) -> Path:
        """Where its runs are: named by everything that decides them."""
        name = "".join(c if c.isalnum() else "-" for c in self.label).strip("-").replace("--", "-")
        return out / f"{name}-{self.trained}-{_digest(settings, self.spec)}"


def _digest(settings: Settings, *more: str) -> str:
    return hashlib.sha256(json.dumps([dataclasses.asdict(settings), *more], sort_keys=True).encode()).hexdigest()[:6]


# -- what to run ------------------------------------------------------------------------------------------------


def plan(budgets: Sequence[str], only: Sequence[str], say: Callable[[str], None] = print) -> list[Cell]:
    """The cells, budget by budget. Methods that are not there, or that fit no layer, are told and left out."""
    from veneer import anatomy, assets, registry
    from veneer.spec import parse_spec
    from veneer.study.budget import Nearest, budget_of, count, nearest

    base = base_model(assets.resolve("minilm"))
    sites, known, cells = anatomy.sites(base), registry.cards(), dict[str, Cell]()
    total = sum(p.numel() for p in base.parameters())

    def add(spec: str, found: Nearest | None, trained: int, budget: int | None) -> None:
        text = spec if found is None else str(found.spec)
        lr = registry.load(parse_spec(spec)[0][0]).default_lr
        cells.setdefault(text, Cell(LABELS.get(spec, spec.partition("(")[0]), text, trained, budget, lr))

    wanted = [spec for spec in (*REFERENCES, *METHODS) if not only or spec.partition("(")[0] in only]
    for text in budgets:
        for spec in wanted:
            slug = spec.partition("(")[0]
            if slug not in known:
                say(f"{slug} is not there; skipped.")
                continue
            try:
                if spec in REFERENCES:
                    add(spec, None, 0 if spec == "probe" else count(registry.method(slug), sites, base), None)
                    continue
                found = nearest(spec, sites, budget_of(text, total), model=base, reach=REACH)
            except Exception as error:  # a method in the making must not stop the others
                say(f"{spec} cannot be counted: {error!r}; skipped.")
                continue
            if found.trained is None:
                say(f"{spec}: {found.why} Skipped.")
            else:
                add(spec, found, found.trained, found.budget if found.within(REACH) else None)
    return list(cells.values())


def base_model(folder: str) -> Any:
    """The encoder with a head for two classes, without dropout."""
    import torch
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging as library

    library.set_verbosity_error()
    library.disable_progress_bar()
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


# -- running ----------------------------------------------------------------------------------------------------


class Bench:
    """Base model, its fitted head and the sentences, once a process; every run works on a copy of the base."""

    def __init__(self, settings: Settings, out: Path) -> None:
        import torch
        from transformers import AutoTokenizer

        from veneer import anatomy, assets
        from veneer.train.loop import SimilarLengths

        self.torch, self.settings, self.sampler = torch, settings, SimilarLengths
        folder = assets.resolve("minilm")
        self.base = base_model(folder)
        self.head = next(s.module for s in anatomy.sites(self.base) if s.role == "head")
        self.pad = int(self.base.config.pad_token_id or 0)
        rated = {text: rating for text, rating in assets.movie_snippets() if rating != 0}
        rows = sorted(rated.items())
        random.Random(2014).shuffle(rows)
        ids = AutoTokenizer.from_pretrained(folder)([t for t, _ in rows], truncation=True, max_length=settings.length)["input_ids"]
        items = [(i, int(rating > 0)) for i, (_, rating) in zip(ids, rows)]
        self.parts = {}
        for name in ("test", "validation", "head"):
            self.parts[name], items = items[: getattr(settings, name)], items[getattr(settings, name) :]
        self.parts["train"] = items
        self.by_length = {name: sorted(range(len(part)), key=lambda i: len(part[i][0])) for name, part in self.parts.items()}
        self.fit_head(out / f"head-{_digest(settings)}.json")

    def fit_head(self, file: Path) -> None:
        """Gives the base a head fitted to its frozen features: a ridge logistic regression on the sentences kept for it."""
        torch, head = self.torch, self.base.get_submodule(self.head)
        if not file.is_file():
            found: list[Any] = []
            hook = head.register_forward_pre_hook(lambda _m, args: found.append(args[0]))
            self.answers(self.base, "head")
            hook.remove()
            x = torch.cat(found).clone()
            y = torch.tensor([self.parts["head"][i][1] for i in self.by_length["head"]])
            mean, std = x.mean(0), x.std(0)
            x = (x - mean) / std
            W, b = torch.zeros_like(head.weight, requires_grad=True), torch.zeros_like(head.bias, requires_grad=True)
            fit = torch.optim.LBFGS([W, b], max_iter=200, line_search_fn="strong_wolfe")

            def loss() -> Any:
                fit.zero_grad()
                value = torch.nn.functional.cross_entropy(x @ W.T + b, y) + self.settings.ridge * (W**2).sum()
                value.backward()
                return value

            fit.step(loss)
            W, b = W.detach() / std, b.detach() - (W.detach() / std) @ mean
            write(file, {"weight": W.tolist(), "bias": b.tolist()})
        kept = json.loads(file.read_text(encoding="utf-8"))
        head.weight.data.copy_(torch.tensor(kept["weight"]))
        head.bias.data.copy_(torch.tensor(kept["bias"]))

    def batch(self, rows: Sequence[tuple[list[int], int]]) -> dict[str, Any]:
        width, tensor = max(len(ids) for ids, _ in rows), self.torch.tensor
        return {
            "input_ids": tensor([[*ids, *[self.pad] * (width - len(ids))] for ids, _ in rows]),
            "attention_mask": tensor([[*[1] * len(ids), *[0] * (width - len(ids))] for ids, _ in rows]),
            "labels": tensor([label for _, label in rows]),
        }

    def attached(self, cell: Cell, seed: int) -> tuple[Any, Any]:
        """A copy of the base, and the method on it."""
        import veneer

        model = copy.deepcopy(self.base)
        return model, veneer.attach(model, cell.spec, seed=seed)

    def train(self, cell: Cell, seed: int, lr: float) -> tuple[Any, float]:
        """The trained model, and the mean loss of the last steps (infinite if it became none)."""
        torch, s = self.torch, self.settings
        model, tuned = self.attached(cell, seed)
        heads = {id(t) for site, _, p in tuned.entries() if site.role == "head" for t in p.values()}
        groups = []
        for group in tuned.param_groups(lr):
            of = {True: [], False: []}  # type: dict[bool, list[Any]]
            for p in group["params"]:
                of[id(p) in heads].append(p)
            groups += [{**group, "params": of[False]}, {**group, "params": of[True], "lr": s.head_lr}]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0)
        warm = max(1, round(s.warmup * s.steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / warm, (s.steps - i) / (s.steps - warm + 1)))
        order = list(self.sampler([len(ids) for ids, _ in self.parts["train"]], s.batch, seed))
        parameters = [p for g in optimizer.param_groups for p in g["params"]]
        model.train()
        tuned.begin(s.steps)
        losses = []
        for step in range(s.steps):
            rows = [self.parts["train"][i] for i in order[step * s.batch : (step + 1) * s.batch]]
            task = model(**self.batch(rows)).loss
            (task + sum(tuned.loss_terms().values())).backward()
            if not math.isfinite(float(task)):
                return model, math.inf
            losses.append(float(task))
            torch.nn.utils.clip_grad_norm_(parameters, s.clip)
            tuned.before_step()
            optimizer.step()
            tuned.after_step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
        return model, statistics.mean(losses[-10:])

    def answers(self, model: Any, part: str) -> tuple[list[int], float]:
        """Which rows of a part are answered right, in their own order, and the mean loss."""
        torch, rows = self.torch, self.parts[part]
        model.eval()
        right, loss = [0] * len(rows), 0.0
        with torch.inference_mode():
            for start in range(0, len(rows), 64):
                at = self.by_length[part][start : start + 64]
                batch = self.batch([rows[i] for i in at])
                labels = batch.pop("labels")
                logits = model(**batch).logits
                loss += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
                for i, good in zip(at, (logits.argmax(-1) == labels).tolist()):
                    right[i] = int(good)
        return right, loss / len(rows) if math.isfinite(loss) else math.inf

    def speed(self, cell: Cell) -> dict[str, float]:
        """Forward and backward to the input embeddings, over the frozen model's in the same rounds; and what they keep."""
        from speed import saved_bytes

        middle = len(self.by_length["train"]) // 2
        batch = self.batch([self.parts["train"][i] for i in self.by_length["train"][middle : middle + self.settings.batch]])
        models = [copy.deepcopy(self.base).requires_grad_(False), self.attached(cell, 0)[0]]
        for model in models:
            model.train()
            model.get_input_embeddings().register_forward_hook(lambda _m, _i, y: y if y.requires_grad else y.requires_grad_())

        def step(model: Any) -> float:
            model.zero_grad(set_to_none=True)
            start = time.perf_counter()
            model(**batch).loss.backward()
            return time.perf_counter() - start

        times = [[step(model) for model in models] for _ in range(self.settings.rounds + 1)][1:]
        floor, own = (saved_bytes(model(**batch).loss, model) for model in models)
        return {
            "step": statistics.median(b / a for a, b in times),
            "floor_seconds": statistics.median(a for a, _ in times),
            "extra_seconds": statistics.median(b - a for a, b in times),
            "saved": own / floor,
            "extra_bytes": own - floor,
        }


def run_cell(bench: Bench, cell: Cell, folder: Path, seeds: int, tell: Callable[..., None]) -> None:
    """Every run of a cell that is not there yet: rates, then seeds with the best rate, then speed."""
    kept: dict[float, Any] = {}

    def made(name: str, make: Callable[[], dict[str, Any]], lr: float | None = None) -> dict[str, Any]:
        file, start = folder / f"{name}.json", time.perf_counter()
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        if found is not None and lr in (None, found["lr"]):
            tell("done", 0.0)
            return found
        found = make()
        gc.collect()  # models and what is attached to them refer to each other
        found["seconds"] = time.perf_counter() - start
        write(file, found)
        tell("done", found["seconds"])
        return found

    def rate(k: int) -> dict[str, Any]:
        lr = float(f"{cell.lr * 10 ** (k / 2):.3g}")
        model, loss = bench.train(cell, 0, lr)
        right, held_out = bench.answers(model, "validation") if math.isfinite(loss) else ([0], math.inf)
        kept[lr] = model
        finite = {"loss": held_out if math.isfinite(held_out) else None, "train_loss": loss if math.isfinite(loss) else None}
        return {"lr": lr, "validation": statistics.mean(right), **finite}

    def seed(n: int, lr: float) -> dict[str, Any]:
        model = kept[lr] if n == 0 and lr in kept else bench.train(cell, n, lr)[0]
        right, loss = bench.answers(model, "test")
        return {"seed": n, "lr": lr, "accuracy": statistics.mean(right), "loss": loss, "correct": "".join(map(str, right))}

    tried = {k: made(f"rate{k:+d}", lambda k=k: rate(k)) for k in rates(cell)}
    if hardly_moved(tried):
        tell("more", 2)
        tried |= {k: made(f"rate{k:+d}", lambda k=k: rate(k)) for k in (3, 4)}
    best = chosen(tried)
    for n in range(seeds):
        made(f"seed{n}", lambda n=n: seed(n, best["lr"]), best["lr"])
    made("speed", lambda: bench.speed(cell))


def rates(cell: Cell) -> tuple[int, ...]:
    """Half powers of ten times the default rate; the head alone has a rate of its own."""
    return (0,) if cell.spec == "probe" else (0, 1, 2)


def hardly_moved(tried: dict[int, dict[str, Any]]) -> bool:
    """Whether the highest rate is the best, and took less than a twentieth off the loss of the lowest: it wants more still."""
    best = min(tried, key=lambda k: _loss(tried[k]))
    return len(tried) > 1 and best == max(tried) and _loss(tried[best]) > 0.95 * _loss(tried[min(tried)])


def chosen(tried: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The rate with the lowest loss on the validation sentences, which tells more than their accuracy."""
    return min(tried.values(), key=_loss)


def _loss(run: dict[str, Any]) -> float:
    return math.inf if run["loss"] is None else run["loss"]


def write(file: Path, document: Any) -> None:
    """A JSON file, whole or not at all."""
    from veneer.study.report import replace_text

    file.parent.mkdir(parents=True, exist_ok=True)
    replace_text(file, json.dumps(document, indent=1) + "\n")


def work(jobs: Any, events: Any, settings: Settings, out: Path, seeds: int) -> None:
    """A worker process: takes cells until there are no more, or the parent is gone."""
    quiet()
    import torch

    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    try:
        bench = Bench(settings, out)
        while parent is None or parent.is_alive():
            try:
                cell = jobs.get(timeout=5)
            except queue.Empty:
                continue
            if cell is None:
                break
            try:
                run_cell(bench, cell, cell.folder(out, settings), seeds, lambda kind, value, cell=cell: events.put((kind, cell, value)))
                events.put(("cell", cell, None))
            except Exception as error:
                events.put(("failed", cell, f"{type(error).__name__}: {error}"))
    except KeyboardInterrupt:
        return
    events.put(("end", None, None))


def run_all(cells: Sequence[Cell], settings: Settings, out: Path, seeds: int, workers: int) -> int:
    """All cells by worker processes, with a progress bar; gives the number of cells that failed."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    spawn = multiprocessing.get_context("spawn")
    jobs, events = spawn.Queue(), spawn.Queue()
    for cell in [*cells, *[None] * workers]:
        jobs.put(cell)
    team = [spawn.Process(target=work, args=(jobs, events, settings, out, seeds), daemon=True) for _ in range(workers)]
    for process in team:
        process.start()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    failed, spent, ended = 0, dict[str, float](), 0
    try:
        with Progress(*columns) as bar:
            total = sum(len(rates(c)) + seeds + 1 for c in cells)
            task = bar.add_task("runs", total=total)
            while ended < workers:
                try:
                    kind, cell, value = events.get(timeout=5)
                except queue.Empty:
                    if not any(process.is_alive() for process in team):
                        raise RuntimeError("All worker processes ended before the work was done; the same command goes on.") from None
                    continue
                if kind == "end":
                    ended += 1
                elif kind == "more":
                    total += value
                    bar.update(task, total=total)
                elif kind == "done":
                    spent[cell.spec] = spent.get(cell.spec, 0.0) + value
                    bar.update(task, advance=1, description=cell.label)
                elif kind == "cell":
                    bar.console.print(f"{cell.label}, {cell.trained:,} trained: {spent.get(cell.spec, 0.0):.0f} s", highlight=False)
                else:
                    failed += 1
                    bar.console.print(f"{cell.spec} failed: {value}", style="red", highlight=False, markup=False)
    finally:
        for process in team:
            process.terminate()
    return failed


# -- results ----------------------------------------------------------------------------------------------------


def rows_of(cells: Sequence[Cell], settings: Settings, out: Path, seeds: int) -> Iterator[dict[str, Any]]:
    """One row a finished cell."""
    for cell in cells:
        folder = cell.folder(out, settings)
        files = [f for n in range(seeds) if (f := folder / f"seed{n}.json").is_file()]
        if not files or not (folder / "speed.json").is_file():
            continue
        runs = [json.loads(f.read_text(encoding="utf-8")) for f in files]
        correct = [[int(c) for c in run["correct"]] for run in runs]
        mean, low, high = interval(correct)
        tried = [json.loads(f.read_text(encoding="utf-8")) for f in sorted(folder.glob("rate*.json"))]
        speed = json.loads((folder / "speed.json").read_text(encoding="utf-8"))
        yield {
            **dataclasses.asdict(cell), "default_lr": cell.lr, "lr": runs[0]["lr"], "value": mean, "low": low, "high": high,
            "seeds": [run["accuracy"] for run in runs], "rates": {str(t["lr"]): t["loss"] for t in tried},
            **{k: speed[k] for k in ("step", "floor_seconds", "extra_seconds", "saved", "extra_bytes")},
            "seconds": statistics.mean(t["seconds"] for t in tried), "correct": correct,
        }  # fmt: skip


def interval(correct: Sequence[Sequence[int]]) -> tuple[float, float, float]:
    """Mean accuracy of several seeds on the same examples, and a 95 % interval for new seeds and new examples.

    Seeds give Student's interval over their accuracies, examples a normal one over the mean correctness of each; the two
    are independent sources, so their half-widths add as squares. One seed gives Wilson's interval, of examples alone.
    """
    from veneer.study.stats import wilson

    if len(correct) == 1:
        right, n = sum(correct[0]), len(correct[0])
        return right / n, *wilson(right, n)
    mean, reach = _spread(correct)
    return mean, max(0.0, mean - reach), min(1.0, mean + reach)


STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 8: 2.306}
"""97.5 % points of Student's t by degrees of freedom; the next smaller one is used, which is wider."""


def _student(freedom: int) -> float:
    return STUDENT[max(n for n in STUDENT if n <= freedom)]


def _spread(values: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Mean of values[seed][example] and the half-width of its 95 % interval."""
    seeds = [statistics.mean(run) for run in values]
    each = [statistics.mean(column) for column in zip(*values)]
    over_seeds = _student(len(seeds) - 1) * statistics.stdev(seeds) / len(seeds) ** 0.5
    over_examples = 1.96 * statistics.stdev(each) / len(each) ** 0.5
    return statistics.mean(seeds), math.hypot(over_seeds, over_examples)


def alike(best: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> bool:
    """Whether two methods cannot be told apart: the interval of their difference, seed by seed and example by example, holds 0."""
    gaps = [[a - b for a, b in zip(x, y)] for x, y in zip(best, other)]
    if len(gaps) > 1:
        mean, reach = _spread(gaps)
    else:  # one seed in common: over the examples alone
        mean, reach = statistics.mean(gaps[0]), 1.96 * statistics.stdev(gaps[0]) / len(gaps[0]) ** 0.5
    return abs(mean) <= reach


def table(rows: list[dict[str, Any]], budget: int | None) -> list[str]:
    """One budget's rows as a markdown table, best first; those of None with their own counts."""
    mine = sorted((r for r in rows if r["budget"] == budget), key=lambda r: -r["value"])
    lines = [
        "| | method | trained | accuracy, 95 % | seeds | learning rate | step × floor | ms more a step | saved × floor |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in mine:
        mark = "" if budget is None else "*" if row is mine[0] else "≈" if alike(mine[0]["correct"], row["correct"]) else ""
        value = f"{100 * row['value']:.1f} % ({100 * row['low']:.1f}–{100 * row['high']:.1f})"
        seeds = " ".join(f"{100 * a:.1f}" for a in row["seeds"])
        cost = f"{row['step']:.2f} | {1000 * row['extra_seconds']:+.0f} | {row['saved']:.2f}"
        spec = row["spec"].replace("|", "\\|")
        lines.append(f"| {mark} | `{spec}` | {row['trained']:,} | {value} | {seeds} | {row['lr']:g} | {cost} |")
    return lines


def section(rows: list[dict[str, Any]], budgets: Sequence[int], settings: Settings, seeds: int) -> str:
    """The section of RESULTS.md."""
    floor = 1000 * statistics.median(r["floor_seconds"] for r in rows)
    text = [
        "## Weight methods at equal budgets",
        "",
        "`make study` (`python benchmarks/weight_methods.py --write`). all-MiniLM-L6-v2, film-review sentences of at most"
        f" {settings.length} tokens, {settings.steps} steps of {settings.batch}, float32, one thread a process. {machine()}",
        f"Sizes are those that `veneer budget` finds for the budget. The task's head (770 numbers) comes on top: it starts from a"
        f" logistic regression on the frozen features of {settings.head:,} other sentences, the same for all, and trains at"
        f" {settings.head_lr:g}. A method's learning rate is the one with the lowest loss on {settings.validation} validation"
        " sentences with seed 0, out of its default times 1, 10^½ and 10, as so few steps want more;"
        " where the highest is the best and has hardly moved the loss (by less than 5 %), also times 10^(3/2) and 100."
        f" Accuracy is the mean of {seeds} seeds (first values, order of sentences) on the same {settings.test:,} test sentences."
        " Its interval is for new seeds and new sentences: the half-widths of Student's interval over the seeds and of the normal"
        " one over the sentences, added as squares. * best of its table; ≈ cannot be told apart from it: the interval of the"
        " difference, paired by seed and sentence, holds 0 (not corrected for the number of methods). A row with one accuracy under"
        " `seeds` was run with one seed, and has Wilson's interval of the sentences alone. So few steps show how fast"
        " a method learns, not how far it gets.",
        "",
        f"Step × floor: forward and backward over the frozen model's with a backward to the input embeddings ({floor:.0f} ms), in turn in"
        " one process, medians of ratios. Saved × floor: bytes that autograd keeps in forward, each storage once.",
        "",
        "![accuracy over trained parameters](../docs/weight-methods.png)",
    ]
    for budget in (*budgets, None):
        if any(r["budget"] == budget for r in rows):
            name = f"{budget:,} trained" if budget is not None else "By their own count: no budget within a quarter, and the two references"
            text += ["", f"### {name}", "", *table(rows, budget)]
    return "\n".join(text)


def machine() -> str:
    from importlib.metadata import version

    return (
        f"{os.cpu_count()}-core {platform.machine()}, Python {platform.python_version()}, torch {version('torch')}, "
        f"transformers {version('transformers')}."
    )


def write_results(rows: list[dict[str, Any]], budgets: Sequence[int], settings: Settings, seeds: int) -> None:
    """The section between its marks in RESULTS.md, the numbers and the picture."""
    from veneer.study.report import replace_text

    page = RESULTS.read_text(encoding="utf-8")
    made = f"{START}\n{section(rows, budgets, settings, seeds)}\n{END}"
    if START in page and END in page:
        page = page[: page.index(START)] + made + page[page.index(END) + len(END) :]
    else:
        page = f"{page.rstrip()}\n\n{made}\n"
    replace_text(RESULTS, page)
    kept = [{k: v for k, v in row.items() if k != "correct"} for row in rows]
    write(NUMBERS, {"settings": {**dataclasses.asdict(settings), "seeds": seeds}, "machine": machine(), "rows": kept})
    draw(rows, PICTURE)
    print(f"Written: {RESULTS.relative_to(ROOT)}, {NUMBERS.relative_to(ROOT)}, {PICTURE.relative_to(ROOT)}")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy over trained parameters: a line a method, its name at the right, the head alone as a line across."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from veneer.study.format import short_count
    from veneer.study.plots import COLOURS, MARKS

    figure = Figure(figsize=(9, 9), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault(row["label"], []).append(row)
    probe = lines.pop("probe", None)
    full = lines.pop("full", None)
    for name, reference, style in (("head alone", probe, ":"), ("full fine-tuning", full, "--")):
        if reference:
            axes.axhline(100 * reference[0]["value"], color="#4b5563", linewidth=1, linestyle=style, label=name)
    ends = []
    for i, (label, points) in enumerate(sorted(lines.items())):
        points.sort(key=lambda r: r["trained"])
        x, y = [r["trained"] for r in points], [100 * r["value"] for r in points]
        reach = [[v - 100 * r["low"] for v, r in zip(y, points)], [100 * r["high"] - v for v, r in zip(y, points)]]
        colour = COLOURS[i % len(COLOURS)]
        axes.errorbar(x, y, yerr=reach, fmt=MARKS[i // len(COLOURS) % len(MARKS)], color=colour, markersize=5, elinewidth=0.5, alpha=0.9)
        axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.6)
        ends.append((y[-1], x[-1], label, colour))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda v, _: short_count(v))
    axes.xaxis.set_minor_formatter(lambda v, _: "")
    axes.set_xlabel("trained parameters, without the head (log)")
    axes.set_ylabel("test accuracy, % (whiskers: 95 % interval)")
    low, high = axes.get_ylim()
    slots = [low + (high - low) * (i + 0.5) / max(1, len(ends)) for i in range(len(ends))]
    for slot, (y, x, label, colour) in zip(slots, sorted(ends)):
        axes.annotate(
            label, (x, y), xytext=(1.02, (slot - low) / (high - low)), textcoords="axes fraction", color=colour, fontsize=8, va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.3, "alpha": 0.5},
        )  # fmt: skip
    if probe or full:
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    part = path.with_name(f".{path.stem}.part.png")
    figure.savefig(part)
    part.replace(path)


def quiet() -> None:
    """Keeps reports of libraries about themselves off the screen."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1, help="worker processes, each with one thread (default 1)")
    parser.add_argument("--only", nargs="+", default=[], metavar="METHOD", help="methods to run; all unless given")
    parser.add_argument("--budgets", nargs="+", default=["25k", "150k"], metavar="N", help="trained parameters (default 25k 150k)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the test runs (default 3)")
    parser.add_argument("--steps", type=int, default=Settings.steps, help=f"optimiser steps (default {Settings.steps})")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "weight_methods", help="folder of the finished runs")
    parser.add_argument("--plan", action="store_true", help="only list what would be run")
    parser.add_argument("--write", action="store_true", help="write table, numbers and picture when all is done")
    options = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"  # the workers share the cores
    quiet()
    from veneer.errors import VeneerError
    from veneer.study.budget import budget_of

    settings = Settings(steps=options.steps)
    try:
        cells = plan(options.budgets, options.only)
        if options.plan:
            for cell in cells:
                print(f"{cell.trained:>11,}  {cell.spec}")
            return 0
        failed = run_all(cells, settings, options.out, options.seeds, options.workers)
    except VeneerError as error:
        print(error, file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("\nInterrupted; finished runs are kept, and the same command goes on.", file=sys.stderr)
        return 130
    rows = list(rows_of(cells, settings, options.out, options.seeds))
    budgets = [budget_of(text, 10**12) if "%" not in text else 0 for text in options.budgets]
    for budget in (*budgets, None):
        if any(r["budget"] == budget for r in rows):
            print("\n".join(["", "own count" if budget is None else f"{budget:,} trained", *table(rows, budget)]))
    if options.write and rows:
        write_results(rows, budgets, settings, options.seeds)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
