"""Step time and saved activations of our methods and AdapterHub's (adapters 1.3), over the frozen floor, in one process.

    python benchmarks/adapterhub.py [--shape minilm] [--threads 1] [--rounds 8]

adapters 1.3 wants transformers 4.57, PEFT's newest wants 5: run this in an environment of its own,
`pip install adapters==1.3.0 transformers==4.57.6` beside veneer. How it measures is what `speed.py` says; the rows go into
adapterhub.json, the table is printed.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import warnings
from importlib.metadata import version
from typing import Any

import torch
from speed import ALL, NUMBERS, SHAPES, Step, in_turn, ours
from torch import nn

from veneer.study.report import replace_text

HEAD = "| method | trained | step × floor | saved × | adapters: trained | step × | saved × | ours / adapters |\n|" + "---|" * 8


def pairs(adapters: Any) -> dict[str, tuple[str, Any]]:
    """Our spec and AdapterHub's configuration of the same method with the same sizes."""
    everywhere: dict[str, Any] = dict(attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True)
    targets = ALL.replace(" attn.o", "").replace(" mlp.gate?", "")
    return {
        "lora": (f"lora(r=8, targets='{targets}')", adapters.LoRAConfig(r=8, alpha=8, **everywhere)),
        "dora": (f"dora(r=8, targets='{targets}')", adapters.DoRAConfig(r=8, alpha=8, **everywhere)),
        "vera": (f"vera(r=256, targets='{targets}')", adapters.VeraConfig(r=256, **everywhere)),
        "ia3": ("ia3(targets='attn.k attn.v mlp.up')", adapters.IA3Config()),
        "bottleneck, after attention and feed-forward": (
            "bottleneck-adapter(m=32, variant='houlsby')",
            adapters.DoubleSeqBnConfig(reduction_factor=12),
        ),
        "bottleneck, parallel": ("bottleneck-adapter(m=32, variant='parallel')", adapters.ParBnConfig(reduction_factor=12)),
        "prefix-tuning": ("prefix-tuning(length=8)", adapters.PrefixTuningConfig(prefix_length=8, flat=True)),
        "prompt-tuning": ("prompt-tuning(length=8)", adapters.PromptTuningConfig(prompt_length=8)),
    }


def theirs(base: nn.Module, config: Any) -> tuple[nn.Module, int]:
    import adapters

    model: Any = copy.deepcopy(base)
    adapters.init(model)
    model.add_adapter("one", config=config)
    model.train_adapter("one")
    for name, parameter in model.named_parameters():
        if "classifier" in name or "pooler" in name or "lm_head" in name:
            parameter.requires_grad_(False)
    return model, sum(p.numel() for p in model.parameters() if p.requires_grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("minilm", "llama"), default="minilm")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    try:
        import adapters
    except ModuleNotFoundError:
        parser.exit(1, "adapters is not installed here: pip install adapters==1.3.0 transformers==4.57.6\n")
    import transformers

    shape = SHAPES[options.shape]
    torch.manual_seed(0)
    base = shape.build()
    floor = Step(copy.deepcopy(base).requires_grad_(False), shape)
    kept, rows = floor.saved(), []
    print(f"{options.shape}, adapters {version('adapters')}, transformers {transformers.__version__}\n\n{HEAD}", flush=True)
    for label, (spec, config) in pairs(adapters).items():
        try:
            mine, facts = ours(base, spec)
            other, trained = theirs(base, config)
            steps = {"veneer": Step(mine, shape), "adapters": Step(other, shape)}
            saved = {who: step.saved() / kept for who, step in steps.items()}
        except Exception as error:
            print(f"| {label} | {type(error).__name__}: {str(error)[:120]} |" + " |" * 6, flush=True)
            continue
        times = in_turn(floor, steps, options.rounds)
        middle = {who: statistics.median(t) for who, t in times.items()}
        ratio = statistics.median(a / b for a, b in zip(times["veneer"], times["adapters"]))
        rows.append({"method": label, "trained": facts["trained"], "theirs": trained, "step": middle, "saved": saved, "ratio": ratio})
        print(
            f"| {label} | {facts['trained']:,.0f} | {middle['veneer']:.2f} | {saved['veneer']:.2f} "
            f"| {trained:,} | {middle['adapters']:.2f} | {saved['adapters']:.2f} | {ratio:.2f} |",
            flush=True,
        )
    path = NUMBERS.with_name("adapterhub.json")
    known = json.loads(path.read_text("utf-8")) if path.exists() else {}
    replace_text(path, json.dumps(known | {options.shape: rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
