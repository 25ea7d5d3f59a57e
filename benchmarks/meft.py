"""Reversible blocks: what training keeps and needs at most, how long a step takes, and how exactly inputs are made again.

    python benchmarks/meft.py [--rounds 3] [--threads 1]

Full fine-tuning, LoRA, LoRA with gradient checkpointing and MEFT 1, 2 and 3 with two adapters of width 8 a block, on all-MiniLM-L6-v2 and
on a Llama-like model of 12 blocks with random weights; saved and peak bytes are `speed.py`'s. Then the relative error of the first rebuilt
input, and the cosine of the lowest adapter's gradient to autograd's of the same network, by the number of reversible blocks.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import warnings
from typing import Any

import torch
from speed import SHAPES, Shape, Step, llama, peak_bytes
from torch import nn

import veneer
from veneer.assets import minilm_dir, movie_snippets, smollm2_dir

INSIDE = "bottleneck-adapter(variant='parallel', m=8, act='gelu', s=1, start='bert')"
BESIDE = "bottleneck-adapter(targets='stream', m=8, act='gelu', start='bert')"
AFTER = "bottleneck-adapter(targets='attn', m=8, act='gelu', start='bert')"
VARIANTS = {"meft1": f"{INSIDE} + {BESIDE}", "meft2": f"{INSIDE} + {BESIDE}", "meft3": f"{INSIDE} + {AFTER}"}
LORA = "lora(r=8)"
FORMATS = ((torch.float32, "float64"), (torch.float32, "float32"), (torch.bfloat16, "float64"), (torch.bfloat16, "own"))
"""Number formats of blocks and of streams."""


def minilm() -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(minilm_dir(), attn_implementation="sdpa")


def subject(name: str) -> tuple[str, nn.Module, Shape]:
    if name == "minilm":
        return "MiniLM, 6 blocks of 384, 16 × 48 tokens", minilm(), Shape(minilm, "SEQ_CLS", (), "", "", "", (), 16, 48)
    deep = llama(hidden_size=512, intermediate_size=1408, num_hidden_layers=12, num_attention_heads=8)
    return "Llama-like, 12 blocks of 512, 2 × 128 tokens", deep, dataclasses.replace(SHAPES["llama"], batch=2)


def ways(base: nn.Module) -> dict[str, nn.Module]:
    """The same model, made ready in every way."""
    made: dict[str, nn.Module] = {"full fine-tuning": copy.deepcopy(base).requires_grad_(True)}
    for name in ("LoRA", "LoRA, checkpointing"):
        made[name] = copy.deepcopy(base)
        veneer.attach(made[name], LORA, head=False)
    plain: Any = made["LoRA, checkpointing"]
    plain.gradient_checkpointing_enable({"use_reentrant": True})
    for variant, spec in VARIANTS.items():
        made[variant.upper()] = copy.deepcopy(base)
        veneer.reversible(made[variant.upper()], variant)
        veneer.attach(made[variant.upper()], spec, head=False)
    return made


def costs(name: str, rounds: int) -> None:
    title, base, shape = subject(name)
    print(f"\n{title}\n\n| | saved, MB | of full | peak, MB | of full | step × full |\n|---|---|---|---|---|---|", flush=True)
    steps = {way: Step(model, shape) for way, model in ways(base).items()}
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {way: [] for way in steps}
    for _ in range(rounds):
        ground = steps["full fine-tuning"]()
        for way, step in steps.items():
            times[way].append((ground if way == "full fine-tuning" else step()) / ground)
    whole = (0, 0)
    for way, step in steps.items():
        kept, most = step.saved(), peak_bytes(step)
        whole = whole if whole[0] else (kept, most)
        cells = f"{kept / 1e6:.1f} | {kept / whole[0]:.0%} | {most / 1e6:.1f} | {most / whole[1]:.0%}"
        print(f"| {way} | {cells} | {statistics.median(times[way]):.2f} |", flush=True)


def lowest_gradient(model: nn.Module, fed: dict[str, Any]) -> torch.Tensor:
    """Gradient of the adapters of the lowest block that has some, in one vector."""
    model.zero_grad()
    torch.manual_seed(0)
    model(**fed).loss.backward()
    found = [(site.depth, t.grad) for site, _, p in veneer.of(model).entries() for t in p.values() if t.grad is not None]
    return torch.cat([g.flatten().double() for depth, g in found if depth == min(d for d, _ in found)])


def exactness(load: Any, fed: dict[str, Any], depths: list[tuple[int, int | None]], formats: tuple) -> None:
    """Error and cosine of every variant, by reversible blocks, anchors and number formats."""
    print("\n| model | streams | " + " | ".join(f"{d} blocks{f', anchors={a}' if a else ''}" for d, a in depths) + " |")
    print("|---" * (len(depths) + 2) + "|")
    for variant, spec in VARIANTS.items():
        for dtype, streams in formats:
            cells = []
            for depth, anchors in depths:
                model = load().to(dtype).train()
                made = veneer.reversible(model, variant, layers=depth, anchors=anchors, streams=streams)
                rest = tuple(range(made_depth(model) - depth))
                veneer.attach(model, " + ".join(f"{part[:-1]}, leave_out={rest})" for part in spec.split(" + ")), head=False)
                rebuilt = lowest_gradient(model, fed)
                made.cached = True
                cosine = float(torch.cosine_similarity(rebuilt, lowest_gradient(model, fed), 0))
                cells.append(f"{made.error:.0e}, {cosine:.3f}")
            print(f"| {variant.upper()}, {str(dtype).removeprefix('torch.')} | {streams} | {' | '.join(cells)} |", flush=True)


def made_depth(model: nn.Module) -> int:
    return max(s.length for s in veneer.anatomy.sites(model) if s.kind == "block")


def sentences(folder: Any, count: int, length: int) -> dict[str, Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = [text for text, _ in movie_snippets()[:count]]
    return dict(tokenizer(texts, return_tensors="pt", padding="max_length", truncation=True, max_length=length))


def exactness_minilm() -> None:
    fed = sentences(minilm_dir(), 8, 32)
    print("\nMiniLM on film reviews, 8 × 32 tokens: relative error of the first rebuilt input, cosine of the lowest adapters' gradient")
    exactness(minilm, {**fed, "labels": torch.arange(8) % 2}, [(2, None), (4, None), (6, None), (6, 2)], FORMATS)


def exactness_smollm2() -> None:
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(smollm2_dir(), use_cache=False)
    fed = sentences(smollm2_dir(), 2, 24)
    print("\nSmolLM2-135M on film reviews, 2 × 24 tokens: the same")
    exactness(lambda: copy.deepcopy(base), {**fed, "labels": fed["input_ids"]}, [(8, None), (30, None), (30, 5)], FORMATS[::2])


def main() -> None:
    parts = {"minilm": costs, "llama": costs, "exact-minilm": exactness_minilm, "exact-smollm2": exactness_smollm2}
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--rounds", type=int, default=3)
    asked.add_argument("--threads", type=int, default=1)
    asked.add_argument("--parts", nargs="*", choices=parts, default=list(parts))
    options = asked.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message="reversible:")
    for part in options.parts:
        parts[part](*((part, options.rounds) if parts[part] is costs else ()))


if __name__ == "__main__":
    main()
