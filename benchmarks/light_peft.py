"""Light-PEFT against plain LoRA on a real encoder: what pruning half of the blocks saves, and what it costs.

    python benchmarks/light_peft.py [--estimation 40] [--steps 60] [--batch-size 16] [--threads 1] [--out runs/light-peft]

Both adapt all-MiniLM-L6-v2 to film-review sentences with LoRA on all linear layers of the blocks and take the same number
of steps: plain LoRA all of them, Light-PEFT some with masks and the rest on the pruned model. Runs are processes of their
own, by the command line; finished ones are reused. Then the trained models are loaded into one process and timed in turn,
a training step and a forward pass of the same batch each round; the table gives medians, and ratios taken within rounds.
Shares of the base are of its blocks: half of this small model's parameters are its word table, which nothing prunes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LORA = "lora(r=8, alpha=16, targets='attn.q attn.k attn.v attn.o mlp.up mlp.down')"
MASKS = "light-peft(rho_a=0.5, rho_f=0.5, rho_m=0.5, rho_r=0.2, lr_ratio=3.0)"
"""Half of the heads and neurons go; about a quarter of LoRA's numbers stay."""
ROUNDS, LENGTH = 8, 48


def main() -> None:
    options = _options()
    os.environ.update(OMP_NUM_THREADS=str(options.threads), TOKENIZERS_PARALLELISM="false")
    total = options.estimation + options.steps
    common = ["--model", "minilm", "--data", "movie-sentiment", "--batch-size", str(options.batch_size), "--max-length", str(LENGTH)]
    common += ["--lr", "2e-3", "--no-base", "--eval-every", "1000", "--test-rows", "1000", "--validation-rows", "100"]
    home = options.out
    plain = run(home / "lora", *common, "--method", LORA, "--steps", str(total))
    run(home / "masked", *common, "--method", f"{LORA} + {MASKS}", "--steps", str(options.estimation))
    light = run(home / "slim", "--slim", str(home / "masked"), "--steps", str(options.steps))
    table = report(home, plain, light, options)
    (home / "results.md").write_text(table, encoding="utf-8")
    print(table)


def run(folder: Path, *arguments: str) -> dict[str, Any]:
    """One training run by the command line: its outcome."""
    command = [sys.executable, "-m", "veneer.cli.main", "train", *arguments, "--out", str(folder), "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def report(home: Path, plain: dict[str, Any], light: dict[str, Any], options: argparse.Namespace) -> str:
    """The table, in markdown."""
    import torch

    import veneer
    from veneer.train.use import rebuild

    torch.set_num_threads(options.threads)
    models = {name: rebuild(home / folder)[0] for name, folder in (("lora", "lora"), ("light", "slim"))}
    times: dict[str, list[float]] = {f"{name} {what}": [] for name in models for what in ("step", "forward")}
    estimated, masked, noted = rebuild(home / "masked")[0], list[float](), list[float]()
    strategy: Any = veneer.of(estimated).adapters["default"].strategies[0]
    strategy.start(veneer.of(estimated), "default", 1)
    noting = strategy.look
    noting(False)
    for _ in range(ROUNDS):
        for name, model in models.items():
            times[f"{name} step"].append(step(model, options.batch_size))
            times[f"{name} forward"].append(forward(model, options.batch_size))
        masked.append(step(estimated, options.batch_size))
        noting(True)
        noted.append(step(estimated, options.batch_size))
        noting(False)
    tuned = {name: veneer.of(model) for name, model in models.items()}
    blocks = {name: sum(p.numel() for n, p in m.named_parameters() if ".layer." in n and "veneer" not in n) for name, m in models.items()}
    kept = {name: saved(model, options.batch_size) for name, model in models.items()}
    head = 2 * 384 + 2
    trained = {name: t.summary().trained - head for name, t in tuned.items()}
    rows = [
        ("parameters of the blocks", *both(blocks), ratio(blocks)),
        ("trained, without the head", *both(trained), ratio(trained)),
        *((f"{what}, ms", *timed(times, key)) for what, key in (("training step", "step"), ("forward pass", "forward"))),
        ("kept for backward, MB", *(f"{kept[n] / 1e6:.1f}" for n in models), ratio(kept)),
        ("peak memory of the run, MB", *(f"{o['peak_memory'] / 1e6:.0f}" for o in (plain, light)), _ratio(light, plain, "peak_memory")),
        ("adapter's file, kB", *(f"{o['adapter_bytes'] / 1e3:.0f}" for o in (plain, light)), _ratio(light, plain, "adapter_bytes")),
        ("accuracy, % (95 %)", accuracy(plain), accuracy(light), ""),
    ]
    total = options.estimation + options.steps
    lines = [
        f"LoRA (r=8, all linear layers, {total} steps) and Light-PEFT ({options.estimation} steps with masks, {options.steps} pruned) on",
        f"all-MiniLM-L6-v2, film-review sentences, {options.batch_size} × {LENGTH} tokens a step. A step with masks takes "
        f"{over(masked, times)} of plain LoRA's, {over(noted, times)} while importances are noted. {machine(options.threads)}.",
        "",
        "| | LoRA | Light-PEFT | ratio |",
        "|---|---:|---:|---:|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def batch_of(model: Any, rows: int) -> dict[str, Any]:
    import torch

    ids = torch.randint(1000, model.config.vocab_size, (rows, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}


def step(model: Any, rows: int) -> float:
    """Seconds of forward and backward in training mode."""
    batch = batch_of(model, rows)
    model.train()
    begin = time.perf_counter()
    model(**batch).loss.backward()
    seconds = time.perf_counter() - begin
    model.zero_grad(set_to_none=True)
    return seconds


def forward(model: Any, rows: int) -> float:
    """Seconds of an answer."""
    import torch

    batch = batch_of(model.eval(), rows)
    begin = time.perf_counter()
    with torch.no_grad():
        model(**batch)
    return time.perf_counter() - begin


def saved(model: Any, rows: int) -> int:
    """Bytes that autograd keeps between forward and backward, parameters left out."""
    import torch

    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def note(t: Any) -> Any:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = model(**batch_of(model, rows)).loss
    size = sum(found.values())
    del loss
    return size


def timed(times: dict[str, list[float]], key: str) -> tuple[str, str, str]:
    plain, light = times[f"lora {key}"], times[f"light {key}"]
    ratios = [b / a for a, b in zip(plain, light)]
    return f"{1e3 * statistics.median(plain):.0f}", f"{1e3 * statistics.median(light):.0f}", f"{statistics.median(ratios):.2f}"


def over(seconds: list[float], times: dict[str, list[float]]) -> str:
    return f"{statistics.median(b / a for a, b in zip(times['lora step'], seconds)):.2f}"


def both(numbers: dict[str, int]) -> tuple[str, str]:
    return f"{numbers['lora']:,}", f"{numbers['light']:,}"


def ratio(numbers: dict[str, int]) -> str:
    return f"{numbers['light'] / numbers['lora']:.2f}"


def _ratio(light: dict[str, Any], plain: dict[str, Any], key: str) -> str:
    return f"{light[key] / plain[key]:.2f}"


def accuracy(outcome: dict[str, Any]) -> str:
    found = outcome["metrics"]["accuracy"]
    return f"{100 * found['value']:.1f} ({100 * found['low']:.1f}–{100 * found['high']:.1f})"


def machine(threads: int) -> str:
    import torch

    return f"torch {torch.__version__}, {platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--estimation", type=int, default=40, help="steps with masks")
    parser.add_argument("--steps", type=int, default=60, help="steps on the pruned model")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/light-peft"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
