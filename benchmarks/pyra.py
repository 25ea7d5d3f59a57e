"""PYRA on a real vision transformer: images a second with tokens merged from block to block, against the whole sequence.

    python benchmarks/pyra.py [--image-size 224] [--batch-size 4] [--rounds 11] [--threads 1] [--out runs/pyra]

DINOv2-small at 224 pixels reads 257 tokens. It is timed frozen, with LoRA (r=8 on queries and values), and with LoRA and
PYRA or plain merging at the published low and high schedules, inference and training step (forward and backward), without
a head. Rounds are interleaved: each times all of them in turn, in an order that rotates; the table gives medians, and
ratios taken within rounds. Seconds are the processor's, so that others on the machine do not count: with one thread they
are those of the clock on an idle machine.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

HIGH = "schedule=(40, 34, 30, 24, 18, 14, 10, 8, 4, 4, 3, 3)"
LORA = "lora(r=8)"


def main() -> None:
    options = _options()
    os.environ.update(OMP_NUM_THREADS=str(options.threads))
    import torch

    torch.set_num_threads(options.threads)
    models = {name: built(spec) for name, spec in specs(options.image_size).items()}
    pixels = torch.randn(options.batch_size, 3, options.image_size, options.image_size, generator=torch.Generator().manual_seed(0))
    infer: dict[str, list[float]] = {name: [] for name in models}
    train: dict[str, list[float]] = {name: [] for name in models if name != "frozen"}
    for model in models.values():
        forward(model, pixels)
    order = list(models)
    for n in range(options.rounds):
        for name in order[n % len(order) :] + order[: n % len(order)]:
            infer[name].append(forward(models[name], pixels))
            if name in train:
                train[name].append(step(models[name], pixels))
    text = table(infer, train, options)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.md").write_text(text, encoding="utf-8")
    print(text)


def specs(side: int) -> dict[str, str | None]:
    """What is timed: the name in the table and the method, None for the frozen model."""
    tokens = f"tokens={(side // 14) ** 2 + 1}"
    found: dict[str, str | None] = {"frozen": None, "LoRA": LORA}
    for name, schedule in (("low", "r=16"), ("high", HIGH)):
        found[f"LoRA + merging, {name}"] = f"{LORA} + pyra({schedule}, {tokens}, reactivate=False)"
        found[f"LoRA + PYRA, {name}"] = f"{LORA} + pyra({schedule}, {tokens})"
    return found


def built(spec: str | None) -> Any:
    from transformers import Dinov2Model

    import veneer
    from veneer import assets

    model = Dinov2Model.from_pretrained(assets.dinov2_dir()).eval()
    return model.requires_grad_(False) if spec is None else veneer.attach(model, spec, head=False).model


def forward(model: Any, pixels: Any) -> float:
    """Processor seconds of an answer."""
    import torch

    model.eval()
    begin = time.process_time()
    with torch.inference_mode():
        model(pixels)
    return time.process_time() - begin


def step(model: Any, pixels: Any) -> float:
    """Processor seconds of forward and backward in training mode."""
    model.train()
    begin = time.process_time()
    model(pixels).pooler_output.square().mean().backward()
    seconds = time.process_time() - begin
    model.zero_grad(set_to_none=True)
    return seconds


def table(infer: dict[str, list[float]], train: dict[str, list[float]], options: argparse.Namespace) -> str:
    lines = [
        f"DINOv2-small, {options.image_size} × {options.image_size} pixels, batches of {options.batch_size}, {options.rounds} rounds, "
        f"torch {_torch()}, {platform.machine()}, {options.threads} thread{'s' if options.threads > 1 else ''}, processor time.",
        "",
        "| | inference, images/s | × frozen | × LoRA | training, images/s | × LoRA |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, seconds in infer.items():
        cells = [speed(seconds, options), faster(infer["frozen"], seconds), faster(infer["LoRA"], seconds)]
        cells += [speed(train[name], options), faster(train["LoRA"], train[name])] if name in train else ["", ""]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines) + "\n"


def speed(seconds: list[float], options: argparse.Namespace) -> str:
    return f"{options.batch_size / statistics.median(seconds):.1f}"


def faster(slow: list[float], seconds: list[float]) -> str:
    return f"{statistics.median(a / b for a, b in zip(slow, seconds)):.2f}"


def _torch() -> str:
    import torch

    return torch.__version__


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=224, help="side of the pictures, a multiple of 14")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/pyra"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
