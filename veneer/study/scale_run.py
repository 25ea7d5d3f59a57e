"""The arithmetic of `scale` held against two real processes: FSDP2 over gloo, on the CPU, on a Llama that is small enough.

Each process makes the model on `meta`, attaches, fills it from a checkpoint in shards and takes a training step; what it
then holds and what it sent is counted from the tensors and the collectives themselves.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import veneer
from veneer.study.scale import Account, Llama
from veneer.waiting import gathered

SMALL = Llama("a small Llama", layers=3, width=128, heads=4, kv_heads=2, head_dim=32, mlp=320, vocabulary=257)
"""257 words and ranks of 3: lengths that two processes cannot share evenly."""
LINEAR = "targets='attn.q attn.k attn.v attn.o mlp.*'"
CASES = ((f"lora(r=3, {LINEAR})", False), (f"lora(r=3, {LINEAR})", True), (f"dora(r=3, {LINEAR})", True))
"""(method, whether the base is 4-bit)."""
WORLD = 2


class Traffic(TorchDispatchMode):
    """Bytes of what all-gathers gave and reduce-scatters took."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered = self.reduced = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("c10d._allgather_base_"):
            self.gathered += _size(args[0])
        elif name.startswith("c10d._reduce_scatter_base_"):
            self.reduced += _size(args[1])
        elif name.startswith("c10d.reduce_scatter_"):
            self.reduced += sum(_size(t) for t in args[1][0])
        elif name.startswith("c10d.allgather_."):
            self.gathered += sum(_size(t) for t in args[0][0])
        return func(*args, **(kwargs or {}))


def _size(t: torch.Tensor) -> int:
    return t.numel() * t.element_size()


def predicted(spec: str, four_bit: bool, shape: Llama = SMALL, gpus: int = WORLD) -> dict[str, int]:
    """What the formulas say one process holds and exchanges."""
    model = shape.empty(torch.float32, four_bit)
    veneer.attach(model, spec)
    a = Account(model)
    return {
        "base": a.base(gpus), "scales": a.scales, "adapter": a.adapter(gpus), "gradients": a.gradients(gpus),
        "AdamW": a.optimiser(gpus), "all-gather": a.gathered(gpus), "reduce-scatter": a.reduced(gpus),
    }  # fmt: skip


def measured(cases: Sequence[tuple[str, bool]] = CASES, shape: Llama = SMALL) -> list[dict[str, dict[str, int]]]:
    """What two processes hold and exchange: for every case and counted thing the larger of the two."""
    with tempfile.TemporaryDirectory() as folder:
        from transformers import LlamaForCausalLM

        torch.manual_seed(0)
        LlamaForCausalLM(shape.config()).save_pretrained(folder, max_shard_size="500KB")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        torch.multiprocessing.spawn(_process, (port, folder, tuple(cases), shape), nprocs=WORLD)  # type: ignore[no-untyped-call]
        found = [json.loads((Path(folder) / f"rank{rank}.json").read_text("utf-8")) for rank in range(WORLD)]
    return [{what: {k: max(one[what][k] for one in both) for k in both[0][what]} for what in both[0]} for both in zip(*found)]


def _process(rank: int, port: int, folder: str, cases: Sequence[tuple[str, bool]], shape: Llama) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        rows = [_case(spec, four_bit, Path(folder), shape) for spec, four_bit in cases]
        (Path(folder) / f"rank{rank}.json").write_text(json.dumps(rows), encoding="utf-8")
    finally:
        dist.destroy_process_group()


def _case(spec: str, four_bit: bool, folder: Path, shape: Llama) -> dict[str, dict[str, Any]]:
    from torch.distributed.fsdp import fully_shard

    whole: Any = shape.empty(torch.float32, four_bit).eval()
    alone = veneer.attach(whole, spec, seed=1)
    veneer.fill(whole, folder)
    model: Any = shape.empty(torch.float32, four_bit).eval()
    tuned = veneer.attach(model, spec, seed=1)
    veneer.fill(model, folder, shard=fully_shard)
    same_start = all(torch.equal(gathered(p), q) for p, q in zip(tuned.parameters(), alone.parameters(), strict=True))
    optimiser = torch.optim.AdamW(tuned.param_groups(1e-2))
    ids = torch.randint(shape.vocabulary, (2 * WORLD, 8), generator=torch.Generator().manual_seed(2))
    mine = ids[2 * dist.get_rank() :][:2]
    traffic = Traffic()
    with traffic:
        model(input_ids=mine, labels=mine).loss.backward()
    whole(input_ids=ids, labels=ids).loss.backward()
    gap = max(float((gathered(p.grad) - q.grad).abs().max()) for p, q in zip(tuned.parameters(), alone.parameters()))  # type: ignore
    optimiser.step()
    return {"bytes": {**_bytes(model, tuned, optimiser), "all-gather": traffic.gathered, "reduce-scatter": traffic.reduced},
            "law": {"other first values": not same_start, "gap of gradients": gap}}  # fmt: skip


def _bytes(model: nn.Module, tuned: veneer.Tuned, optimiser: torch.optim.Optimizer) -> dict[str, int]:
    own = {id(p) for p in tuned.parameters()}
    held = {id(p): local(p).untyped_storage().nbytes() for p in model.parameters()}
    states: list[Any] = [m.quant_state for m in model.modules() if getattr(m, "quant_state", None) is not None]
    moments = [local(t) for state in optimiser.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return {
        "base": sum(n for key, n in held.items() if key not in own),
        "scales": sum(_size(q.absmax) + _size(q.state2.absmax) + _size(q.offset) for q in states),
        "adapter": sum(n for key, n in held.items() if key in own),
        "gradients": sum(_size(local(p.grad)) for p in tuned.parameters()),
        "AdamW": sum(_size(t) for t in moments),
    }


def local(t: Any) -> torch.Tensor:
    """This process's piece of a tensor."""
    return t.to_local() if hasattr(t, "to_local") else t
