"""Probing: the task loss at some moment of training, read without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, without caches of keys and values (a block may run twice).

    Afterwards every module's mode and the CPU's random numbers (data loaders draw some) are as before."""
    modes = [(module, module.training) for module in model.modules()]
    found: dict[int, Any] = {id(c): c for c in (getattr(m, "config", None) for m, _ in modes)}
    configs = [c for c in found.values() if getattr(c, "use_cache", False)]
    try:
        with torch.random.fork_rng(devices=[]):
            model.eval()
            for config in configs:
                config.use_cache = False
            yield
    finally:
        for module, training in modes:
            module.training = training
        for config in configs:
            config.use_cache = True


def agreed(value: Tensor) -> Tensor:
    """The mean over all processes of a distributed run, so that each of them decides the same."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        value = value.clone()
        torch.distributed.all_reduce(value)
        value /= torch.distributed.get_world_size()
    return value
