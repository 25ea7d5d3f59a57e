"""Two local processes over gloo, started with the environment that torchrun gives: DDP and FSDP2 compute what one process does."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from tiny import ROWS, output
from torch import Tensor, nn
from torch.nn import functional as F

import veneer
from veneer.errors import Unsupported, VeneerError
from veneer.tuned import Tuned

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo")
WORLD = 2
SPECS = [
    "lora(r=2)",
    "dora(r=2)",
    "wegeft(r=2)",
    "ssf",
    "bottleneck-adapter(m=2)",
    "prompt-tuning(length=2)",
    "prefix-tuning(length=2)",
    "lora(r=2) + ssf",
]
BATCH = tiny.SUBJECTS["llama"].batch(0)
TARGET = torch.randint(tiny.VOCABULARY, (ROWS, tiny.LENGTH), generator=torch.Generator().manual_seed(1))


def prepared(spec: str) -> Tuned:
    tuned = veneer.attach(tiny.SUBJECTS["llama"].build(), spec, seed=5)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(0.1 * torch.empty(p.shape).normal_(generator=generator).to(p))
    tuned.model.train()
    return tuned


def mean_loss(model: nn.Module, rows: slice) -> Tensor:
    inner = {k: v[rows] for k, v in BATCH.items()}
    logits = model(**inner).logits
    return F.cross_entropy(logits.flatten(0, 1), TARGET[rows].flatten())


def expected(spec: str) -> tuple[list[Tensor], Tensor]:
    """Gradients and outputs of one process on the whole batch."""
    tuned = prepared(spec)
    mean_loss(tuned.model, slice(None)).backward()
    with torch.no_grad():
        return [p.grad.clone() for p in tuned.parameters() if p.grad is not None], output(tuned.model, BATCH)


def own_rows() -> slice:
    each = ROWS // WORLD
    return slice(dist.get_rank() * each, (dist.get_rank() + 1) * each)


# -- what each process does -----------------------------------------------------------------------------------


def ddp(spec: str, folder: Path) -> None:
    gradients, _ = expected(spec)
    tuned = prepared(spec)
    wrapped = nn.parallel.DistributedDataParallel(tuned.model)
    mean_loss(wrapped, own_rows()).backward()
    for p, wanted in zip(tuned.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, wanted, rtol=1e-8, atol=1e-10)
    refused(lambda: veneer.attach(wrapped, spec, "second"))


def fsdp(spec: str, folder: Path) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    gradients, outputs = expected(spec)
    tuned = prepared(spec)
    for block in tuned.model.model.layers:  # type: ignore[union-attr]
        fully_shard(block)
    fully_shard(tuned.model)
    assert all(isinstance(p, DTensor) for p in tuned.parameters())
    optimiser = torch.optim.AdamW(tuned.param_groups(1e-2))
    with torch.no_grad():
        torch.testing.assert_close(output(tuned.model, BATCH), outputs)
    mean_loss(tuned.model, own_rows()).backward()
    for p, wanted in zip(tuned.parameters(), gradients, strict=True):
        torch.testing.assert_close(whole(p.grad), wanted, rtol=1e-8, atol=1e-10)
    refused(lambda: veneer.attach(tuned.model, spec, "second"))
    optimiser.step()
    with torch.no_grad():
        trained = output(tuned.model, BATCH)
    assert not torch.allclose(trained, outputs)
    tuned.save(folder / spec)
    dist.barrier()
    with torch.no_grad():
        again = output(veneer.load(tiny.SUBJECTS["llama"].build(), folder / spec).model, BATCH)
    torch.testing.assert_close(again, trained, rtol=1e-10, atol=1e-10)


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor()


def refused(action: Callable[[], Any]) -> None:
    with pytest.raises(Unsupported, match="Attach first, then shard, then compile"):
        action()


# -- starting them --------------------------------------------------------------------------------------------


def process(rank: int, port: int, name: str, folder: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    failed = []
    try:
        for spec in SPECS:
            try:
                {"ddp": ddp, "fsdp": fsdp}[name](spec, Path(folder))
            except (AssertionError, VeneerError, RuntimeError, TypeError, KeyError, AttributeError, ValueError):
                failed.append(f"{spec}, rank {rank}:\n{traceback.format_exc(limit=-4)}")
    finally:
        dist.destroy_process_group()
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_processes_compute_what_one_does(name: str, tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(process, (port, name, str(tmp_path)), nprocs=WORLD)  # type: ignore[no-untyped-call]
