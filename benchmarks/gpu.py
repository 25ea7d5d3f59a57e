"""Step time, peak memory and tokens a second on a CUDA GPU: our methods, PEFT's, torch.compile; each Triton kernel and its plain form.

    python benchmarks/gpu.py [--models 1b 8b] [--only lora ia3] [--rounds 10] [--no-compile] [--json benchmarks/gpu.json]
    python benchmarks/gpu.py --device cpu --tiny        # the same code on tiny shapes, to see that it runs

Llama-shaped models with random weights in bfloat16. A step is forward and backward, without the optimiser; the floor is the
frozen model's step, its gradient going to the input embeddings, timed again right before every method. `plain` is ours with
VENEER_TRITON=0, `compiled` the same model under torch.compile, which then runs the plain operations. Medians of rounds.
With TRITON_INTERPRET=1 kernels also run on the CPU, for their results, not for their times.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import veneer
from veneer.kernels import grouped_low_rank, nf4_low_rank, scale_rotate

ALL = "attn.q attn.k attn.v attn.o mlp.gate mlp.up mlp.down"
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Size(NamedTuple):
    """A Llama: transformers' settings, and the batch."""

    config: dict[str, int]
    batch: int
    length: int


def shape(vocabulary: int, hidden: int, inner: int, layers: int, heads: int, kv: int, batch: int, length: int) -> Size:
    config = {"vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return Size({**config, "num_attention_heads": heads, "num_key_value_heads": kv}, batch, length)


MODELS = {
    "1b": shape(128256, 2048, 8192, 16, 32, 8, 4, 1024),
    "8b": shape(128256, 4096, 14336, 32, 32, 8, 2, 1024),
    "tiny": shape(64, 64, 128, 2, 4, 4, 2, 8),
}
"""The shapes of Llama 3.2 1B and Llama 3.1 8B."""

METHODS: dict[str, tuple[str, tuple[str, dict[str, Any]] | None]] = {
    "lora": (f"lora(r=16, targets='{ALL}')", ("LoraConfig", dict(r=16, lora_alpha=16, target_modules=MODULES))),
    "dora": (f"dora(r=16, targets='{ALL}')", ("LoraConfig", dict(r=16, lora_alpha=16, use_dora=True, target_modules=MODULES))),
    "ia3": (
        "ia3(targets='attn.k attn.v mlp.down')",
        ("IA3Config", dict(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])),
    ),
    "ssf": ("ssf", None),
    "oft": (f"oft(k=32, targets='{ALL}')", ("OFTConfig", dict(oft_block_size=32, r=0, target_modules=MODULES))),
    "hra": (f"hra(r=8, targets='{ALL}')", ("HRAConfig", dict(r=8, target_modules=MODULES))),
    "road": (f"road(group_size=64, targets='{ALL}')", ("RoadConfig", dict(variant="road_1", group_size=64, target_modules=MODULES))),
    "miss": (f"miss(r=64, targets='{ALL}')", ("MissConfig", dict(r=64, target_modules=MODULES))),
    "paca": (f"paca(r=16, targets='{ALL}')", None),
    "s2ft": ("s2ft", None),
    "bitfit": ("bitfit(create=True)", None),
    "ln-tuning": ("ln-tuning", ("LNTuningConfig", dict(target_modules=["input_layernorm", "post_attention_layernorm", "norm"]))),
    "full": ("full", None),
}
RANKS = (8, 16, 32, 64, 8, 16, 32, 64)
"""Of the adapters of a mixed batch, one a row."""

WHO = ("veneer", "plain", "compiled", "peft")

# Bytes and half-precision tensor operations a second, as the makers give them.
PEAKS = {"H100": (3.35e12, 990e12), "H200": (4.8e12, 990e12), "A100": (2.0e12, 312e12), "L40": (0.86e12, 181e12), "4090": (1.0e12, 165e12)}


# -- measuring ------------------------------------------------------------------------------------------------------------


class Clock:
    """Times on one device."""

    def __init__(self, device: str, rounds: int):
        self.device, self.rounds, self.cuda = device, rounds, device.startswith("cuda")

    def once(self, run: Callable[[], Any]) -> float:
        if not self.cuda:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        run()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1000

    def median(self, run: Callable[[], Any], times: int = 1) -> float:
        """Seconds of one run; `times` runs are timed together."""

        def several() -> None:
            for _ in range(times):
                run()

        for _ in range(2):
            run()
        return statistics.median(self.once(several) for _ in range(self.rounds)) / times

    def peak(self, run: Callable[[], Any]) -> int | None:
        """The most bytes that the device held during a run; None on the CPU."""
        if not self.cuda:
            run()
            return None
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    def free(self) -> None:
        gc.collect()
        torch._dynamo.reset()
        if self.cuda:
            torch.cuda.empty_cache()


@contextmanager
def kernels(on: bool) -> Iterator[None]:
    before = os.environ.get("VENEER_TRITON")
    os.environ["VENEER_TRITON"] = "1" if on else "0"
    try:
        yield
    finally:
        os.environ.pop("VENEER_TRITON")
        if before is not None:
            os.environ["VENEER_TRITON"] = before


def tried(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a measurement gave, or why it gave nothing."""
    try:
        return run()
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:160]}


# -- models ---------------------------------------------------------------------------------------------------------------


def llama(size: Size, device: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **size.config))  # type: ignore[arg-type]
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False).train()


class Step:
    """Forward and backward of one batch; the gradient also goes to the input embeddings."""

    def __init__(self, model: nn.Module, size: Size, device: str):
        self.model, self.embeddings = model, model.get_input_embeddings()  # type: ignore[operator]
        self.ids = torch.randint(size.config["vocab_size"], (size.batch, size.length), device=device)

    def __call__(self, model: Callable[..., Any] | None = None) -> None:
        def entered(_module: Any, _inputs: Any, out: Tensor) -> Tensor:
            return out if out.requires_grad else out.requires_grad_()

        handle = self.embeddings.register_forward_hook(entered)
        try:
            (self.model if model is None else model)(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()
        finally:
            handle.remove()
        self.model.zero_grad(set_to_none=True)


def measured(clock: Clock, step: Step, floor: float, model: Callable[..., Any] | None = None) -> dict[str, Any]:
    seconds = clock.median(lambda: step(model))
    return {"step": seconds, "floor": seconds / floor, "peak": clock.peak(lambda: step(model)), "tokens": step.ids.numel() / seconds}


def one_method(base: nn.Module, size: Size, clock: Clock, name: str, compiles: bool) -> dict[str, Any]:
    """One method's row; the base is bare again afterwards."""
    spec, theirs = METHODS[name]
    step = Step(base, size, clock.device)
    floor = clock.median(step)
    row: dict[str, Any] = {"method": name, "spec": spec, "floor": {"step": floor, "peak": clock.peak(step)}}
    tuned = veneer.attach(base, spec, head=False)
    try:
        row["trained"] = tuned.summary().trained
        for label, on in (("veneer", True), ("plain", False)):
            with kernels(on):
                row[label] = tried(lambda: measured(clock, step, floor))
            clock.free()
        if compiles:
            row["compiled"] = tried(lambda: measured(clock, step, floor, torch.compile(base)))
            clock.free()
    finally:
        tuned.detach()
    base.requires_grad_(False)
    clock.free()
    if theirs is not None:
        row["peft"] = tried(lambda: peft_row(base, theirs, clock, step, floor))
    return row


def peft_row(base: nn.Module, theirs: tuple[str, dict[str, Any]], clock: Clock, step: Step, floor: float) -> dict[str, Any]:
    import peft

    kind, options = theirs
    wrapped = peft.get_peft_model(base, getattr(peft, kind)(task_type="CAUSAL_LM", **options))  # type: ignore[arg-type]
    try:
        step.embeddings = base.get_input_embeddings()  # type: ignore[operator]
        return measured(clock, step, floor, wrapped)
    finally:
        wrapped.unload()
        base.requires_grad_(False)
        clock.free()


def adapters(tiny: bool) -> dict[str, int]:
    """Names and ranks of a mixed batch."""
    return {f"a{i}": min(r, 16) if tiny else r for i, r in enumerate(RANKS)}


def mixed_batch(base: nn.Module, size: Size, clock: Clock, compiles: bool) -> list[dict[str, Any]]:
    """Eight adapters of several ranks, one a row: a forward of one token a row, of many, and a training step."""
    ranks = adapters(size is MODELS["tiny"])
    cases = {"one token a row": (1, False), "a prompt": (size.length, False), "a training step": (size.length // 4, True)}
    return [{"case": label, **mixed_row(base, size, clock, compiles, ranks, *case)} for label, case in cases.items()]


def mixed_row(
    base: nn.Module, size: Size, clock: Clock, compiles: bool, ranks: dict[str, int], length: int, trains: bool
) -> dict[str, Any]:
    step = Step(base, size._replace(batch=len(ranks), length=length), clock.device)
    row: dict[str, Any] = {"rows": len(ranks), "length": length, "floor": tried(lambda: one_pass(base, step, trains, clock))}
    for name, r in ranks.items():
        tuned = veneer.attach(base, f"lora(r={r}, targets='{ALL}')", name)
    tuned.activate(per_row=list(ranks))
    try:
        for who, on in (("veneer", True), ("plain", False)):
            with kernels(on):
                row[who] = tried(lambda: one_pass(base, step, trains, clock))
        if compiles:
            row["compiled"] = tried(lambda: one_pass(torch.compile(base), step, trains, clock))
    finally:
        tuned.detach()
    base.requires_grad_(False)
    clock.free()
    if not trains:  # PEFT mixes adapters in inference only
        row["peft"] = tried(lambda: peft_mixed(base, ranks, step, clock))
    return row


def one_pass(model: Callable[..., Any], step: Step, trains: bool, clock: Clock, **options: Any) -> dict[str, Any]:
    def forward() -> None:
        with torch.no_grad():
            model(input_ids=step.ids, use_cache=False, **options)

    run = (lambda: step(model)) if trains else forward
    return {"step": clock.median(run), "peak": clock.peak(run)}


def peft_mixed(base: nn.Module, ranks: dict[str, int], step: Step, clock: Clock) -> dict[str, Any]:
    import peft

    configs = {name: peft.LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=r, target_modules=MODULES) for name, r in ranks.items()}
    names = list(configs)
    wrapped = peft.get_peft_model(base, configs[names[0]], adapter_name=names[0])  # type: ignore[arg-type]
    try:
        for name in names[1:]:
            wrapped.add_adapter(name, configs[name])
        return one_pass(wrapped.eval(), step, False, clock, adapter_names=names)
    finally:
        wrapped.unload()
        base.requires_grad_(False).train()
        clock.free()


# -- kernels --------------------------------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """A kernel at one size.

    Args:
        triton, plain: the two forms of the same function. tensors: what they get; those that are trained say so.
        bytes, operations: the forward bound.
    """

    name: str
    triton: Callable[..., Tensor] | None
    plain: Callable[..., Tensor]
    tensors: Sequence[Tensor]
    bytes: float
    operations: float


def triton_forms() -> tuple[Any, Any, Any] | tuple[None, None, None]:
    """The kernels' modules where they can run: on a GPU, or interpreted."""
    try:
        from veneer.kernels.triton import grouped_low_rank as grouped
        from veneer.kernels.triton import launch
        from veneer.kernels.triton import nf4_low_rank as nf4
        from veneer.kernels.triton import scale_rotate as scaled
    except ImportError:
        return None, None, None
    return (grouped, nf4, scaled) if torch.cuda.is_available() or launch.INTERPRETED else (None, None, None)


def every_kernel(device: str, tiny: bool) -> Iterator[Kernel]:
    grouped, nf4, scaled = triton_forms()
    inside, out = (128, 96) if tiny else (4096, 4096)
    half = torch.float32 if device == "cpu" else torch.bfloat16

    def draw(*shape: int, dtype: torch.dtype = torch.float32, trained: bool = True) -> Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_(trained)

    for rows, tokens in ((2, 1), (4, 3)) if tiny else ((8, 1), (64, 1), (8, 512)):
        ranks = [RANKS[i % len(RANKS)] for i in range(min(rows, 8))]
        index = [torch.arange(i, rows, len(ranks), device=device) for i in range(len(ranks))]
        factors = [draw(out, r) for r in ranks] + [draw(r, inside) for r in ranks]
        n, count = len(ranks), rows * tokens

        def form(run: Callable[..., Tensor], n: int = n, index: list[Tensor] = index) -> Callable[..., Tensor]:
            return lambda y, x, *f: run(y, x, f[:n], f[n:], index)

        yield Kernel(
            f"grouped low-rank {rows}×{tokens}, {n} adapters", form(grouped.grouped_low_rank) if grouped else None,
            form(grouped_low_rank._batched), [draw(rows, tokens, out, dtype=half), draw(rows, tokens, inside, dtype=half), *factors],
            half.itemsize * count * (inside + 2 * out) + 4 * sum(ranks) * (inside + out), 2 * count * sum(ranks) / n * (inside + out),
        )  # fmt: skip
    for count in (4,) if tiny else (64, 4096):
        h = draw(count, out, dtype=half)
        yield Kernel(
            f"scale {count} rows", scaled.scale if scaled else None, scale_rotate.scale_reference,
            [h, draw(out)], 2 * half.itemsize * h.numel(), h.numel(),
        )  # fmt: skip
        yield Kernel(
            f"scale and shift {count} rows", scaled.scale if scaled else None, scale_rotate.scale_reference,
            [h, draw(out), draw(out)], 2 * half.itemsize * h.numel(), 2 * h.numel(),
        )  # fmt: skip
        yield Kernel(
            f"rotate {count} rows", scaled.rotate if scaled else None, scale_rotate.rotate_reference,
            [h, draw(out // 32, 1, 16), draw(out // 32, 1, 16)], 2 * half.itemsize * h.numel(), 3 * h.numel(),
        )  # fmt: skip
    W = nf4_low_rank.Packed(
        torch.randint(256, (inside * out // 2,), device=device, dtype=torch.uint8), (out, inside), torch.linspace(-1, 1, 16, device=device),
        64, torch.rand(inside * out // 64, device=device),
    )  # fmt: skip
    for count in (2,) if tiny else (1, 16, 64, 512, 4096):

        def packed(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return lambda x, L, R: run(x, W, None, L, R)

        yield Kernel(
            f"4-bit and low-rank {count} rows", packed(nf4.nf4_low_rank) if nf4 else None, packed(nf4_low_rank.reference),
            [draw(count, inside, dtype=half), draw(out, 16), draw(16, inside)],
            inside * out * (0.5 + 4 / 64) + half.itemsize * count * (inside + out), 2 * count * (inside * out + 16 * (inside + out)),
        )  # fmt: skip


def kernel_row(kernel: Kernel, clock: Clock, compiles: bool) -> dict[str, Any]:
    """Forward, forward with backward, and the largest difference between the forms."""
    row: dict[str, Any] = {"kernel": kernel.name, "bytes": kernel.bytes, "operations": kernel.operations}
    peaks = next((p for name, p in PEAKS.items() if name in name_of(clock)), None)
    if peaks:
        row["bound"] = max(kernel.bytes / peaks[0], kernel.operations / peaks[1])
    trained = [t for t in kernel.tensors if t.requires_grad]
    forms = {"triton": kernel.triton, "plain": kernel.plain, "compiled": torch.compile(kernel.plain) if compiles else None}
    with torch.no_grad():
        wanted = kernel.plain(*kernel.tensors).float()
    grad = torch.randn_like(wanted)

    def both(form: Callable[..., Tensor]) -> None:
        y = form(*kernel.tensors)
        torch.autograd.grad(y, trained, grad.to(y.dtype), allow_unused=True)

    def timed(form: Callable[..., Tensor]) -> dict[str, Any]:
        with torch.no_grad():
            off = (form(*kernel.tensors).float() - wanted).abs().max() / wanted.abs().max()
            forward = clock.median(lambda: form(*kernel.tensors), 10)
        return {"forward": forward, "both": clock.median(lambda: both(form), 10), "peak": clock.peak(lambda: both(form)), "off": float(off)}

    for who, form in forms.items():
        if form is not None:
            row[who] = tried(lambda form=form: timed(form))  # type: ignore[misc]
    clock.free()
    return row


# -- tables ---------------------------------------------------------------------------------------------------------------


def name_of(clock: Clock) -> str:
    return torch.cuda.get_device_name() if clock.cuda else "CPU"


def cell(facts: dict[str, Any] | None, *keys: str) -> str:
    if facts is None:
        return " – |" * len(keys)
    if "failed" in facts:
        return f" {facts['failed']} |" + " |" * (len(keys) - 1)
    shown = {"step": 1e3, "forward": 1e6, "both": 1e6, "peak": 2.0**-30}
    return "".join(f" {facts[k] * shown.get(k, 1):,.{0 if k == 'tokens' else 2}f} |" if facts.get(k) is not None else " – |" for k in keys)


def method_line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"| {row['method']} | {row['failed']} |"
    each = "".join(cell(row.get(who), "step", "floor", "peak", "tokens") for who in WHO)
    return f"| {row['method']} | {row['trained']:,} |{cell(row['floor'], 'step', 'peak')}{each}"


def head(first: Sequence[str], each: Sequence[str], who: Sequence[str]) -> str:
    names = [*first, *(f"{w}: {e}" for w in who for e in each)]
    return "| " + " | ".join(names) + " |\n|" + "---|" * len(names)


def one_model(name: str, clock: Clock, compiles: bool, methods: Sequence[str]) -> dict[str, Any]:
    size = MODELS[name]
    print(f"\nLlama {name}, batch {size.batch}×{size.length}, bfloat16\n")
    print(head(("method", "trained", "floor ms", "floor GiB"), ("step ms", "× floor", "peak GiB", "tokens/s"), WHO), flush=True)
    held, rows = [llama(size, clock.device)], []
    for method in methods:
        row = tried(lambda method=method: one_method(held[0], size, clock, method, compiles))  # type: ignore[misc]
        rows.append({"method": method, **row})
        print(method_line(rows[-1]), flush=True)
        if "failed" in row:  # the base may be half adapted
            held.clear()
            clock.free()
            held.append(llama(size, clock.device))
    print("\n" + head(("mixed batch", "rows × tokens", "floor ms"), ("step ms", "peak GiB"), WHO), flush=True)
    mixed = mixed_batch(held[0], size, clock, compiles)
    for row in mixed:
        each = "".join(cell(row.get(who), "step", "peak") for who in WHO)
        print(f"| {row['case']} | {row['rows']}×{row['length']} |{cell(row['floor'], 'step')}{each}", flush=True)
    held.clear()
    clock.free()
    return {"methods": rows, "mixed": mixed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=["1b", "8b"])
    parser.add_argument("--only", nargs="*", choices=METHODS, default=list(METHODS), help="methods to run; all unless given")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to see that everything runs")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-kernels", action="store_true", help="leave the single kernels out")
    parser.add_argument("--json", type=Path, help="default: gpu.json beside RESULTS.md; nothing with --tiny")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("benchmarks/gpu.py measures on a CUDA GPU, and torch sees none here; --device cpu --tiny shows that its code runs.")
        return 1
    warnings.filterwarnings("ignore")
    clock, compiles = Clock(options.device, 2 if options.tiny else options.rounds), not options.no_compile
    found: dict[str, Any] = {"device": name_of(clock), "torch": torch.__version__, "rounds": clock.rounds, "models": {}, "kernels": []}
    print(f"{found['device']}, torch {torch.__version__}, medians of {clock.rounds} rounds\n")
    if not options.no_kernels:
        print(head(("kernel", "bound µs"), ("forward µs", "both µs", "peak GiB"), ("triton", "plain", "compiled")), flush=True)
        for kernel in every_kernel(options.device, options.tiny):
            row = kernel_row(kernel, clock, compiles)
            found["kernels"].append(row)
            each = "".join(cell(row.get(who), "forward", "both", "peak") for who in ("triton", "plain", "compiled"))
            print(
                f"| {row['kernel']} | {row['bound'] * 1e6:.2f} |{each}" if "bound" in row else f"| {row['kernel']} | – |{each}", flush=True
            )
    for name in ["tiny"] if options.tiny else options.models:
        found["models"][name] = one_model(name, clock, compiles, options.only)
    path = options.json or (None if options.tiny else Path(__file__).with_name("gpu.json"))
    if path:
        path.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
