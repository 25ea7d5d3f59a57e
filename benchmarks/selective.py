"""Sparse, selective and layer-choosing methods: step time, memory by what holds it, accuracy; beside full, LoRA and the floor.

    python benchmarks/selective.py [--setting minilm dinov2 llama] [--steps 60] [--only paca s2ft] [--again]

`minilm`: film-review sentences, `dinov2`: Fashion-MNIST, both real models and data, trained and tested; `llama`: hidden 512 × 4
layers with random weights, batch 4×128, for time and memory alone. One process a setting; each round times the floor (the
frozen model's forward and backward to the embeddings) and a whole step of every method in turn: forward, backward, AdamW,
strategies. Saved: bytes the graph keeps; gradients and optimiser state: bytes of those tensors after a step; means over some
steps where a strategy changes them. Every finished row goes into selective.json at once; rows that are there are kept.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from speed import ALL, SHAPES, Step, saved_bytes, stored
from torch import Tensor, nn

import veneer
from veneer.study.report import replace_text
from veneer.study.stats import wilson

NUMBERS = Path(__file__).with_name("selective.json")
RESULTS = Path(__file__).with_name("RESULTS.md")
START, END = "<!-- selective -->", "<!-- /selective -->"
LINEAR = ALL
HEAD = (
    "| method | trained | step × floor | ms beside the floor | saved MB | gradients MB | optimiser MB | adapter MB | accuracy, 95 % |\n|"
    + "---|" * 9
)


def specs(setting: str) -> dict[str, tuple[str, float]]:
    """Label → spec and learning rate. LoRA's size is the budget of the methods that have one."""
    at = f"targets='{LINEAR}'"
    budget = {"minilm": 165_888, "dinov2": 331_776, "llama": 315_392}[setting]  # LoRA's count at r = 4, 4 and 8 on all linear layers
    r = 8 if setting == "llama" else 4
    lora = f"lora(r={r}, {at})"
    table = {
        "head alone": ("probe", 5e-3),
        "full": ("full", 6e-5),
        "lora": (lora, 1e-3),
        "snell": (f"snell(r={r}, {at})", 1e-3),
        "snella": (f"snella(r={r}, {at})", 1e-3),
        "pst": (f"pst({at})", 1e-3),
        "paca": (f"paca(r={2 * r}, {at})", 1e-3),
        "paca, by weight": (f"paca(r={2 * r}, selection='weight', {at})", 1e-3),
        "s2ft": ("s2ft", 1e-3),
        "spt, lora": (f"spt(budget={budget}, r={r}, {at})", 1e-3),
        "full + id3": (f"full + id3(B={budget})", 3e-4),
        "full + id3, PaFi": (f"full + id3(B={budget}, score='smallest', mask='static')", 3e-4),
        "lora + id3, half": (f"lora(r={2 * r}, {at}) + id3(B={budget})", 1e-3),
        "lora + ist": (f"{lora} + ist", 1e-3),
        "lora + random layers": (f"{lora} + ist(scored=False)", 1e-3),
    }
    return {k: v for k, v in table.items() if setting != "llama" or k != "head alone"}


class Setting:
    """A base with its batches for training and its test set."""

    base: nn.Module

    def batches(self, seed: int) -> Iterator[dict[str, Tensor]]:
        """Training batches without end."""
        raise NotImplementedError

    def right(self, model: nn.Module) -> tuple[int, int]:
        """Right answers on the test set, of how many."""
        raise NotImplementedError


class Words(Setting):
    def __init__(self) -> None:
        from weight_methods import Bench, Settings

        self.bench = Bench(Settings(), Path("runs/selective"))
        self.base = self.bench.base

    def batches(self, seed: int) -> Iterator[dict[str, Tensor]]:
        rows = self.bench.parts["train"]
        while True:
            for at in torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).split(16):
                yield self.bench.batch([rows[i] for i in at.tolist()])
            seed += 1000

    def right(self, model: nn.Module) -> tuple[int, int]:
        found, _ = self.bench.answers(model, "test")
        return sum(found), len(found)


class Pictures(Setting):
    def __init__(self) -> None:
        from transformers import AutoModelForImageClassification

        from veneer import assets

        torch.manual_seed(0)
        self.base = AutoModelForImageClassification.from_pretrained(assets.resolve("dinov2-small"), num_labels=10)
        x, y, test_x, test_y = (torch.from_numpy(a.copy()) for a in assets.fashion_mnist())
        self.x, self.y, self.test_x, self.test_y = x[:5000], y[:5000].long(), test_x[:600], test_y[:600].long()

    @staticmethod
    def seen(x: Tensor) -> Tensor:
        big = nn.functional.interpolate(x[:, None].float() / 255, size=(112, 112), mode="bilinear", antialias=True)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        return (big.expand(-1, 3, -1, -1) - mean[:, None, None]) / std[:, None, None]

    def batches(self, seed: int) -> Iterator[dict[str, Tensor]]:
        while True:
            for at in torch.randperm(len(self.x), generator=torch.Generator().manual_seed(seed)).split(16):
                yield {"pixel_values": self.seen(self.x[at]), "labels": self.y[at]}
            seed += 1000

    def right(self, model: nn.Module) -> tuple[int, int]:
        model.eval()
        with torch.inference_mode():
            found = torch.cat([model(pixel_values=self.seen(part)).logits.argmax(-1) for part in self.test_x.split(64)])
        return int((found == self.test_y).sum()), len(found)


class Shaped(Setting):
    """No task: random weights and words, for time and memory."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.base = SHAPES["llama"].build()
        self.step = Step(copy.deepcopy(self.base), SHAPES["llama"])

    def batches(self, seed: int) -> Iterator[dict[str, Tensor]]:
        while True:
            yield {**self.step.inputs, "use_cache": False}  # type: ignore[dict-item]


class Trial:
    """One method on a copy of the base, with its optimiser."""

    def __init__(self, setting: Setting, spec: str, lr: float, steps: int) -> None:
        self.model = copy.deepcopy(setting.base)
        method = veneer.parse(spec)
        data = setting.batches(7)
        some = [next(data) for _ in range(8)] if any(part.reads_gradients for part in method.parts) else None
        self.tuned = veneer.attach(self.model, method, head="auto", batches=some)
        groups = self.tuned.param_groups(lr)
        heads = {id(t) for site, _, p in self.tuned.entries() if site.role == "head" and spec != "full" for t in p.values()}
        split = [{**g, "params": [p for p in g["params"] if id(p) not in heads]} for g in groups]
        own = [p for g in groups for p in g["params"] if id(p) in heads]
        split.append({"params": own, "lr": 5e-3, "weight_decay": 0.0})
        self.optimiser = torch.optim.AdamW([g for g in split if g["params"]], weight_decay=0.0)
        self.rates = [g["lr"] for g in self.optimiser.param_groups]
        self.steps, self.done = steps, 0
        self.probes = setting.batches(11)
        self.model.train()
        self.tuned.begin(steps, self.probe)

    def probe(self) -> Tensor:
        return self.model(**next(self.probes)).loss

    def step(self, batch: dict[str, Tensor]) -> float:
        start = time.perf_counter()
        left = min((self.done + 1) / 6, max(self.steps - self.done, 1) / max(self.steps - 5, 1))
        for group, rate in zip(self.optimiser.param_groups, self.rates):
            group["lr"] = rate * min(left, 1)
        loss = self.model(**batch).loss
        sum(self.tuned.loss_terms().values(), loss).backward()
        self.tuned.before_step()
        torch.nn.utils.clip_grad_norm_(self.tuned.parameters(), 1.0)
        self.optimiser.step()
        self.tuned.after_step()
        self.gradients = sum(p.grad.nbytes for p in self.tuned.parameters() if p.grad is not None)
        self.optimiser.zero_grad(set_to_none=True)
        self.done += 1
        self.loss = float(loss.detach())
        return time.perf_counter() - start

    def saved(self, batch: dict[str, Tensor]) -> int:
        return saved_bytes(self.model(**batch).loss, self.model)

    @property
    def state(self) -> int:
        return sum(t.nbytes for one in self.optimiser.state.values() for t in one.values() if isinstance(t, Tensor))


def floor_of(setting: Setting) -> tuple[nn.Module, Any]:
    """The frozen model with its first table's output in need of a gradient, and how to time one step of it."""
    model = copy.deepcopy(setting.base).requires_grad_(False)
    model.train()
    table: Any = next(m for m in model.modules() if isinstance(m, nn.Embedding | nn.Conv2d))
    table.register_forward_hook(lambda _m, _i, y: y.requires_grad_())

    def step(batch: dict[str, Tensor]) -> float:
        start = time.perf_counter()
        model(**batch).loss.backward()
        return time.perf_counter() - start

    return model, step


def row(setting: Setting, spec: str, lr: float, steps: int, rounds: int) -> dict[str, Any]:
    trial = Trial(setting, spec, lr, max(steps, rounds + 2))
    base, floor = floor_of(setting)
    data = setting.batches(0)
    batch = next(data)
    floor(batch)
    trial.step(batch)
    times, saved, gradients = [], [], []
    for _ in range(rounds):
        batch = next(data)
        ground = floor(batch)
        saved.append((trial.saved(batch), saved_bytes(base(**batch).loss, base)))
        mine = trial.step(batch)
        times.append((mine / ground, 1000 * (mine - ground)))
        gradients.append(trial.gradients)
    found: dict[str, Any] = {
        "spec": spec,
        "lr": lr,
        "trained": trial.tuned.summary().trained,
        "step": statistics.median(t for t, _ in times),
        "extra_ms": statistics.median(t for _, t in times),
        "saved": statistics.mean(s for s, _ in saved),
        "floor_saved": statistics.mean(s for _, s in saved),
        "gradients": statistics.mean(gradients),
        "optimiser": trial.state,
        "adapter": sum(t.nbytes for t in {id(t): t for _, _, p in trial.tuned.entries() for t in p.values()}.values()),
    }
    if steps:
        while trial.done < steps:
            trial.step(next(data))
        found["loss"] = trial.loss if math.isfinite(trial.loss) else None
        found["right"], found["of"] = setting.right(trial.model)
    return found


def line(label: str, found: dict[str, Any]) -> str:
    if "refused" in found:
        return f"| {label} | {found['refused']} |" + " |" * 7
    mega = [f"{found[k] / 1e6:.1f}" for k in ("saved", "gradients", "optimiser", "adapter")]
    shown = "–"
    if "of" in found:
        low, high = wilson(found["right"], found["of"])
        shown = f"{100 * found['right'] / found['of']:.1f} % ({100 * low:.1f}–{100 * high:.1f})"
    return f"| {label} | {found['trained']:,} | {found['step']:.2f} | {found['extra_ms']:+.0f} | " + " | ".join(mega) + f" | {shown} |"


def write_page() -> None:
    """The tables between their marks in RESULTS.md."""
    page, lines = RESULTS.read_text("utf-8"), []
    for name, rows in stored(NUMBERS).items():
        floor = next(r["floor_saved"] for r in rows.values() if "floor_saved" in r)
        lines += ["", f"### {name} (the floor saves {floor / 1e6:.1f} MB)", "", HEAD, *(line(label, r) for label, r in rows.items())]
    head, _, rest = page.partition(START)
    _, _, tail = rest.partition(END)
    replace_text(RESULTS, f"{head}{START}\n" + "\n".join(lines) + f"\n{END}{tail}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made = {"minilm": Words, "dinov2": Pictures, "llama": Shaped}
    parser.add_argument("--setting", nargs="+", choices=made, default=list(made))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    for name in options.setting:
        setting = made[name]()
        done = {} if options.again else stored(NUMBERS).get(name, {})
        print(f"\n{name}: torch {torch.__version__}, {options.threads} thread(s), {options.steps} steps of 16\n\n{HEAD}", flush=True)
        for label, (spec, lr) in specs(name).items():
            if options.only and label not in options.only:
                continue
            if label not in done:
                try:
                    done[label] = row(setting, spec, lr, 0 if name == "llama" else options.steps, options.rounds)
                except veneer.VeneerError as refused:
                    done[label] = {"refused": str(refused).splitlines()[0]}
                replace_text(NUMBERS, json.dumps(stored(NUMBERS) | {name: done}, indent=1) + "\n")
            print(line(label, done[label]), flush=True)
    write_page()


if __name__ == "__main__":
    main()
