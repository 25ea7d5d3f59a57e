"""Initial values. All random numbers are drawn on the CPU in float32, so that a seed gives the same adapter on every device."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

Shape = tuple[int, ...]


def zeros(shape: Shape) -> Tensor:
    return torch.zeros(shape)


def ones(shape: Shape) -> Tensor:
    return torch.ones(shape)


def normal(shape: Shape, generator: Generator, std: float = 1.0, mean: float = 0.0) -> Tensor:
    return torch.empty(shape).normal_(mean, std, generator=generator)


def uniform(shape: Shape, generator: Generator, bound: float) -> Tensor:
    """Uniform in ±bound."""
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def kaiming_uniform(shape: Shape, generator: Generator, fan_in: int | None = None, gain: float = 1.0) -> Tensor:
    """Uniform in ±gain/√fan_in: what `nn.Linear` starts from (Kaiming with a = √5). fan_in is the last axis unless given."""
    return uniform(shape, generator, gain / math.sqrt(fan_in or shape[-1]))
