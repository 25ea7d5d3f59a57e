"""Quantised bases and weights on SmolLM2-135M: memory, size, error, loss on film-review sentences before and after some training.

    python benchmarks/quantised.py [--steps 20] [--only qlora bits] [--again]

`qlora`: LoRA on all linear layers of a base in bf16, NF4, FP4 or int8 (bitsandbytes): bytes of the base, kept activations and
peak of one step beside it, optimiser states, time of a step over bf16's (interleaved), loss. `bits`: methods that give 4, 3 and
2 bits a weight, on a 32-bit base: relative error of the weights, loss at the start and after training. Every finished row goes
into quantised.json at once; rows that are there are kept.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from speed import peak_bytes, saved_bytes, stored
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import veneer
from veneer import assets
from veneer.maths.grids import grid, off_grid, on_grid
from veneer.study.report import replace_text
from veneer.tools.requantise import packed_layers
from veneer.train.packed_base import config

NUMBERS, RESULTS = Path(__file__).with_name("quantised.json"), Path(__file__).with_name("RESULTS.md")
START, END = "<!-- quantised -->", "<!-- /quantised -->"
LENGTH, GROUP, ALL = 128, 64, "targets='attn.q attn.k attn.v attn.o mlp.up mlp.gate mlp.down'"
LORA = f"lora(r=16, {ALL})"
MEGA = 1e6


class Words:
    """Film-review sentences in rows of `LENGTH` tokens: 16 to test on, 8 to calibrate with, the rest to train on."""

    def __init__(self, folder: str) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        texts = [text for text, _ in assets.movie_snippets()][:4000]
        ids = [i for text in texts for i in tokenizer(text + "\n")["input_ids"]]
        rows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
        self.test, self.calibration, self.train = rows[:16], rows[16:24], rows[24:]

    def loss(self, model: Any) -> float:
        """Mean loss per token on the test rows."""
        model.eval()
        with torch.no_grad():
            return statistics.mean(float(model(input_ids=part, labels=part).loss) for part in self.test.split(4))

    def batch(self, step: int) -> dict[str, Tensor]:
        rows = self.train[2 * step : 2 * step + 2]
        return {"input_ids": rows, "labels": rows, "use_cache": False}  # type: ignore[dict-item]


class Trial:
    """A model with an adapter and its optimiser."""

    def __init__(self, model: Any, spec: str, words: Words) -> None:
        self.model, self.words, self.done = model, words, 0
        method = veneer.parse(spec)
        some = [{"input_ids": row[None]} for row in words.calibration] if any(part.calibrates for part in method.parts) else None
        start = time.perf_counter()
        self.tuned = veneer.attach(model, method, head=False, batches=some)
        self.attaching = time.perf_counter() - start
        self.optimiser = torch.optim.AdamW(self.tuned.param_groups(getattr(type(method), "default_lr", 1e-3)), weight_decay=0.0)

    def step(self) -> float:
        start = time.perf_counter()
        self.model.train()
        self.optimiser.zero_grad()
        self.model(**self.words.batch(self.done)).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.tuned.parameters(), 1.0)
        self.optimiser.step()
        self.done += 1
        return time.perf_counter() - start

    def train(self, steps: int) -> float:
        for _ in range(steps - self.done):
            self.step()
        return self.words.loss(self.model)


# -- a packed base ----------------------------------------------------------------------------------------------


def base_in(form: str, folder: str) -> Any:
    if form == "bf16":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    name, _, single = form.partition(", ")
    packing = config(name, not single, torch.bfloat16)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=packing, device_map={"": "cpu"})


def qlora(form: str, folder: str, words: Words, steps: int) -> dict[str, Any]:
    """One row of the first table; a bf16 LoRA steps in turn with it."""
    model, plain = base_in(form, folder), Trial(base_in("bf16", folder), LORA, words)
    layers = sum(bytes_of(layer) for layer in packed_layers(model).values())  # evaluation repacks them on some CPUs
    layers = layers or sum(layer.weight.nbytes for layer in linears(model).values())
    size = model.get_memory_footprint() - sum(layer.weight.nbytes for layer in linears(model).values()) + layers
    before = words.loss(model)
    trial = Trial(model, LORA, words)
    pairs = [(trial.step(), plain.step()) for _ in range(5)]
    model.train()
    kept = saved_bytes(model(**words.batch(0)).loss, model)
    peak = peak_bytes(lambda: model(**words.batch(0)).loss.backward())
    states = sum(t.nbytes for s in trial.optimiser.state.values() for t in s.values() if isinstance(t, Tensor))
    return {
        "base": size, "packed": layers, "kept": kept, "peak": peak, "states": states,
        "time": statistics.median(a / b for a, b in pairs), "before": before, "after": trial.train(steps),
    }  # fmt: skip


def bytes_of(layer: Any) -> int:
    """What a packed weight takes, scales included."""
    W = layer.weight
    state = getattr(W, "quant_state", None)
    if state is None:
        return int(W.nbytes + (W.SCB.nbytes if getattr(W, "SCB", None) is not None else 0))
    inner = getattr(state, "state2", None)
    scales = state.absmax.nbytes + (inner.absmax.nbytes + 4 if inner is not None else 0)
    return int(W.nbytes + scales)


# -- methods of few bits ----------------------------------------------------------------------------------------


def specs(bits: int) -> dict[str, str]:
    """Label → spec; LoRA itself goes on a base that is rounded first."""
    return {
        "rounded base + LoRA": LORA,
        "LoftQ": f"lora(r=16, start=loftq, bits={bits}, spacing=linear, loftq_iters=5, {ALL})",
        "QWHA": f"qwha(r=16, bits={bits}, group={GROUP}, {ALL})",
        "L4Q": f"l4q(r=4, bits={bits}, group={GROUP}, {ALL})",
        **({"QWHA, from data": f"qwha(r=16, bits=2, group={GROUP}, start=data, {ALL})"} if bits == 2 else {}),
        "SketchTune": f"sketchtune(bits={bits}, gpr=4, {ALL})",
    }


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "layers." in name}


@torch.no_grad()
def rounded(model: nn.Module, bits: int) -> nn.Module:
    """Every linear layer on the nearest levels of a grid, in place."""
    for layer in linears(model).values():
        step, zero = grid(layer.weight, bits, GROUP)
        codes = on_grid(layer.weight.unflatten(-1, (-1, GROUP)), step[..., None], zero[..., None], bits).flatten(-2)
        layer.weight.copy_(off_grid(codes, step, zero))
    return model


def storage(label: str, bits: int, trained: int, weights: int, gpr: int) -> float:
    """Bits a weight with everything that goes with it: 16 bits a trained value or scale, 32 a position."""
    if label.startswith("Sketch"):
        return bits + 16 * trained / weights
    grids = 32 / GROUP if label == "L4Q" else (16 + 8) / GROUP
    own = {"L4Q": 0, "QWHA": 48}.get(label.partition(",")[0], 16)  # L4Q's factors are gone once it is exported
    return bits + grids + own * trained / weights


@torch.no_grad()
def error(tuned: Any, base: nn.Module) -> float:
    """‖W_eff − W‖ / ‖W‖ over all adapted layers."""
    gone = whole = 0.0
    own = linears(base)
    for part in tuned.adapters["default"].parts:
        W = own[part.site.module].weight
        held = tuned.model.get_submodule(part.site.module).weight
        gone += float((part.method.weight(held, part.tensors(), part.site) - W).square().sum())
        whole += float(W.square().sum())
    return (gone / whole) ** 0.5


def few_bits(label: str, bits: int, base: Any, words: Words, steps: int) -> dict[str, Any]:
    """One row of the second table; LoRA on the untouched base steps in turn with it."""
    model = copy.deepcopy(base)
    if label.startswith("rounded"):
        rounded(model, bits)
    spec = specs(bits)[label]
    trial, plain = Trial(model, spec, words), Trial(copy.deepcopy(base), LORA, words)
    trained = trial.tuned.summary().trained
    weights = sum(layer.weight.numel() for layer in linears(base).values())
    found = {"trained": trained, "error": error(trial.tuned, base), "start": words.loss(model), "attach": trial.attaching}
    found["bits"] = storage(label, bits, trained, weights, 4)
    pairs = [(trial.step(), plain.step()) for _ in range(5)]
    return {**found, "time": statistics.median(a / b for a, b in pairs), "after": trial.train(steps)}


# -- the page ---------------------------------------------------------------------------------------------------


def page(found: dict[str, Any]) -> str:
    lines = [
        "| base in | base MB | its linear layers MB | kept MB | peak MB | optimiser MB | step × bf16's | loss before | after |",
        "|" + "---|" * 9,
    ]
    for form, row in found.get("qlora", {}).items():
        sizes = " | ".join(f"{row[k] / MEGA:.1f}" for k in ("base", "packed", "kept", "peak", "states"))
        lines.append(f"| {form} | {sizes} | {row['time']:.2f} | {row['before']:.3f} | {row['after']:.3f} |")
    lines += [
        "",
        "| bits | method | trained | bits a weight | error of weights % | loss at the start | after | step × LoRA's | attach s |",
        "|" + "---|" * 9,
    ]
    for name, row in sorted(found.get("bits", {}).items(), reverse=True, key=lambda item: item[0][0]):
        bits, _, label = name.partition(" ")
        lines.append(
            f"| {bits} | {label} | {row['trained']:,} | {row['bits']:.2f} | {100 * row['error']:.1f} | {row['start']:.3f} "
            f"| {row['after']:.3f} | {row['time']:.2f} | {row['attach']:.0f} |"
        )
    return "\n".join(lines)


def put(found: dict[str, Any]) -> None:
    replace_text(NUMBERS, json.dumps(found, indent=1) + "\n")
    text = RESULTS.read_text("utf-8")
    if START in text:
        before, rest = text.split(START)
        replace_text(RESULTS, f"{before}{START}\n{page(found)}\n{END}{rest.split(END)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--only", nargs="+", choices=("qlora", "bits"), default=["qlora", "bits"])
    parser.add_argument("--again", action="store_true", help="measure rows that are there anew")
    options = parser.parse_args()
    torch.manual_seed(0)
    folder = assets.resolve("smollm2")
    words, found = Words(folder), {} if options.again else stored(NUMBERS)
    if "qlora" in options.only:
        for form in ("bf16", "nf4", "nf4, single", "fp4", "int8"):
            if form not in found.setdefault("qlora", {}):
                found["qlora"][form] = qlora(form, folder, words, options.steps)
                put(found)
    if "bits" in options.only:
        base = AutoModelForCausalLM.from_pretrained(folder)
        found.setdefault("base", words.loss(base))
        for bits in (4, 3, 2):
            for label in specs(bits):
                if f"{bits} {label}" not in found.setdefault("bits", {}):
                    found["bits"][f"{bits} {label}"] = few_bits(label, bits, base, words, options.steps)
                    put(found)
                    print(f"{bits} bits, {label}: {found['bits'][f'{bits} {label}']}", flush=True)
    print(page(found))


if __name__ == "__main__":
    main()
