"""Step time, saved activations and file times of our methods and Hugging Face PEFT's, over the frozen floor.

    python benchmarks/speed.py [--shape llama] [--dtype float32] [--rounds 8] [--threads 1] [--json benchmarks/speed.json]

One process, the same model, the same targets and sizes. The floor is the frozen model's forward and its backward to
the input embeddings, without any adapter. Rounds are interleaved: every round times the floor, ours and PEFT's in
turn, and each ratio is taken within its round; the table gives medians. Saved activations are the bytes of the
storages that autograd keeps in forward, each once, without parameters and buffers.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import veneer

ALL = "attn.q attn.k attn.v attn.o mlp.gate? mlp.up mlp.down"
VOCABULARY = 1000


@dataclass(frozen=True)
class Shape:
    """A model to measure on, with random weights: its time does not depend on them.

    Args:
        build: the model. modules: PEFT's names of all its linear layers. key, value, down, norms: PEFT's names of some.
        batch, length: rows and tokens of a batch; for images the side of the picture.
    """

    build: Callable[[], nn.Module]
    task: str
    modules: tuple[str, ...]
    key: str
    value: str
    down: str
    norms: tuple[str, ...]
    batch: int
    length: int
    images: bool = False


def llama(**options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **options))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes: dict[str, Any] = dict(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12)
    return BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, **sizes))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes: dict[str, Any] = dict(hidden_size=384, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=6)
    return ViTForImageClassification(ViTConfig(image_size=112, patch_size=16, num_labels=10, **sizes))


LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BERT = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "layer.\\d+.output.dense")
NORMS = ("input_layernorm", "post_attention_layernorm", "norm")
SHAPES = {
    "llama": Shape(
        functools.partial(llama, hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8),
        "CAUSAL_LM", LLAMA, "k_proj", "v_proj", "down_proj", NORMS, 4, 128,
    ),
    "minilm": Shape(bert, "SEQ_CLS", BERT, "key", "value", "layer.\\d+.output.dense", ("LayerNorm",), 16, 48),
    "smollm2": Shape(
        functools.partial(
            llama, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3
        ),
        "CAUSAL_LM", LLAMA, "k_proj", "v_proj", "down_proj", NORMS, 2, 64,
    ),
    "vit-s": Shape(
        vit, "FEATURE_EXTRACTION", ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"), "k_proj", "v_proj", "fc2",
        ("layernorm_before", "layernorm_after", "layernorm"), 8, 112, images=True,
    ),
}  # fmt: skip
"""Llama-like 512 × 4 layers, and the shapes of all-MiniLM-L6, SmolLM2-135M and ViT-S/16."""


def pairs(shape: Shape) -> dict[str, tuple[str, Callable[[], Any] | None]]:
    """Our spec and PEFT's configuration of the same method with the same sizes; None where PEFT has none."""
    import peft

    def config(kind: str, **options: Any) -> Callable[[], Any]:
        return lambda: getattr(peft, kind)(task_type=shape.task, **options)

    def named(*modules: str) -> str:
        return rf".*\.({'|'.join(modules)})"

    each = {"target_modules": named(*shape.modules)}
    at = f"targets='{ALL}'"
    prompts = not shape.images
    table: dict[str, tuple[str, Callable[[], Any] | None]] = {
        "lora": (f"lora(r=8, {at})", config("LoraConfig", r=8, lora_alpha=8, **each)),
        "dora": (f"dora(r=8, {at})", config("LoraConfig", r=8, lora_alpha=8, use_dora=True, **each)),
        "adalora": (
            f"adalora(init_r=12, target_r=8, T=1000, {at})",
            config("AdaLoraConfig", init_r=12, target_r=8, total_step=1000, **each),
        ),
        "vera": (f"vera(r=256, {at})", config("VeraConfig", r=256, **each)),
        "randlora": (f"randlora(r=32, {at})", config("RandLoraConfig", r=32, **each)),
        "delora": (f"delora(r=8, {at})", config("DeloraConfig", r=8, **each)),
        "gralora": (f"gralora(r=32, {at})", config("GraloraConfig", r=32, **each)),
        "loha": (f"loha(r=8, {at})", config("LoHaConfig", r=8, **each)),
        "lokr": (f"lokr(r=8, {at})", config("LoKrConfig", r=8, **each)),
        "fourierft": (f"fourierft(n=1000, {at})", config("FourierFTConfig", n_frequency=1000, **each)),
        "waveft": (f"waveft(n=2592, {at})", config("WaveFTConfig", n_frequency=2592, **each)),
        "c3a": (f"c3a(b=64, {at})", config("C3AConfig", block_size=64, **each)),
        "oft": (f"oft(k=32, {at})", config("OFTConfig", oft_block_size=32, r=0, **each)),
        "boft": (f"boft(k=4, {at})", config("BOFTConfig", boft_block_size=4, **each)),
        "hra": (f"hra(r=8, {at})", config("HRAConfig", r=8, **each)),
        "road": (f"road(group_size=64, {at})", config("RoadConfig", variant="road_1", group_size=64, **each)),
        "shira": (f"shira(r=32, {at})", config("ShiraConfig", r=32, **each)),
        "miss": (f"miss(r=64, {at})", config("MissConfig", r=64, **each)),
        "ia3": (
            "ia3(targets='attn.k attn.v mlp.down')",
            config("IA3Config", target_modules=named(shape.key, shape.value, shape.down), feedforward_modules=named(shape.down)),
        ),
        "ln-tuning": ("ln-tuning", config("LNTuningConfig", target_modules=named(*shape.norms))),
        "prompt-tuning": ("prompt-tuning(length=8)", config("PromptTuningConfig", num_virtual_tokens=8) if prompts else None),
        "prefix-tuning": ("prefix-tuning(length=8)", config("PrefixTuningConfig", num_virtual_tokens=8) if prompts else None),
    }
    if not prompts:
        del table["prompt-tuning"]
    own = (
        f"wegeft(r=8, {at})", f"melora(r=8, n=4, {at})", f"s2-lora(r=32, {at})", f"mola(N=4, K=2, allocation='rectangle', r=8, {at})",
        f"1lora({at})", f"sara(m=0.01, {at})", f"mo-sara(m=0.5, {at})", "alore", "lorta(r=64)", f"loretta(tt_rank=8, {at})",
        "loretta(variant='adp', bottleneck=64)", f"tlora({at})", f"wara(r=8, {at})", f"wara(form='weight', r=8, {at})", f"hut(r=8, {at})",
        f"bone(r=64, {at})", f"bone(r=32, structure='bat', {at})", f"bone(r=32, structure='bat', share='col', {at})",
        f"quantum-adapter({at})", f"nera(r=8, {at})", "ssf", "bottleneck-adapter(m=32)", "bitfit(create=True)",
    )  # fmt: skip
    return table | {spec: (spec, None) for spec in own}


class Saved:
    """Bytes that autograd keeps for backward inside the `with` block."""

    def __init__(self, model: nn.Module):
        self.own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self.seen: dict[int, int] = {}

    def pack(self, t: Tensor) -> Tensor:
        if t.layout != torch.strided:
            self.seen[id(t)] = 16 * t._nnz()
            return t
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

    def __init__(self, model: nn.Module, shape: Shape):
        self.model = model.train()
        generator = torch.Generator().manual_seed(1)
        self.inputs: dict[str, Tensor]
        if shape.images:
            dtype = next(model.parameters()).dtype
            self.inputs = {"pixel_values": torch.randn(shape.batch, 3, shape.length, shape.length, generator=generator).to(dtype)}
            table: Any = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
        else:
            self.inputs = {"input_ids": torch.randint(VOCABULARY, (shape.batch, shape.length), generator=generator)}
            table = model.get_input_embeddings()  # type: ignore[operator]
        self.inputs["labels"] = self.inputs["input_ids"] if shape.task == "CAUSAL_LM" else torch.zeros(shape.batch, dtype=torch.long)
        self.handle = table.register_forward_hook(lambda _m, _i, out: out.requires_grad_() if not out.requires_grad else out)

    def __call__(self) -> float:
        self.model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        self.model(**self.inputs).loss.backward()
        return time.perf_counter() - start

    def saved(self) -> int:
        with Saved(self.model) as saved:
            loss = self.model(**self.inputs).loss
        del loss
        return saved.bytes


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    value = run()
    return time.perf_counter() - start, value


def ours(base: nn.Module, spec: str) -> tuple[nn.Module, dict[str, float]]:
    model = copy.deepcopy(base)
    facts: dict[str, float] = {}
    facts["attach"], tuned = timed(lambda: veneer.attach(model, spec, head=False))
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


def measure(base: nn.Module, shape: Shape, rounds: int, only: list[str]) -> list[dict[str, Any]]:
    floor = Step(copy.deepcopy(base).requires_grad_(False), shape)
    floor_bytes, rows, table = floor.saved(), [], pairs(shape)
    ours(base, "lora(r=1)")  # libraries that are imported on first use do not count
    theirs(base, table["lora"][1])
    for label, (spec, config) in table.items():
        if only and label.partition("(")[0] not in only:
            continue
        try:
            rows.append(compared(base, shape, rounds, floor, floor_bytes, label, spec, config))
        except veneer.VeneerError as refused:  # a block size that does not fit this shape
            print(f"| {label} | {str(refused).splitlines()[0]} |" + " – |" * 8, flush=True)
            continue
        print(line(rows[-1]), flush=True)
    return rows


def compared(
    base: nn.Module, shape: Shape, rounds: int, floor: Step, floor_bytes: int, label: str, spec: str, config: Any
) -> dict[str, Any]:
    """One method's row: ours, and PEFT's where it has one, each round beside the floor."""
    row: dict[str, Any] = {"method": label}
    made = {"veneer": ours(base, spec)}
    if config is not None:
        try:
            made["peft"] = theirs(base, config)
        except Exception as error:
            row["peft_failed"] = f"{type(error).__name__}: {error}"[:200]
    steps = {}
    for who, (model, facts) in made.items():
        steps[who] = Step(model, shape)
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
    return row


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
    name = row["method"]
    for everywhere in (f", targets='{ALL}'", f"(targets='{ALL}')"):
        name = name.replace(everywhere, "")
    return f"| {name} | {cells('veneer')} | {cells('peft')} | {ratio} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="*", default=[], help="methods to run; all unless given")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    import transformers

    shape = SHAPES[options.shape]
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {options.threads} thread(s), {platform.machine()}")
    print(f"{options.shape}, batch {shape.batch}×{shape.length}, {options.dtype}, {options.rounds} interleaved rounds, medians\n")
    print(HEAD, flush=True)
    torch.manual_seed(0)
    rows = measure(shape.build().to(getattr(torch, options.dtype)), shape, options.rounds, options.only)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
