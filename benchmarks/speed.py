"""Step time, saved activations and file times of our methods and Hugging Face PEFT's, over the frozen floor.

    python benchmarks/speed.py [--rounds 8] [--threads 1] [--json benchmarks/speed.json]

One process, the same model, the same targets and sizes. The floor is the frozen model's forward and its backward to
the input embeddings, without any adapter. Rounds are interleaved: every round times the floor, ours and PEFT's in
turn, and each ratio is taken within its round; the table gives medians. Saved activations are the bytes of the
storages that autograd keeps in forward, each once, without parameters and buffers.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import veneer

ALL = "attn.q attn.k attn.v attn.o mlp.gate mlp.up mlp.down"
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH, LENGTH, VOCABULARY = 4, 128, 1000


def llama() -> nn.Module:
    """A Llama-shaped model with random weights: hidden 512, 4 layers, intermediate 1408."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8
    )
    return LlamaForCausalLM(config).train()


def pairs() -> dict[str, tuple[str, Callable[[], Any] | None]]:
    """Our spec and PEFT's configuration of the same method with the same sizes; None where PEFT has none."""
    import peft

    def config(kind: str, **options: Any) -> Callable[[], Any]:
        return lambda: getattr(peft, kind)(task_type="CAUSAL_LM", **options)

    each = {"target_modules": MODULES}
    targets = f"targets='{ALL}'"
    return {
        "lora": (f"lora(r=8, {targets})", config("LoraConfig", r=8, lora_alpha=8, **each)),
        "dora": (f"dora(r=8, {targets})", config("LoraConfig", r=8, lora_alpha=8, use_dora=True, **each)),
        "adalora": (
            f"adalora(init_r=12, target_r=8, T=1000, {targets})",
            config("AdaLoraConfig", init_r=12, target_r=8, total_step=1000, **each),
        ),
        "ia3": ("ia3", config("IA3Config", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])),
        "ln-tuning": ("ln-tuning", config("LNTuningConfig", target_modules=["input_layernorm", "post_attention_layernorm", "norm"])),
        "prompt-tuning": ("prompt-tuning(length=8)", config("PromptTuningConfig", num_virtual_tokens=8)),
        "prefix-tuning": ("prefix-tuning(length=8)", config("PrefixTuningConfig", num_virtual_tokens=8)),
        "wegeft": (f"wegeft(r=8, {targets})", None),
        "ssf": ("ssf", None),
        "bottleneck-adapter": ("bottleneck-adapter(m=32)", None),
        "bitfit": ("bitfit(create=True)", None),
    }


class Saved:
    """Bytes that autograd keeps for backward inside the `with` block."""

    def __init__(self, model: nn.Module):
        self.own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self.seen: dict[int, int] = {}

    def pack(self, t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.seen[storage.data_ptr()] = storage.nbytes()
        return t

    def __enter__(self) -> Saved:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda t: t)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)

    @property
    def bytes(self) -> int:
        return sum(self.seen.values())


class Step:
    """One training step's forward and backward; the gradient also goes to the input embeddings."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.ids = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
        table = model.get_input_embeddings()  # type: ignore[operator]
        self.handle = table.register_forward_hook(lambda _m, _i, out: out.requires_grad_() if not out.requires_grad else out)

    def __call__(self) -> float:
        self.model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()
        return time.perf_counter() - start

    def saved(self) -> int:
        with Saved(self.model) as saved:
            loss = self.model(input_ids=self.ids, labels=self.ids).loss
        del loss
        return saved.bytes


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    value = run()
    return time.perf_counter() - start, value


def ours(base: nn.Module, spec: str) -> tuple[nn.Module, dict[str, float]]:
    model = copy.deepcopy(base)
    facts: dict[str, float] = {}
    facts["attach"], tuned = timed(lambda: veneer.attach(model, spec))
    with tempfile.TemporaryDirectory() as folder:
        facts["save"], _ = timed(lambda: tuned.save(folder))
        other = copy.deepcopy(base)
        facts["load"], _ = timed(lambda: veneer.load(other, folder))
    facts["trained"] = tuned.summary().trained
    if all(part.foldable for part in tuned.adapters["default"].method.parts):
        facts["merge"], _ = timed(tuned.merge)
        tuned.unmerge()
    return model, facts


def theirs(base: nn.Module, config: Any) -> tuple[nn.Module, dict[str, float]]:
    import peft

    model = copy.deepcopy(base)
    facts: dict[str, float] = {}
    facts["attach"], tuned = timed(lambda: peft.get_peft_model(model, config()))
    with tempfile.TemporaryDirectory() as folder:
        facts["save"], _ = timed(lambda: tuned.save_pretrained(folder))
        other = copy.deepcopy(base)
        facts["load"], _ = timed(lambda: peft.PeftModel.from_pretrained(other, folder))
    facts["trained"] = tuned.get_nb_trainable_parameters()[0]
    if hasattr(tuned.base_model, "merge_adapter"):
        try:
            facts["merge"], _ = timed(tuned.base_model.merge_adapter)
            tuned.base_model.unmerge_adapter()
        except (NotImplementedError, AttributeError):
            facts.pop("merge", None)
    return tuned, facts


def measure(base: nn.Module, rounds: int, only: list[str]) -> list[dict[str, Any]]:
    frozen = copy.deepcopy(base).requires_grad_(False)
    floor = Step(frozen)
    floor_bytes = floor.saved()
    rows = []
    ours(base, "lora(r=1)")  # libraries that are imported on first use do not count
    theirs(base, pairs()["lora"][1])
    for slug, (spec, config) in pairs().items():
        if only and slug not in only:
            continue
        row: dict[str, Any] = {"method": slug}
        steps: dict[str, Step] = {}
        for who, made in (("veneer", ours(base, spec)), ("peft", theirs(base, config) if config else None)):
            if made is None:
                continue
            model, facts = made
            steps[who] = Step(model)
            row[who] = {**facts, "saved": steps[who].saved() / floor_bytes}
        times: dict[str, list[float]] = {who: [] for who in steps}
        for one in (floor, *steps.values()):
            one()  # warm up
        for _ in range(rounds):
            ground = floor()
            for who, step in steps.items():
                times[who].append(step() / ground)
        for who in steps:
            row[who]["step"] = statistics.median(times[who])
        if "peft" in times:
            row["ratio"] = statistics.median(a / b for a, b in zip(times["veneer"], times["peft"]))
        rows.append(row)
        print(line(row), flush=True)
    return rows


HEAD = (
    "| method | trained | step × floor | saved × floor | attach / save / load / merge ms |"
    " peft: trained | step × | saved × | attach / save / load / merge ms | ours / peft |\n|" + "---|" * 10
)


def line(row: dict[str, Any]) -> str:
    def cells(who: str) -> str:
        facts = row.get(who)
        if facts is None:
            return "– | – | – | –"
        times = " / ".join(f"{1000 * facts[k]:.0f}" if k in facts else "–" for k in ("attach", "save", "load", "merge"))
        return f"{facts['trained']:,.0f} | {facts['step']:.2f} | {facts['saved']:.2f} | {times}"

    ratio = f"{row['ratio']:.2f}" if "ratio" in row else "–"
    return f"| {row['method']} | {cells('veneer')} | {cells('peft')} | {ratio} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="*", default=[], help="methods to run; all unless given")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    import transformers

    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {options.threads} thread(s), {platform.machine()}")
    print(f"Llama-shaped, hidden 512 × 4 layers, batch {BATCH}×{LENGTH}, float32, {options.rounds} interleaved rounds, medians\n")
    print(HEAD, flush=True)
    rows = measure(llama(), options.rounds, options.only)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
