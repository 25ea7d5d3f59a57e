"""Step time, memory and file times of our methods and Hugging Face PEFT's, over the frozen floor.

    python benchmarks/speed.py [--shape llama] [--dtype float32] [--threads 1] [--rounds 5] [--only lora dora] [--again]
    python benchmarks/speed_page.py

One process, the same model, the same targets and sizes. The floor is the frozen model's forward and its backward to
the input embeddings, without any adapter. Rounds are interleaved: every round times the floor, ours and PEFT's in
turn, and each ratio is taken within its round; medians. Saved activations are the bytes of the storages that the graph
keeps for backward, each once, without parameters and buffers; the peak is what a step's forward and backward allocate at
most beside the model. Every finished row goes into speed.json at once; rows that are there are not measured again.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import veneer
from veneer.study.report import replace_text

NUMBERS = Path(__file__).with_name("speed.json")
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
    named_already = {spec.partition("(")[0] for spec, _ in table.values()} | {spec.partition("(")[0] for spec in own}
    rest = [c.slug for c in veneer.methods() if c.slug not in named_already and c.family != "strategy"]
    return table | {spec: (spec, None) for spec in (*own, *rest)}


def saved_bytes(loss: Tensor, model: nn.Module) -> int:
    """Bytes that the graph behind `loss` keeps for backward, each storage once, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}
    done, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in done:
            continue
        done.add(node)
        todo += [below for below, _ in node.next_functions]
        for t in kept_by(node):
            storage = t.untyped_storage() if t.layout == torch.strided else None
            if storage is None:
                seen[id(t)] = 16 * t._nnz()
            elif storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def kept_by(node: Any) -> Iterator[Tensor]:
    """The tensors one node of the graph keeps: PyTorch's own under `_saved_…`, those of Python functions in `saved_tensors`."""
    values = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
    values += [getattr(node, "saved_tensors", ())]
    for value in values:
        yield from (t for t in (value if isinstance(value, tuple | list) else (value,)) if isinstance(t, Tensor))


def peak_bytes(step: Callable[[], Any]) -> int:
    """The most that one step allocates at a time, beside what was there before it."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    results: Any = seen.profiler.kineto_results  # type: ignore[union-attr]
    now = most = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"):
        now += size
        most = max(most, now)
    return most


class Step:
    """One training step's forward and backward; the gradient also goes to the input embeddings."""

    def __init__(self, model: nn.Module, shape: Shape):
        self.model = model.train()
        model.config.use_cache = False  # training has no use for keys and values of its own
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
        return saved_bytes(self.model(**self.inputs).loss, self.model)


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


def measure(base: nn.Module, shape: Shape, rounds: int, only: list[str], done: dict[str, Any], keep: Callable[[], None]) -> None:
    """Fills `done` with a row for every method that has none, and calls `keep` after each."""
    floor, table = Step(copy.deepcopy(base).requires_grad_(False), shape), pairs(shape)
    ours(base, "lora(r=1)")  # libraries that are imported on first use do not count
    theirs(base, table["lora"][1])
    floor()
    ground = {"saved": floor.saved(), "peak": peak_bytes(floor)}
    for label, (spec, config) in table.items():
        if label in done or (only and label.partition("(")[0] not in only):
            continue
        try:
            done[label] = compared(base, shape, rounds, floor, ground, label, spec, config)
        except veneer.VeneerError as refused:  # a block size that does not fit this shape, a method that needs data
            done[label] = {"method": label, "refused": str(refused).splitlines()[0]}
        keep()
        print(line(done[label]), flush=True)


def in_turn(floor: Step, steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Each step's time over the floor's of the same round, round by round."""
    for one in (floor, *steps.values()):
        one()  # warm up
    times: dict[str, list[float]] = {who: [] for who in steps}
    for _ in range(rounds):
        ground = floor()
        for who, step in steps.items():
            times[who].append(step() / ground)
    return times


def compared(
    base: nn.Module, shape: Shape, rounds: int, floor: Step, ground: dict[str, int], label: str, spec: str, config: Any
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
        steps[who]()
        row[who] = {**facts, "saved": steps[who].saved() / ground["saved"], "peak": peak_bytes(steps[who]) / ground["peak"]}
    times = in_turn(floor, steps, rounds)
    for who in steps:
        row[who]["step"] = statistics.median(times[who])
    if "peft" in times:
        row["ratio"] = statistics.median(a / b for a, b in zip(times["veneer"], times["peft"]))
    return row


HEAD = (
    "| method | trained | step × floor | saved × | peak × | attach / save / load / merge ms |"
    " peft: trained | step × | saved × | peak × | attach / save / load / merge ms | ours / peft |\n|" + "---|" * 12
)


def line(row: dict[str, Any]) -> str:
    """One row of the table."""

    def cells(who: str) -> str:
        facts = row.get(who)
        if facts is None:
            return "– | – | – | – | –"
        times = " / ".join(f"{1000 * facts[k]:.0f}" if k in facts else "–" for k in ("attach", "save", "load", "merge"))
        return f"{facts['trained']:,.0f} | {facts['step']:.2f} | {facts['saved']:.2f} | {facts['peak']:.2f} | {times}"

    name = row["method"]
    for everywhere in (f", targets='{ALL}'", f"(targets='{ALL}')"):
        name = name.replace(everywhere, "")
    if "refused" in row:
        return f"| {name} | {row['refused']} |" + " |" * 10
    ratio = f"{row['ratio']:.2f}" if "ratio" in row else "–"
    return f"| {name} | {cells('veneer')} | {cells('peft')} | {ratio} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=NUMBERS)
    parser.add_argument("--only", nargs="*", default=[], help="methods to run; all unless given")
    parser.add_argument("--again", action="store_true", help="measure rows anew that are there already")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    import transformers

    shape, key = SHAPES[options.shape], f"{options.shape}/{options.dtype}/{options.threads}"
    torch.manual_seed(0)
    base = shape.build().to(getattr(torch, options.dtype))
    done = stored(options.json).get(key, {}).get("rows", {})
    if options.again:
        done = {k: row for k, row in done.items() if options.only and k.partition("(")[0] not in options.only}
    about = {
        "torch": torch.__version__, "transformers": transformers.__version__, "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "batch": [shape.batch, shape.length], "rounds": options.rounds,
    }  # fmt: skip
    print(f"{key}: {about}\n\n{HEAD}", flush=True)

    def keep() -> None:
        replace_text(options.json, json.dumps(stored(options.json) | {key: {**about, "rows": done}}, indent=1) + "\n")

    measure(base, shape, options.rounds, options.only, done, keep)


def stored(path: Path) -> dict[str, Any]:
    """The tables measured so far, by shape/dtype/threads."""
    found = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return found if isinstance(found, dict) else {}


if __name__ == "__main__":
    main()
