"""What every launch needs: the type of products, block sizes, the number of processors."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Kernels run on the CPU, line by line; the variable must have been set when triton was first imported."""

TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def products(dtype: torch.dtype) -> dict[str, Any]:
    """In which type factors are multiplied (sums are float32), and how exactly."""
    kind = tl.float32 if INTERPRETED and dtype == torch.bfloat16 else TYPES[dtype]  # the interpreter multiplies bfloat16's bits
    exact = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return {"DOT": kind, "PRECISION": "ieee" if exact else "tf32"}


def power(n: int, least: int, most: int) -> int:
    """The next power of two, between two others."""
    return min(most, max(least, triton.next_power_of_2(max(1, n))))


@functools.cache
def processors(device: torch.device) -> int:
    """Programs that run at once."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def on(t: Tensor) -> Any:
    """A `with` block whose launches go to the tensor's device."""
    return torch.cuda.device_of(t)
